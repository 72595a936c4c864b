"""What is told of an exam: every metric with its interval and definition, what it was measured on, and each answer."""

import json
import math
from pathlib import Path
from typing import Any

from puna.errors import DataError
from puna.eval.contamination import contaminated, subsets, tokenizer_of_shards
from puna.eval.exam import Marks
from puna.eval.metrics import Measured, gained
from puna.files import make_folder, write_text
from puna.tokenizer.tokenizer import Tokenizer


def scorecard(marks: Marks) -> dict[str, Any]:
    """{"task", "n", "shots", "data", "cut", "model", ..., "metrics": {name: {"value", "low", "high", "definition"}}}"""
    exam = marks.exam
    metrics = {each.metric: {**interval(each), "definition": each.about} for each in marks.measured()}
    return {"task": exam.name, "n": len(marks.answers), "shots": exam.shots, "data": exam.asked.fingerprint,
            "cut": marks.cut, **marks.settings, "metrics": metrics}  # fmt: skip


def interval(measured: Measured) -> dict[str, float | None]:
    """One answer alone says nothing of the doubt about a mean: no border, which JSON can write."""
    borders = {"value": measured.value, "low": measured.low, "high": measured.high}
    return {name: x if math.isfinite(x) else None for name, x in borders.items()}


def gain_over(marks: Marks, other: Marks) -> dict[str, Any]:
    """How much better than another model on the same questions."""
    found = gained([each.values for each in other.answers], [each.values for each in marks.answers])
    return {"metric": found.metric, **interval(found)}


def check_shards(shards: Path, tokenizer: Tokenizer) -> None:
    """Raise for what `contamination` could not read.

    Raises:
        DataError: no shards, or their ids are those of another tokenizer.
    """
    if tokenizer_of_shards(shards) != tokenizer.fingerprint:
        raise DataError("ids of another tokenizer", where=shards, cause="shards of another model",
                        fix="the shards this model was trained on")  # fmt: skip


def contamination(marks: Marks, shards: Path, tokenizer: Tokenizer, n: int) -> dict[str, Any]:
    """How much of the questions (with the right answers) lies in the shards, and the scores of Llama 2's subsets.

    Raises:
        DataError: see `check_shards`.
    """
    check_shards(shards, tokenizer)
    shares = contaminated(tokenizer.encode_batch([each.question.raw for each in marks.answers]), shards, n)
    sets = {}
    for name, places in subsets(shares).items():
        sets[name] = {"n": len(places)}
        if places:
            best = marks.measured(places)[0]
            sets[name] |= {best.metric: interval(best)}
    return {"n_gram": n, "tokens": sum(shares) / len(shares), "touched": sum(s > 0 for s in shares) / len(shares),
            "subsets": sets}  # fmt: skip


def write_answers(folder: Path, marks: Marks) -> Path:
    """One line a question: what was asked, answered and right, and what all of it depends on. The file's path."""
    make_folder(folder)
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in marks.exam.name)
    file = folder / f"{name}.jsonl"
    answers = (each.row(number) | {"settings": marks.settings} for number, each in enumerate(marks.answers))
    rows = (json.dumps(row, ensure_ascii=False) for row in answers)
    write_text(file, "".join(row + "\n" for row in rows))
    return file
