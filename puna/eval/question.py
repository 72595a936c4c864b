"""What is asked, whatever the task: places in a text, each with the text that might follow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any


@dataclass(frozen=True)
class Question:
    """`continuations[i]` may follow `contexts[i]`; the right one is number `gold`.

    A question to be answered in writing has one continuation: an answer that is right.
    """

    id: str
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int = 0
    group: str = ""
    """The subject, where a task has several."""
    alone: tuple[str, ...] = ()
    """The same continuations may also be scored after these: what they are worth without the question."""
    raw: str = ""
    """Question and right answer in the words of the set, without template, choices and examples: what must not have
    been trained on."""
    row: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """The data it was made of: what a written answer is checked against."""

    @property
    def solved(self) -> str:
        """Question and right answer: an example for others."""
        return self.contexts[self.gold] + self.continuations[self.gold]

    def after(self, examples: str) -> "Question":
        """The question behind some text."""
        return replace(self, contexts=tuple(examples + context for context in self.contexts))


def choice(id: Any, context: str, choices: Sequence[str], gold: int, **more: Any) -> Question:
    """One context, several answers, each after a space."""
    after = tuple(f" {text}" for text in choices)
    return Question(str(id), (context,) * len(after), after, gold, **more)


def with_shots(
    questions: Sequence[Question],
    pool: Sequence[Question],
    shots: int,
    seed: int,
    *,
    itself: bool = False,
    first: bool = False,
    headers: Mapping[str, str] | None = None,
) -> list[Question]:
    """Each question behind `shots` solved ones of `pool`, drawn as lm-eval 0.4 draws them.

    Args:
        itself: the question is one of the pool, and does not become its own example.
        first: the first ones of the question's group, in order; else drawn anew for each question, one stream of
            random numbers for all.
        headers: text before the examples, by group.
    """
    random, asked = Random(seed), []
    for question in questions:
        own = question if itself else None
        chosen = _first(pool, shots, question.group, own) if first else _drawn(random, pool, shots, own)
        header = (headers or {}).get(question.group, "")
        asked.append(question.after(header + "".join(each.solved + "\n\n" for each in chosen)))
    return asked


def _first(pool: Sequence[Question], shots: int, group: str, own: Question | None) -> list[Question]:
    return [each for each in pool if each.group == group and each != own][:shots]


def _drawn(random: Random, pool: Sequence[Question], shots: int, own: Question | None) -> list[Question]:
    if not shots:
        return []
    if own is None:
        return random.sample(pool, shots)
    found = [each for each in random.sample(pool, shots + 1) if each != own][:shots]  # one more, should it be drawn
    return found if len(found) == shots else random.sample([each for each in pool if each != own], shots)
