"""A task from beginning to end: questions asked of a model, answers judged, a score with what it was made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from puna.errors import DataError
from puna.eval.metrics import Measured, Values, measure, of_choices, of_numbers, of_one, of_passed
from puna.eval.olmes import find_requests, read_requests
from puna.eval.question import Question
from puna.eval.reader import Reader
from puna.eval.sandbox import run_all
from puna.eval.sets import Asked, read_questions
from puna.eval.table import TASKS, Kind
from puna.infer.request import Likelihood
from puna.infer.sampling import Sampling
from puna.log import Progress


@dataclass(frozen=True)
class Exam:
    """Questions of a task, ready to be asked."""

    name: str
    kind: Kind
    asked: Asked
    stop: tuple[str, ...] = ()
    max_tokens: int = 0
    shots: int = 0
    seed: int | None = None
    """Chose the examples; none where a file has them."""


@dataclass(frozen=True)
class Answered:
    """A question with what was answered and what that is worth."""

    question: Question
    values: Values
    told: dict[str, Any]
    """The answer, as it is written to a file."""

    def row(self, number: int) -> dict[str, Any]:
        """One line of a report."""
        question = self.question
        right = question.continuations[question.gold]
        asked = {"context": question.contexts[question.gold], "choices": question.continuations, "right": right}
        return {"number": number, "id": question.id, "subject": question.group, **asked, **self.told, **self.values}


@dataclass(frozen=True)
class Marks:
    """Every answer to an exam."""

    exam: Exam
    answers: list[Answered]
    cut: int = 0
    """Texts that lost their beginning: they were longer than what the model reads."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else the answers depend on: the model, how it was computed, how answers were drawn."""

    def measured(self, places: Sequence[int] | None = None) -> list[Measured]:
        """Metrics over all answers, or those at `places`."""
        chosen = self.answers if places is None else [self.answers[place] for place in places]
        return measure([each.values for each in chosen], [each.question.group for each in chosen])


def prepare(
    name: str, folder: Path | None = None, limit: int | None = None, shots: int = 0, seed: int = 1234,
    max_tokens: int | None = None,
) -> Exam:  # fmt: skip
    """Read the questions of a task of the table, or of a file of requests (which has its own examples)."""
    task = TASKS.get(name)
    if task is None:
        asked = read_requests(find_requests(name, folder), limit)
        kinds: set[Kind] = {"cloze" if len(q.continuations) == 1 else "choice" for q in asked.questions}
        if len(kinds) != 1:
            raise DataError("no requests, or some with choices and some without", where=name)
        return Exam(name, kinds.pop(), asked)
    asked = read_questions(name, task, folder, limit, shots, seed)
    if not asked.questions:
        raise DataError("no questions", where=name)
    return Exam(name, task.kind, asked, task.stop, max_tokens or task.max_tokens, shots, seed)


def sit(exam: Exam, reader: Reader, sampling: Sampling | None = None) -> Marks:
    """Ask every question.

    Args:
        sampling: temperature, seed and n of written answers; by default the likeliest answer, once.
    """
    questions, cut, unfinished = exam.asked.questions, reader.cut, reader.unfinished
    sampling = sampling or Sampling()
    if exam.kind == "choice":
        judged = _choices(exam, reader)
    elif exam.kind == "cloze":
        asked = [(q.contexts[0], q.continuations[0]) for q in questions]
        with Progress(exam.name, len(asked)) as progress:
            found = reader.likelihoods(asked, progress.update)
        judged = [(of_one(q, f), {"logprob": f.total}) for q, f in zip(questions, found, strict=True)]
    else:
        judged = _written(exam, reader, sampling)
    answers = [Answered(q, values, told) for q, (values, told) in zip(questions, judged, strict=True)]
    drawn = _drawn(exam, sampling, reader.unfinished - unfinished)
    return Marks(exam, answers, reader.cut - cut, {**reader.about, **drawn})


def _drawn(exam: Exam, sampling: Sampling, unfinished: int) -> dict[str, Any]:
    """How written answers were drawn, and how many of them `max_tokens` cut short."""
    if exam.kind in ("choice", "cloze"):
        return {"seed": exam.seed}
    drawn = {"temperature": sampling.temperature, "samples": sampling.n, "max_tokens": exam.max_tokens}
    return {"seed": exam.seed, **drawn, "sampling_seed": sampling.seed, "unfinished": unfinished}


def _choices(exam: Exam, reader: Reader) -> list[tuple[Values, dict[str, Any]]]:
    questions = exam.asked.questions
    asked = [pair for q in questions for pair in zip(q.contexts, q.continuations, strict=True)]
    alone = [pair for q in questions if q.alone for pair in zip(q.alone, q.continuations, strict=True)]
    with Progress(exam.name, len(asked) + len(alone)) as progress:
        scores = iter(reader.likelihoods([*asked, *alone], progress.update))
    found = [[next(scores) for _ in q.contexts] for q in questions]
    without = [[next(scores) for _ in q.alone] for q in questions]
    return [_chosen(*each) for each in zip(questions, found, without, strict=True)]


def _chosen(q: Question, found: list[Likelihood], alone: list[Likelihood]) -> tuple[Values, dict[str, Any]]:
    totals = [each.total for each in found]
    return of_choices(q, found, alone), {"answer": q.continuations[totals.index(max(totals))], "logprobs": totals}


def _written(exam: Exam, reader: Reader, sampling: Sampling) -> list[tuple[Values, dict[str, Any]]]:
    questions = exam.asked.questions
    kept = Sampling(
        max_tokens=exam.max_tokens, stop=exam.stop, temperature=sampling.temperature, top_p=sampling.top_p,
        n=sampling.n, seed=sampling.seed,
    )  # fmt: skip
    with Progress(exam.name, len(questions)) as progress:
        replies = reader.write([q.contexts[0] for q in questions], kept, progress.update)
    if exam.kind == "code":
        return _run(questions, replies)
    rows = zip(questions, replies, strict=True)
    return [(of_numbers(texts[0], str(q.row["answer"])), {"answer": texts[0]}) for q, texts in rows]


def _run(questions: list[Question], replies: list[list[str]]) -> list[tuple[Values, dict[str, Any]]]:
    programs = [program(q, text) for q, texts in zip(questions, replies, strict=True) for text in texts]
    outcomes = iter(run_all(programs))
    judged = []
    for texts in replies:
        ran = [next(outcomes) for _ in texts]
        told = {"answer": texts, "outcome": [each.why or "passed" for each in ran]}
        judged.append((of_passed([each.passed for each in ran]), told))
    return judged


def program(question: Question, answer: str) -> str:
    """HumanEval: the prompt, the answer, its tests, and the call that runs them."""
    row = question.row
    return f"{row['prompt']}{answer}\n\n{row['test']}\n\ncheck({row['entry_point']})\n"
