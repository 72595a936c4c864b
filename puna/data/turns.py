"""One message of a row, by whatever names it is written, as the chat templates read it."""

from collections.abc import Mapping
from typing import Any

from puna.data.row_files import parse_json
from puna.errors import DataError
from puna.tokenizer.chat.messages import plain_messages

Messages = list[dict[str, Any]]
_ROLES = {
    **dict.fromkeys(("human", "prompter", "user"), "user"), **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("gpt", "bot", "chatgpt", "model", "assistant", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response", "tool"), "tool"),
}  # fmt: skip
_CALLS = ("function_call", "tool_call")


def message(turn: Any, where: str) -> dict[str, Any]:
    """One message, by OpenAI's names (role, content) or ShareGPT's (from, value).

    `weight` 0 (OpenAI's) and `train` false take it out of training.

    Raises:
        DataError: no role or text, a weight between, or anything else a message cannot have.
    """
    if not isinstance(turn, Mapping):
        raise DataError(f"a message is {type(turn).__name__}, not an object", where=where)
    found = ", ".join(map(str, turn))
    turn = {key: value for key, value in turn.items() if value is not None}
    role, content = turn.pop("role", turn.pop("from", None)), turn.pop("content", turn.pop("value", None))
    calls, called = turn.pop("tool_calls", None), turn.pop("function_call", None)  # OpenAI's; its first spelling
    if role in _CALLS:  # ShareGPT: the call is the text, one or a list
        content, called = "", parse_json(content, where) if isinstance(content, str) else content
    if called is not None:
        calls = called if isinstance(called, list) else [called]
    if not isinstance(role, str) or (content is None and not calls):
        raise DataError(f"a message without role and text (found: {found})", where=where)
    train = _trained(turn.pop("weight", None), turn.pop("train", None), where)
    said = {"role": _ROLES.get(role, role), "content": content, **({"tool_calls": calls} if calls else {})}
    try:
        return plain_messages([{**turn, **train, **said}])[0]
    except DataError as error:
        raise DataError(error.what.replace("message 0", "a message"), where=where, fix=error.fix) from None


def exchange(question: str, answer: str) -> Messages:
    """A question and its answer as two messages."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _trained(weight: Any, train: Any, where: str) -> dict[str, bool]:
    for name, value in (("weight", weight), ("train", train)):
        if value not in (None, 0, 1):
            why = "a message is trained (1, true) or not (0, false)"
            raise DataError(f"a message of {name} {value!r}", where=where, cause=why)
    if weight == 0 or train == 0:
        return {"train": False}
    return {"train": True} if train == 1 else {}
