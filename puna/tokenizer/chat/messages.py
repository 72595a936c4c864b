"""What may stand in a conversation (roles, texts, calls of tools, the tools themselves), in one shape or refused."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from puna.errors import DataError

Message = Mapping[str, Any]
"""{"role": ..., "content": text}; an assistant's may have `tool_calls`; `"train": False` takes it out of training."""
Tool = Mapping[str, Any]
"""{"type": "function", "function": {"name", "description", "parameters": JSON schema}}, or the function alone."""

PRIVATE = 0xF0000  # the first supplementary private-use plane: no text has these, no tokenizer a token for them
NAME = r"[A-Za-z0-9_.:/-]{1,128}"
_FORBIDDEN = re.compile("[\ud800-\udfff\U000f0000-\U000ffffd]")
_MAX_DEPTH = 32
_RESULTS = ("tool", "ipython")


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Copies with `content` a text ("" beside calls) and `tool_calls`, where there are any, as Hugging Face has them.

    Raises:
        DataError: a message without text, a role or a call that cannot be one, characters puna needs for itself.
    """
    if isinstance(messages, str | Mapping):
        raise DataError("one message, not a list of them", fix='[{"role": "user", "content": "Hello"}]')
    return [_message(message, f"message {number}") for number, message in enumerate(messages)]


def plain_tools(tools: Sequence[Tool] | None) -> list[dict[str, Any]] | None:
    """Copies, each `{"type": "function", "function": {...}}`; None for no tools.

    Raises:
        DataError: not a list of functions with names.
    """
    if tools is not None and (isinstance(tools, str | Mapping) or not isinstance(tools, Sequence)):
        raise DataError("tools are not a list", fix='[{"type": "function", "function": {"name": ..., ...}}]')
    return [_tool(tool, f"tool {number}") for number, tool in enumerate(tools or ())] or None


def plain_call(call: Any, where: str = "a call") -> dict[str, Any]:
    """`{"type": "function", "function": {"name": ..., "arguments": {...}}}` of a call in any of its spellings.

    Raises:
        DataError: no name, or arguments that are no JSON object.
    """
    function = call.get("function", call) if isinstance(call, Mapping) else None
    arguments = function.get("arguments", {}) if isinstance(function, Mapping) else None
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(function, Mapping) or not isinstance(arguments, Mapping):
        raise DataError(f"{where} has no function with arguments by name", fix='{"name": ..., "arguments": {...}}')
    plain = {"name": _name(function.get("name"), where), "arguments": map_text(arguments, str)}
    _check_texts(plain, where)
    kept = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**kept, "type": "function", "function": plain}


def map_text(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with every text in it, names too, through `change`."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {map_text(key, change): map_text(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [map_text(inner, change) for inner in value]
    return value


def texts(value: Any, depth: int = 0) -> Iterator[str]:
    """Every text in `value`, names too."""
    if depth > _MAX_DEPTH:
        raise DataError(f"values within values, more than {_MAX_DEPTH} deep")
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from texts(inner, depth + 1)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts(inner, depth + 1)


def _message(message: Message, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise DataError(f"{where} is a {type(message).__name__}, not an object")
    role, calls = message.get("role"), message.get("tool_calls")
    content = _content(message.get("content"), bool(calls), role)
    if not isinstance(role, str) or content is None:
        raise DataError(f"{where} has no text in `role` and `content`")
    if not re.fullmatch(r"[A-Za-z0-9_ -]{1,64}", role):
        raise DataError(f"{where} has the role {role[:80]!r}")
    if calls and (role != "assistant" or not isinstance(calls, list | tuple)):
        raise DataError(f"{where} has tool_calls that are no list, or not the assistant's")
    _check_texts(message, where)
    others = {key: value for key, value in message.items() if key != "tool_calls"}
    called = {"tool_calls": [plain_call(call, f"{where}, a call,") for call in calls]} if calls else {}
    return {**others, "content": content, **called}


def _content(content: Any, called: bool, role: Any) -> Any:
    """The text of a message; a tool's result may be an object. None where there is neither."""
    if content is None and called:
        return ""
    if isinstance(content, list | tuple):
        parts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content
        ]
        return None if not all(isinstance(part, str) for part in parts) else "".join(map(str, parts))
    allowed = str | Mapping if role in _RESULTS else str
    return content if isinstance(content, allowed) else None


def _tool(tool: Any, where: str) -> dict[str, Any]:
    wrapped = isinstance(tool, Mapping) and isinstance(tool.get("function"), Mapping)
    function = tool["function"] if wrapped else tool
    if not isinstance(function, Mapping):
        raise DataError(f"{where} is not an object", fix='{"type": "function", "function": {"name": ..., ...}}')
    _name(function.get("name"), where)
    _check_texts(tool, where)
    return dict(tool) if wrapped else {"type": "function", "function": dict(function)}


def _name(name: Any, where: str) -> str:
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        raise DataError(f"{where} has the name {str(name)[:80]!r}", cause="a function's is letters, digits and _.:/-")
    return name


def _check_texts(value: Any, where: str) -> None:
    for text in texts(value):
        if found := _FORBIDDEN.search(text):
            private = ord(found.group()) >= PRIVATE
            what = "private-use characters of plane 15" if private else "half a character (a lone surrogate)"
            raise DataError(f"{where} holds {what}")
