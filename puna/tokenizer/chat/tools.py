"""Calls of tools as Llamas write them, read back. What is no call stays text; nothing is evaluated, nothing raises.

Llama 3.1 writes `{"name": ..., "parameters": {...}}`, `<function=name>{...}</function>` where it is told to, and
`name.call(query="...")` or code after <|python_tag|>; Llama 3.2 and 3.3 also `[f(a=1), g()]` (Meta's prompt formats).
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from puna.errors import DataError
from puna.tokenizer.chat.messages import NAME, plain_call
from puna.tokenizer.chat.pythonic import python_calls

CODE = "code_interpreter"
_LONGEST = 1 << 20
_KEYS = {"id", "type", "name", "parameters", "arguments", "function"}
_BETWEEN = re.compile(r"[\s;,]*")
_FUNCTION = re.compile(rf"<function=({NAME})>?\s*")
_BUILT_IN = re.compile(r'([\w-]{1,128})\.call\((\w+)="(.*)"\)', re.DOTALL)


def read_calls(text: str, tagged: bool = False) -> list[dict[str, Any]]:
    """The calls that `text` consists of, as a message's `tool_calls`; none where it is anything else.

    Args:
        tagged: `text` came after <|python_tag|>, so that what is no other call is code to run.
    """
    readers: list[Callable[[str], list[Any]]] = [_json_calls, _function_calls, python_calls]
    for read in [*readers, _code] if tagged else readers:
        try:
            if len(text) <= _LONGEST and (calls := read(text.strip())):
                return [plain_call(call) for call in calls]
        except (ValueError, RecursionError, DataError):
            continue
    return []


def _json_calls(text: str) -> list[Any]:
    """Objects one after another, or a list of them."""
    calls: list[Any] = []
    place = 0
    while text[:1] in ("{", "[") and place < len(text):
        found, place = _json(text, place)
        calls += found if isinstance(found, list) else [found]
        place = _end(_BETWEEN, text, place)
    return list(map(_named, calls))


def _named(call: Any) -> dict[str, Any]:
    """A call with its `arguments`, which Llama calls parameters."""
    if not isinstance(call, Mapping) or not call.keys() <= _KEYS:
        raise ValueError("an object, but no call")
    if isinstance(call.get("function"), Mapping):
        return _named(call["function"])
    arguments = call.get("parameters", call.get("arguments"))
    if arguments is None:
        raise ValueError("a call without arguments")
    return {"name": call.get("name"), "arguments": arguments}


def _function_calls(text: str) -> list[Any]:
    calls: list[Any] = []
    place = 0
    while opened := _FUNCTION.match(text, place):
        arguments, place = _json(text, opened.end())
        calls.append({"name": opened[1], "arguments": arguments})
        place = _end(re.compile(r"\s*</function>[\s;,]*"), text, place)
    if place < len(text):
        raise ValueError("more than calls")
    return calls


def _code(text: str) -> list[Any]:
    """A built-in tool's call, whose one argument is written as it is; else code."""
    if built_in := _BUILT_IN.fullmatch(text):
        return [{"name": built_in[1], "arguments": {built_in[2]: built_in[3]}}]
    return [{"name": CODE, "arguments": {"code": text}}] if text else []


def _json(text: str, place: int) -> tuple[Any, int]:
    return json.JSONDecoder(parse_constant=_no_number).raw_decode(text, place)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _end(pattern: re.Pattern[str], text: str, place: int) -> int:
    if found := pattern.match(text, place):
        return found.end()
    raise ValueError("something else follows")
