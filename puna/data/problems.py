"""Problems made by reasoning-gym, with a part of every task kept for evaluation."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from typing import Annotated, Any

from pydantic import BeforeValidator

from puna.config import nearest
from puna.errors import DataError, UsageError

_OURS = ("seed", "size")  # what puna gives every task itself


def _named(value: Any) -> Any:
    return {name: {} for name in value} if isinstance(value, list | tuple) else value


Tasks = Annotated[dict[str, dict[str, int | float | bool | str]], BeforeValidator(_named)]
"""reasoning-gym tasks with their settings, `{chain_sum: {max_terms: 3}}`, or a list of names."""


def problems(
    task: str, size: int, seed: int = 0, settings: Mapping[str, Any] | None = None, unseen: bool = False
) -> list[tuple[str, str]]:
    """(question, answer) of a reasoning-gym task; a pure function of its arguments.

    One question in eight, by its hash, is kept for evaluation: `unseen` gives these, each once; training has the rest.
    Other seeds would not do: small tasks repeat themselves.

    Raises:
        DataError: the package is missing. UsageError: no such task, settings it does not take, or too few problems.
    """
    try:
        reasoning_gym: Any = import_module("reasoning_gym")  # an extra
    except ImportError:
        raise DataError("reasoning-gym is not installed", fix="pip install reasoning-gym") from None
    if task not in (known := list(reasoning_gym.factory.DATASETS)):
        raise UsageError(f"no reasoning-gym task `{task}`" + nearest(task, known))
    takes = [field.name for field in fields(reasoning_gym.factory.DATASETS[task][1]) if field.name not in _OURS]
    if unknown := [name for name in settings or {} if name not in takes]:
        raise UsageError(f"{task} has no setting `{unknown[0]}`" + nearest(unknown[0], takes), fix=", ".join(takes))
    tries = 100 * size + 1000
    try:
        made = reasoning_gym.create_dataset(task, size=tries, seed=seed, **(settings or {}))
        made[0]
    except (AssertionError, TypeError, ValueError) as error:
        raise UsageError(f"{task} refuses its settings: {error}") from None
    found: list[tuple[str, str]] = []
    asked: set[str] = set()
    for number in range(tries):
        question, answer = str((problem := made[number])["question"]), str(problem["answer"])
        if _kept_for_evaluation(question) == unseen and question not in asked:
            found.append((question, answer))
            asked |= {question} if unseen else set()
        if len(found) == size:
            return found
    raise UsageError(
        f"{task} with these settings has only {len(found)} problems to ask", fix="fewer, or wider settings"
    )


def _kept_for_evaluation(question: str) -> bool:
    """Whatever the case and order of its words: 2 + 3 and 3 + 2 are on one side."""
    words = " ".join(sorted(re.findall(r"\w+", question.lower())))
    return hashlib.sha256(words.encode()).digest()[0] % 8 == 0
