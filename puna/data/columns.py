"""Columns of a table as conversations: which holds the question, which the answer, and texts around them."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from puna.config import Config, nearest
from puna.data.turns import Messages, message
from puna.errors import DataError, UsageError
from puna.tokenizer.chat.messages import plain_messages

Row = Mapping[str, Any]
_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("question", "response"),
          ("query", "response"), ("problem", "solution"), ("input", "output"))  # fmt: skip
_PART = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


class Columns(Config):
    """Which column holds what: its name, or a text with columns in braces, such as `Summarize: {dialogue}`."""

    prompt: str | None = None
    """What the user says; a text, or messages."""
    completion: str | None = None
    """What the assistant answers; of messages those of the completion alone are trained."""
    system: str | None = None
    """The system message; rows in which it is empty have none."""
    messages: str | None = None
    """Whole conversations, in place of prompt and completion."""
    tools: str | None = None
    """The functions that the assistant may call."""
    text: str | None = None
    """Raw text, in place of a conversation: every id of it is trained."""


def check_columns(columns: Columns | None, format: str) -> None:
    """Refuse columns that do not make a conversation, and formats that take none.

    Raises:
        UsageError: so.
    """
    if columns is None:
        return
    given = {name for name in Columns.model_fields if getattr(columns, name) is not None}
    kind = "text" if "text" in given else "openai" if "messages" in given else "columns"
    beside: dict[str, set[str]] = {
        "text": {"text"}, "openai": {"messages", "tools", "system"},
        "columns": {"prompt", "completion", "system", "tools"},
    }  # fmt: skip
    needs = {"columns": {"prompt", "completion"}}.get(kind, set())
    if given - beside[kind] or needs - given:
        raise UsageError(
            f"data.columns has {', '.join(sorted(given)) or 'nothing'}",
            fix="prompt and completion (system, tools), or messages (system, tools), or text alone",
        )
    if format not in ("auto", kind) and not (format == "sharegpt" and kind == "openai"):
        raise UsageError(f"data.format={format} does not go with these columns", fix=f"data.format={kind}, or auto")
    for name in given - {"messages", "tools"}:
        for part in _PART.finditer(getattr(columns, name)):
            if part.group() in ("{", "}") or part[1] == "":
                raise UsageError(f"data.columns.{name} has a brace alone or empty", fix="{COLUMN}, or {{ for a brace")


def shape_of_columns(columns: Columns | None) -> Literal["columns", "openai", "text"] | None:
    """The shape that columns make; None without any."""
    if columns is None:
        return None
    return "text" if columns.text is not None else "openai" if columns.messages is not None else "columns"


def mapped(row: Row, where: str, columns: Columns) -> Row:
    """The row with `messages`, `tools` and `system` under these names.

    Raises:
        DataError: no messages where a column of them is named.
    """
    named = {name: row.get(getattr(columns, name)) for name in ("messages", "tools") if getattr(columns, name)}
    if columns.messages and not named["messages"]:
        raise _lacks(row, where, columns.messages)
    if columns.system:
        named["system"] = _filled(columns.system, row, where, required=False)
    return {**row, **named}


def to_text(row: Row, where: str, columns: Columns | None = None) -> str:
    """The raw text of one row.

    Raises:
        DataError: no such column, or no text in it.
    """
    return _filled((columns and columns.text) or "text", row, where)


def pair_messages(row: Row, where: str, columns: Columns) -> Messages:
    """Prompt and completion, each a text or messages, after the row's `system`.

    Raises:
        DataError: no such columns, or neither text nor messages in them.
    """
    prompt = _side(str(columns.prompt), "user", row, where)
    completion = _side(str(columns.completion), "assistant", row, where)
    prompt = [{**said, "train": False} if said["role"] == "assistant" else said for said in prompt]
    system = [] if prompt[0]["role"] == "system" else system_message(row)
    try:
        return plain_messages([*system, *prompt, *completion])
    except DataError as error:
        raise DataError(error.what, where=where, fix=error.fix) from None


def system_message(row: Row) -> Messages:
    """What stands in `system`, as a message; none where that is empty."""
    said = row.get("system")
    return [{"role": "system", "content": said}] if isinstance(said, str) and said else []


def usual_columns(row: Row) -> Columns | None:
    """Two of the names that prompts and completions usually have, if the row has both."""
    for prompt, completion in _PAIRS:
        if [type(row.get(name)) for name in (prompt, completion)] in ([str, str], [list, list]):
            return Columns(prompt=prompt, completion=completion)
    return None


def _side(name: str, role: str, row: Row, where: str) -> Messages:
    value = row.get(name)
    if isinstance(value, list) and value:
        return [message(turn, where) for turn in value]
    return [{"role": role, "content": _filled(name, row, where)}]


def _filled(name: str, row: Row, where: str, required: bool = True) -> str:
    """The column of that name, or the text with its columns filled in: names alone, nothing is looked up in values."""
    if "{" not in name and "}" not in name:
        return _value(name, row, where, required)
    return "".join(_parts(name, row, where, required))


def _parts(text: str, row: Row, where: str, required: bool) -> Iterator[str]:
    end = 0
    for part in _PART.finditer(text):
        yield text[end : part.start()]
        yield part.group()[0] if part[1] is None else _value(part[1], row, where, required)
        end = part.end()
    yield text[end:]


def _value(name: str, row: Row, where: str, required: bool) -> str:
    value = row.get(name)
    if value is None and not required:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _lacks(row, where, name)
    return str(value)


def _lacks(row: Row, where: str, name: str) -> DataError:
    found = ", ".join(map(str, row))
    return DataError(
        f"no text in column `{name}`{nearest(name, [str(key) for key in row if key != name])} (found: {found})"[:2000],
        where=where, fix="mend the row, or data.columns",
    )  # fmt: skip
