"""Conversations from everywhere: files of any usual shape, the hub's cache, packages, tasks, and mixtures of these."""

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from puna.config import Config, UserPath
from puna.data.chat_shapes import shape_of, to_messages, to_tools
from puna.data.columns import Columns, check_columns, mapped, shape_of_columns, to_text, usual_columns
from puna.data.conversation import Conversation
from puna.data.dialogues import read_dialogues
from puna.data.problems import Tasks, problems
from puna.data.quality.config import SelectConfig
from puna.data.quality.select import select, told
from puna.data.row_files import read_rows
from puna.data.source_files import cached_files, local_files
from puna.data.turns import exchange
from puna.errors import DataError, UsageError
from puna.log import log


class RowSource(Config):
    """Where conversations come from: files, a package of small talk, or procedural tasks of reasoning-gym."""

    path: UserPath | None = None
    """JSONL, JSON, Parquet, Arrow, CSV or TSV: a file, a folder with all below it, or a pattern (rows/*.jsonl)."""
    hub: str | None = None
    """A dataset of the Hugging Face hub, ORG/NAME or ORG/NAME@REVISION, that is in the cache of this machine."""
    file: str | None = None
    """Of a dataset of the hub: which files, as a pattern of their names (main/*.parquet)."""
    split: str | None = None
    """Of a folder or a dataset with several splits in its files' names: train, validation, test or another one."""
    format: Literal["auto", "alpaca", "sharegpt", "openai", "columns", "text"] = "auto"
    """auto takes what the first row of each file is, and says so; rows of another shape are refused."""
    columns: Columns | None = None
    """Which column holds what, {prompt: question, completion: answer}, also as a text around columns."""
    reasoning_gym: Tasks = {}
    """Tasks such as chain_sum, by name or with settings: {chain_sum: {max_terms: 3}}."""
    packages: list[Literal["chatterbot"]] = []
    """Small talk that comes as a Python package: chatterbot."""
    size: int = Field(default=1000, ge=1, lt=1 << 23)
    """Problems of each task. Higher: more to learn from, longer to make."""
    task_seed: int = Field(default=0, ge=0, lt=1 << 23)
    """The first problem; evaluation asks others."""
    limit: PositiveInt | None = None
    """Only the first so many conversations. Lower: sooner ready, less learned."""


class MixedSource(RowSource):
    """A part of a mixture."""

    passes: PositiveFloat = 1.0
    """How often one epoch goes over it. Higher: more weight; above about 4 it is learned by heart. 0.5: half of it."""


class ChatSource(RowSource):
    """Where conversations come from, which of them are kept, and in which proportion they are mixed."""

    sources: dict[str, MixedSource] = {}
    """A mixture: a name for each part, with the same fields and `passes`: {alpaca: {path: a.json, passes: 0.5}}."""
    select: SelectConfig = SelectConfig()


def read_conversations(source: ChatSource, report: dict[str, Any] | None = None) -> Iterator[Conversation]:
    """The conversations of the source (all or the first `limit`) that `select` keeps.

    Args:
        report: is filled with what was kept and dropped, by the time all are read.

    Raises:
        UsageError: nothing given, or fields that do not go together. DataError: a file, a row or a task that cannot
        be read.
    """
    check_source(source)
    selection = select(islice(_all(source), source.limit), source.select)
    yield from selection
    if source.select != SelectConfig():
        log.info("%s", told(selection.report))
    if report is not None:
        report.update(selection.report)


def files_of(source: ChatSource) -> list[Path]:
    """Every file that the conversations are read from, those of installed packages apart, in their order.

    Raises:
        UsageError, DataError: see `read_conversations`.
    """
    check_source(source)
    return [file for part in (source, *source.sources.values()) for file in _files(part)]


def check_source(source: ChatSource) -> None:
    """Refuse what cannot be, before anything is read.

    Raises:
        UsageError: nothing given, or fields that do not go together.
    """
    if not given(source):
        raise UsageError("no conversations given", fix="data.path=FILE.jsonl, or data.reasoning_gym=[chain_sum]")
    for name, part in {
        "data": source,
        **{f"data.sources.{name}": part for name, part in source.sources.items()},
    }.items():
        if name != "data" and not _given(part):
            raise UsageError("no conversations given", where=name, fix=f"{name}.path=FILE.jsonl")
        if part.hub and part.path:
            raise UsageError(f"{name}.path and {name}.hub are given", fix="one of them, or a part of data.sources each")
        if part.file and not part.hub:
            raise UsageError(f"{name}.file is of a dataset of the hub", fix=f"{name}.hub=ORG/NAME, or {name}.path")
        if not (part.hub or part.path) and (part.split or part.columns or part.format != "auto"):
            raise UsageError(f"{name} has split, columns or format, but no file", fix=f"{name}.path=FILE")
        check_columns(part.columns, part.format)


def given(source: ChatSource) -> bool:
    """Whether the source names any conversations."""
    return _given(source) or bool(source.sources)


def passes(source: ChatSource) -> dict[str, float]:
    """How often one epoch goes over the conversations of each name; those outside of a mixture are named ""."""
    return {"": 1.0, **{name: part.passes for name, part in source.sources.items()}}


def _given(source: RowSource) -> bool:
    return bool(source.path or source.hub or source.packages or source.reasoning_gym)


def _all(source: ChatSource) -> Iterator[Conversation]:
    yield from _part(source)
    for name, part in source.sources.items():
        for conversation in islice(_part(part), part.limit):
            yield conversation._replace(source=name)


def _files(source: RowSource) -> list[Path]:
    if source.path is not None:
        return local_files(source.path, source.split)
    return cached_files(source.hub, source.file, source.split) if source.hub is not None else []


def _part(source: RowSource) -> Iterator[Conversation]:
    for file in _files(source):
        yield from _from_file(file, source)
    for package in source.packages:
        for where, said in read_dialogues(package):
            pairs = zip(said[::2], said[1::2], strict=True)
            yield Conversation(where, [message for pair in pairs for message in exchange(*pair)])
    for task, settings in source.reasoning_gym.items():
        for number, (question, answer) in enumerate(problems(task, source.size, source.task_seed, settings)):
            yield Conversation(f"{task}:{number}", exchange(question, answer))


def _from_file(file: Path, source: RowSource) -> Iterator[Conversation]:
    shape = shape_of_columns(columns := source.columns) or (None if source.format == "auto" else source.format)
    optional = [name for name in ("system", "tools") if columns and getattr(columns, name)]
    row: Mapping[str, Any] = {}
    for where, row in read_rows(file):
        if shape is None:
            shape = shape_of(row, where)
            log.info("%s: %s", file, _told(shape, row))
            columns = usual_columns(row) if shape == "columns" else None  # of all its rows
        if columns is not None:
            row = mapped(row, where, columns)
            optional = [name for name in optional if not row.get(name)]
        if shape == "text":
            yield Conversation(where, [], text=to_text(row, where, columns))
        else:
            yield Conversation(where, to_messages(row, where, shape, columns), to_tools(row, where))
    if row and optional:  # a misspelt name would be a column that is empty everywhere
        raise DataError(f"no row has a value for data.columns.{optional[0]}", where=file, cause="a misspelt name")


def _told(shape: str, row: Mapping[str, Any]) -> str:
    if shape == "text":
        return "raw text, every id of it is trained (data.columns names another column)"
    return f"rows of the format {shape} ({', '.join(map(str, row))})"[:200]
