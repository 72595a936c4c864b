"""Accuracy on procedural problems, with an interval, and the guess it has to beat."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from puna.data.conversations import problems

# Problem i of seed s is problem i - 1 of seed s + 1, so training (from 0), solved examples and questions are far apart.
_SOLVED, _ASKED = 1 << 24, 1 << 25
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
Answer = Callable[[list[list[dict[str, Any]]]], list[str]]
"""Conversations that end with a question -> the answers."""


class Score(NamedTuple):
    """Right answers of `n`, with a 95 % Wilson interval."""

    task: str
    right: int
    n: int

    @property
    def accuracy(self) -> float:
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson score interval: right where the normal one fails, near 0 and 1."""
        z, p, n = 1.959964, self.accuracy, self.n
        middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def evaluate_task(task: str, answer: Answer, limit: int, shots: int = 0, lenient: bool = False, seed: int = 0) -> Score:
    """Ask `limit` unseen problems of a reasoning-gym task, each after `shots` solved ones.

    Args:
        lenient: the right answer may stand inside a sentence (`matches`); else the reply has to be it.
    """
    asked = problems(task, limit, _ASKED + seed)
    solved = problems(task, shots, _SOLVED + seed) if shots else []
    before = [m for q, a in solved for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
    replies = answer([[*before, {"role": "user", "content": question}] for question, _ in asked])
    score = matches if lenient else _equals
    return Score(task, sum(score(reply, right) for reply, (_, right) in zip(replies, asked, strict=True)), limit)


def majority(task: str, limit: int, seed: int = 0) -> Score:
    """What always giving the most frequent training answer would score on the same problems."""
    guess = Counter(answer for _, answer in problems(task, 1000, 0)).most_common(1)[0][0]
    asked = problems(task, limit, _ASKED + seed)
    return Score(task, sum(_equals(guess, right) for _, right in asked), limit)


def matches(reply: str, right: str) -> bool:
    """Numbers: the last one in the reply; words: any word of it, whatever its case and quotes."""
    if _NUMBER.fullmatch(right):
        found = _NUMBER.findall(reply)
        return bool(found) and found[-1].replace(",", "") == right.replace(",", "")
    return right.lower() in re.findall(r"\w+", reply.lower())


def _equals(reply: str, right: str) -> bool:
    return reply.strip() == right.strip()


def in_batches(answer: Answer, size: int, progress: Callable[[int], None]) -> Answer:
    """`answer` on `size` conversations at a time, longest first so that a batch pads little."""

    def all_of(conversations: list[list[dict[str, Any]]]) -> list[str]:
        order = sorted(range(len(conversations)), key=lambda i: -sum(len(m["content"]) for m in conversations[i]))
        replies: dict[int, str] = {}
        for start in range(0, len(order), size):
            chosen: Sequence[int] = order[start : start + size]
            replies |= dict(zip(chosen, answer([conversations[i] for i in chosen]), strict=True))
            progress(len(replies))
        return [replies[i] for i in range(len(conversations))]

    return all_of
