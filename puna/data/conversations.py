"""Rows of chat data in the shapes people have, as messages: OpenAI, ShareGPT, Alpaca, prompt and completion columns."""

import gzip
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, PositiveInt

from puna.config import Config, UserPath, nearest, nearest_path
from puna.data.dialogues import read_dialogues
from puna.errors import DataError, UsageError
from puna.tokenizer.chat.messages import plain_messages, plain_tools

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "system": "system", "user": "user",
          "assistant": "assistant", "tool": "tool", "function_call": "assistant", "observation": "tool"}  # fmt: skip
_PAIRS = (("prompt", "completion"), ("question", "answer"), ("prompt", "response"), ("input", "output"))
_OURS = ("seed", "size")  # what puna gives every task itself
SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")


def _named(value: Any) -> Any:
    return {name: {} for name in value} if isinstance(value, list | tuple) else value


Tasks = Annotated[dict[str, dict[str, int | float | bool | str]], BeforeValidator(_named)]
"""reasoning-gym tasks with their settings, `{chain_sum: {max_terms: 3}}`, or a list of names."""


class ChatSource(Config):
    """Where conversations come from: a file, a package of small talk, or procedural tasks of reasoning-gym."""

    path: UserPath | None = None
    """JSONL, JSON or Parquet with `messages`, `conversations`, instruction/input/output or prompt/completion."""
    reasoning_gym: Tasks = {}
    """Tasks such as chain_sum, by name or with settings: {chain_sum: {max_terms: 3}}."""
    packages: list[Literal["chatterbot"]] = []
    """Small talk that comes as a Python package: chatterbot."""
    size: int = Field(default=1000, ge=1, lt=1 << 23)
    """Problems of each task."""
    task_seed: int = Field(default=0, ge=0, lt=1 << 23)
    """The first problem; evaluation asks others."""
    limit: PositiveInt | None = None
    """Only the first so many conversations."""


class Conversation(NamedTuple):
    """Messages, where they came from (`file:line`), and the tools the assistant may call."""

    where: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    source: str = ""
    """Which part of a mixture it belongs to."""
    text: str | None = None
    """Raw text instead of messages: every id of it is trained."""


def read_conversations(source: ChatSource) -> Iterator[Conversation]:
    """The conversations of the source, all or the first `limit`.

    Raises:
        UsageError: nothing given. DataError: a file, a row or a task that cannot be read.
    """
    if not given(source):
        raise UsageError("no conversations given", fix="data.path=FILE.jsonl, or data.reasoning_gym=[chain_sum]")
    yield from islice(_all(source), source.limit)


def given(source: ChatSource) -> bool:
    """Whether the source names any conversations."""
    return bool(source.path or source.packages or source.reasoning_gym)


def _all(source: ChatSource) -> Iterator[Conversation]:
    if source.path is not None:
        for where, row in _rows(source.path):
            yield Conversation(where, to_messages(row, where), to_tools(row, where))
    for package in source.packages:
        for where, said in read_dialogues(package):
            pairs = zip(said[::2], said[1::2], strict=True)
            yield Conversation(where, [message for pair in pairs for message in _turns(*pair)])
    for task, settings in source.reasoning_gym.items():
        for number, (question, answer) in enumerate(problems(task, source.size, source.task_seed, settings)):
            yield Conversation(f"{task}:{number}", _turns(question, answer))


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


def to_messages(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The messages of one row, whatever its shape.

    Raises:
        DataError: no known shape, naming the keys found.
    """
    turns = row.get("messages") or row.get("conversations")
    if isinstance(turns, list):
        return [_message(turn, where) for turn in turns]
    if "instruction" in row and "output" in row:
        question = f"{row['instruction']}\n\n{row['input']}" if row.get("input") else str(row["instruction"])
        system = [{"role": "system", "content": str(row["system"])}] if row.get("system") else []
        return [*system, *_turns(question, str(row["output"]))]
    for question, answer in _PAIRS:
        if isinstance(row.get(question), str) and isinstance(row.get(answer), str):
            return _turns(row[question], row[answer])
    raise DataError(
        f"no conversation in this row (found: {', '.join(map(str, row))})", where=where,
        fix="keys messages, conversations, instruction and output, or prompt and completion",
    )  # fmt: skip


def to_tools(row: Mapping[str, Any], where: str) -> list[dict[str, Any]] | None:
    """The functions in `tools` of one row, a list or its JSON; None where there are none.

    Raises:
        DataError: something else.
    """
    tools = row.get("tools")
    try:
        return plain_tools(_parse(tools.encode(), where) if isinstance(tools, str) and tools else tools or None)
    except DataError as error:
        raise DataError(error.what, where=where, cause="`tools` is not a list of functions", fix=error.fix) from None


def _turns(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _message(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise DataError(f"a message is {type(turn).__name__}, not an object", where=where)
    found = ", ".join(map(str, turn))
    turn = {key: value for key, value in turn.items() if value is not None}
    role, content = turn.pop("role", turn.pop("from", None)), turn.pop("content", turn.pop("value", None))
    calls = turn.pop("tool_calls", None)
    if role == "function_call":  # ShareGPT: the call is the text, one or a list
        called = _parse(content.encode(), where) if isinstance(content, str) else content
        content, calls = "", called if isinstance(called, list) else [called]
    if not isinstance(role, str) or (content is None and not calls):
        raise DataError(f"a message without role and text (found: {found})", where=where)
    if not isinstance(turn.get("train"), bool):
        turn.pop("train", None)
    message = {**turn, "role": _ROLES.get(role, role), "content": content, **({"tool_calls": calls} if calls else {})}
    try:
        return plain_messages([message])[0]
    except DataError as error:
        raise DataError(error.what.replace("message 0", "a message"), where=where, fix=error.fix) from None


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not path.name.endswith(SUFFIXES):
        raise DataError("not a file of conversations", where=path, cause=f"puna reads {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256)
            listed = (_own(row) for batch in batches for row in batch.to_pylist())
            rows = ((f"{path}:{i}", row) for i, row in enumerate(listed, 1))
        elif ".jsonl" in path.name:
            lines = enumerate(_open(path), 1)
            rows = ((f"{path}:{i}", _parse(line, f"{path}:{i}")) for i, line in lines if line.strip())
        else:
            listed = _parse(b"".join(_open(path)), str(path))
            rows = ((f"{path}:{i}", row) for i, row in enumerate(listed if isinstance(listed, list) else [listed], 1))
        for where, row in rows:
            if not isinstance(row, Mapping):
                raise DataError(f"a row is {type(row).__name__}, not an object", where=where)
            yield where, row
    except FileNotFoundError:
        raise DataError("no such file" + nearest_path(path), where=path) from None
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"cannot be read: {error}", where=path) from None


def _own(value: Any) -> Any:
    """Less the fields without a value: Parquet gives every object the fields of all rows."""
    if isinstance(value, Mapping):
        return {name: _own(inner) for name, inner in value.items() if inner is not None}
    return [_own(inner) for inner in value] if isinstance(value, list) else value


def _open(path: Path) -> Iterator[bytes]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
        yield from stream


def _parse(raw: bytes, where: str) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}", where=where) from None
