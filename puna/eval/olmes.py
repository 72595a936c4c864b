"""Requests written out by a harness, one a line, as OLMES publishes them: the prompts of a standard, byte for byte."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from puna.config import nearest
from puna.errors import DataError
from puna.eval.question import Question
from puna.eval.sets import Asked, fingerprint, read_rows, require_package

PREFIX = "olmes:"
_ALONE = 1_000_000  # what is added to a document's number where its answers are scored without the question


def find_requests(name: str, folder: Path | None) -> Path:
    """The file of `olmes:arc_easy/rc_5shot`, or of a path.

    Raises:
        DataError: neither the folder nor the package has it.
    """
    if not name.startswith(PREFIX):
        return Path(name).expanduser()
    wanted = name.removeprefix(PREFIX)
    if folder is None:
        where = require_package() / "oe_eval_tasks"
        files = {f"{p.parent.parent.name}/{p.parent.name}": p for p in sorted(where.glob("*/*/requests.jsonl.gz"))}
    else:
        where = folder
        files = {p.name.split(".")[0].replace("__", "/"): p for p in sorted(folder.rglob("*__*.jsonl*"))}
    if wanted not in files:
        cause = f"it has {', '.join(list(files)[:8])} ..." if files else "no requests"
        raise DataError(f"no requests `{wanted}`" + nearest(wanted, list(files)), where=where, cause=cause)
    return files[wanted]


def read_requests(file: Path, limit: int | None = None) -> Asked:
    """The first `limit` questions of a file of requests.

    Raises:
        DataError: rows of another shape.
    """
    documents: dict[int, list[Mapping[str, Any]]] = {}
    alone: dict[int, list[Mapping[str, Any]]] = {}
    for row in read_rows(file):
        try:
            number = int(row["doc_id"])
            place = alone if number >= _ALONE else documents
            place.setdefault(number % _ALONE, []).append(row)
        except (KeyError, TypeError, ValueError):
            raise DataError("a row that is not a request", where=file, fix="rows with doc_id, request, label") from None
    chosen = list(documents)[:limit]
    questions = [_question(number, documents[number], alone.get(number, ()), file) for number in chosen]
    return Asked(questions, fingerprint([file]))


def _question(number: int, rows: list[Mapping[str, Any]], alone: Iterable[Mapping[str, Any]], file: Path) -> Question:
    try:
        rows, alone = (sorted(each, key=lambda row: int(row.get("idx", 0))) for each in (rows, alone))
        asked = [row["request"] for row in rows]
        if alone and len(alone) != len(rows):
            what = f"request {number} has {len(rows)} answers, and {len(alone)} of them without the question"
            raise DataError(what, where=file, fix="a whole file")
        gold = _gold(rows[0].get("label"), len(asked), number, file)
        return Question(
            str(rows[0].get("native_id", number)),
            tuple(each["context"] for each in asked),
            tuple(each["continuation"] for each in asked),
            gold=gold,
            raw=_last(asked[gold]["context"]) + asked[gold]["continuation"],
            alone=tuple(row["request"]["context"] for row in alone),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"request {number} has no {error}", where=file, fix="likelihood requests") from None


def _last(context: str) -> str:
    """The question behind the examples; of a question in paragraphs the last one, too."""
    return context.rpartition("\n\n")[2]


def _gold(label: Any, answers: int, number: int, file: Path) -> int:
    """Which answer is right; of one answer alone that is the one, whatever its label."""
    if answers == 1:
        return 0
    if not str(label).isdecimal() or int(label) >= answers:
        raise DataError(f"request {number} has the label {label!r} for {answers} answers", where=file,
                        fix="the place of the right answer, from 0")  # fmt: skip
    return int(label)
