"""Accuracy on procedural problems, with an interval, and the guess it has to beat."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any, NamedTuple

from pydantic import NonNegativeInt, PositiveInt

from puna.config import Config
from puna.data.problems import Tasks, problems
from puna.infer.engine import Engine
from puna.infer.llama import Llama
from puna.infer.request import Event, Request
from puna.infer.sampling import Sampling
from puna.log import Progress
from puna.ops.paged_attention import BLOCK

_SOLVED = 1 << 24  # seed of solved examples
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
Z = 1.959964  # 95 %
Answer = Callable[[list[list[dict[str, Any]]]], list[str]]
"""Conversations that end with a question -> the answers."""
Interval = tuple[float, float, float]
"""Low, value, high: a 95 % interval."""


class TaskConfig(Config):
    """Accuracy on unseen problems of reasoning-gym tasks."""

    tasks: Tasks = {}
    """Names, or names with settings: {chain_sum: {max_terms: 3}}."""
    limit: PositiveInt = 200
    """Problems of each task; the interval is about 100 / sqrt(limit) points to either side."""
    shots: NonNegativeInt = 4
    """Solved problems before each question."""
    max_tokens: PositiveInt = 24
    """Most ids in an answer."""
    batch_size: PositiveInt = 32
    """Questions answered at a time."""
    lenient: bool = True
    """The right answer may stand inside a sentence (the last number, any word); else the reply has to be it."""


class Score(NamedTuple):
    """Which answers to a task's problems were right: a 1 or a 0 for each."""

    task: str
    marks: str

    @property
    def n(self) -> int:
        return len(self.marks)

    @property
    def right(self) -> int:
        return self.marks.count("1")

    @property
    def accuracy(self) -> float:
        return self.right / self.n

    @property
    def interval(self) -> Interval:
        """Wilson score interval: right where the normal one fails, near 0 and 1."""
        p, n = self.accuracy, self.n
        middle, half = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n * n))
        return max(0.0, (middle - half) / (1 + Z**2 / n)), p, min(1.0, (middle + half) / (1 + Z**2 / n))


def gain(before: Score, after: Score) -> Interval:
    """After minus before on the same problems, paired: what both got right or wrong adds no doubt.

    Agresti and Min (2005): half a count on each of the four outcomes, which keeps the interval honest near 0 and 1.
    """
    n = before.n + 2
    won = sum(b < a for b, a in zip(before.marks, after.marks, strict=True)) + 0.5
    lost = sum(b > a for b, a in zip(before.marks, after.marks, strict=True)) + 0.5
    half = Z * math.sqrt(won + lost - (won - lost) ** 2 / n) / n
    middle = (won - lost) / n
    return max(-1.0, middle - half), after.accuracy - before.accuracy, min(1.0, middle + half)


def check_tasks(tasks: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise for a name or a setting that reasoning-gym does not know, before anybody waits for an answer."""
    for task, settings in tasks.items():
        problems(task, 1, settings=settings)


def evaluate_tasks(llama: Llama, config: TaskConfig) -> Iterator[Score]:
    """A score for each task of the config, asked by the model's own chat template."""
    for task in config.tasks:
        with Progress(task, config.limit) as progress:
            yield evaluate_task(task, config, answerer(llama, config.max_tokens, config.batch_size, progress.update))


def answerer(llama: Llama, max_tokens: int, batch: int, progress: Callable[[int], None]) -> Answer:
    """The likeliest answers of a model, `batch` written at a time."""
    sampling = Sampling(max_tokens=max_tokens, stop_ids=tuple(llama.stop_ids))

    def answer(conversations: list[list[dict[str, Any]]]) -> list[str]:
        prompts = [llama.template.prompt(conversation) for conversation in conversations]
        longest = max(map(len, prompts), default=0) + max_tokens
        engine = Engine(llama.model, batch=batch, tokens=batch * (longest + BLOCK))
        done = count()

        def told(event: Event) -> None:
            if event.result:
                progress(next(done) + 1)

        results = engine.run([Request(prompt, sampling) for prompt in prompts], told)
        return [llama.tokenizer.decode(result.completions[0].token_ids) for result in results]

    return answer


def evaluate_task(task: str, config: TaskConfig, answer: Answer) -> Score:
    """Ask unseen problems of a task of the config, each after `shots` solved ones."""
    settings = config.tasks[task]
    asked = problems(task, config.limit, settings=settings, unseen=True)
    solved = problems(task, config.shots, _SOLVED, settings) if config.shots else []
    before = [m for q, a in solved for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
    replies = answer([[*before, {"role": "user", "content": question}] for question, _ in asked])
    score = matches if config.lenient else _equals
    return _scored(task, (score(reply, right) for reply, (_, right) in zip(replies, asked, strict=True)))


def majority(task: str, limit: int, settings: Mapping[str, Any] | None = None) -> Score:
    """What always giving the most frequent training answer would score on the same problems."""
    guess = Counter(answer for _, answer in problems(task, 1000, settings=settings)).most_common(1)[0][0]
    return _scored(task, (_equals(guess, right) for _, right in problems(task, limit, settings=settings, unseen=True)))


def compare(before: Mapping[str, str], after: Mapping[str, str], config: TaskConfig) -> list[dict[str, Any]]:
    """A row for each task, from marks before and after: the gain is over the better of before and the majority answer.

    Both sides are scored leniently, so that knowing the format of the answer counts for nothing.
    """
    rows = []
    for task, settings in config.tasks.items():
        was, guess, now = Score(task, before[task]), majority(task, config.limit, settings), Score(task, after[task])
        best = max(was, guess, key=lambda score: score.right)
        row = {"task": task, "before": was.interval, "majority": guess.accuracy, "after": now.interval}
        rows.append({**row, "gain": gain(best, now)})
    return rows


def _scored(task: str, right: Iterator[bool]) -> Score:
    return Score(task, "".join("01"[r] for r in right))


def matches(reply: str, right: str) -> bool:
    """Numbers: the last one in the reply; words: any word of it, whatever its case and quotes."""
    if _NUMBER.fullmatch(right):
        found = _NUMBER.findall(reply)
        return bool(found) and found[-1].replace(",", "") == right.replace(",", "")
    return right.lower() in re.findall(r"\w+", reply.lower())


def _equals(reply: str, right: str) -> bool:
    return reply.strip() == right.strip()
