"""Rows of chat data in the shapes people have, as messages: Alpaca, ShareGPT, OpenAI's, columns, raw text."""

from collections.abc import Mapping
from typing import Any, Literal

from puna.data.columns import Columns, pair_messages, system_message, usual_columns
from puna.data.row_files import parse_json
from puna.data.turns import Messages, exchange, message
from puna.errors import DataError
from puna.tokenizer.chat.messages import plain_tools

Row = Mapping[str, Any]
Shape = Literal["alpaca", "sharegpt", "openai", "columns", "text"]

_TURNS = {"openai": ("messages",), "sharegpt": ("conversations", "conversation")}
_ANSWERS = ("output", "response")
_VERDICTS = ("label", "kto_tag")


def shape_of(row: Row, where: str) -> Shape:
    """The shape a row has by its keys.

    Raises:
        DataError: none that is known, or rows that are no examples to follow: pairs, or answers with a verdict.
    """
    if {"chosen", "rejected"} <= row.keys():
        raise DataError(
            "a pair of answers (chosen, rejected)", where=where, cause="preference data, which is for dpo",
            fix="data.columns={prompt: ..., completion: chosen} learns the chosen answers alone",
        )  # fmt: skip
    if verdicts := [name for name in _VERDICTS if isinstance(row.get(name), bool)]:
        raise DataError(
            f"an answer with a verdict ({verdicts[0]})", where=where, cause="preference data with bad answers in it",
            fix="keep the good rows; data.format=openai, sharegpt or alpaca takes every row",
        )  # fmt: skip
    for shape, names in _TURNS.items():
        if any(_turns(row.get(name), where) for name in names):
            return shape  # type: ignore[return-value]
    if "instruction" in row and any(name in row for name in _ANSWERS):
        return "alpaca"
    if usual_columns(row):
        return "columns"
    if isinstance(row.get("text"), str):
        return "text"
    raise DataError(
        f"no conversation in this row (found: {', '.join(map(str, row))})"[:2000], where=where,
        fix="data.columns={prompt: NAME, completion: NAME}, or {text: NAME} for raw text",
    )  # fmt: skip


def to_messages(row: Row, where: str, shape: Shape | None = None, columns: Columns | None = None) -> Messages:
    """The messages of one row; none of raw text.

    Args:
        shape: null: what `shape_of` says.
        columns: for the shape `columns`; without them the usual names of a pair.

    Raises:
        DataError: not of that shape, naming the keys found.
    """
    shape = shape or shape_of(row, where)
    if shape in _TURNS:
        found = next((turns for name in _TURNS[shape] if (turns := _turns(row.get(name), where))), None)
        if found is None:
            raise _differs(row, where, shape, f"a list in `{_TURNS[shape][0]}`")
        messages = [message(turn, where) for turn in found]
    elif shape == "alpaca":
        messages = _alpaca(row, where)
    elif shape == "columns":
        if not (columns := columns or usual_columns(row)):
            raise _differs(row, where, "columns", "prompt and completion")
        return pair_messages(row, where, columns)
    else:
        return []
    return messages if messages[0]["role"] == "system" else [*system_message(row), *messages]


def to_tools(row: Row, where: str) -> list[dict[str, Any]] | None:
    """The functions in `tools` of one row, a list or its JSON; None where there are none.

    Raises:
        DataError: something else.
    """
    tools = row.get("tools")
    try:
        return plain_tools(parse_json(tools, where) if isinstance(tools, str) and tools else tools or None)
    except DataError as error:
        raise DataError(error.what, where=where, cause="`tools` is not a list of functions", fix=error.fix) from None


def _turns(value: Any, where: str) -> list[Any] | None:
    """A list of messages, or the JSON of one: a cell of CSV holds nothing else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_json(value, where)
    return value if isinstance(value, list) and value else None


def _alpaca(row: Row, where: str) -> Messages:
    """Instruction and output, what is worked on in `input`, and LLaMA-Factory's earlier turns in `history`."""
    answer = next((row[name] for name in _ANSWERS if isinstance(row.get(name), str)), None)
    instruction, given, history = row.get("instruction"), row.get("input") or "", row.get("history") or []
    if not isinstance(instruction, str) or answer is None or not isinstance(given, str):
        raise _differs(row, where, "alpaca", "text in `instruction` and `output`")
    if not all(isinstance(h, list | tuple) and len(h) == 2 and all(isinstance(x, str) for x in h) for h in history):
        raise DataError("`history` is no list of pairs of texts", where=where)
    earlier = [said for question, answered in history for said in exchange(question, answered)]
    return [*earlier, *exchange(f"{instruction}\n\n{given}" if given else instruction, answer)]


def _differs(row: Row, where: str, shape: str, wanted: str) -> DataError:
    return DataError(
        f"not of the format {shape}: no {wanted} (found: {', '.join(map(str, row))})"[:2000], where=where,
        cause="rows of several formats in one file, or another data.format", fix="a file for each format: data.sources",
    )  # fmt: skip
