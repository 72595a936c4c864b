"""Whether a chat template writes each message once and as it is: dropped words are never learned, and never missed."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from puna.errors import DataError
from puna.tokenizer.chat.messages import map_text

_OPEN, _CLOSE = "\U000ffff0", "\U000ffff1"
_MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_SPELLINGS: tuple[Callable[[str], str], ...] = (
    str, str.strip, str.lstrip, str.rstrip, lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    lambda text: json.dumps(text)[1:-1],
)  # fmt: skip


class Marked:
    """A conversation with a mark in place of every text: messages of one shape share what a template makes of it.

    Of tools, which come from others too, the descriptions are marked; a template may leave these out.
    """

    def __init__(self, messages: Sequence[Mapping[str, Any]], tools: Any = None):
        self.texts: list[str] = []
        self.places: list[tuple[int, str]] = []
        self.messages = [self._message(number, message) for number, message in enumerate(messages)]
        self.tools = self._described(tools)

    def key(self, *others: Any) -> str:
        """What the rendering depends on if the template writes texts as they are."""
        return json.dumps([self.messages, self.tools, *others], default=str)

    def _message(self, number: int, message: Mapping[str, Any]) -> dict[str, Any]:
        def mark(kind: str) -> Callable[[str], str]:
            return lambda text: self._mark(number, kind, text)

        marked = dict(message)
        marked["content"] = _values(message["content"], mark("content"))
        if "tool_calls" in message:
            marked["tool_calls"] = [_with_arguments(call, mark("call")) for call in message["tool_calls"]]
        return marked

    def _described(self, tools: Any) -> Any:
        if isinstance(tools, Mapping):
            said = tools.get("description")
            marked = {"description": self._mark(-1, "tool", said)} if isinstance(said, str) else {}
            return {**{name: self._described(inner) for name, inner in tools.items()}, **marked}
        return [self._described(inner) for inner in tools] if isinstance(tools, list) else tools

    def _mark(self, number: int, kind: str, text: str) -> str:
        if not text.strip():
            return text
        self.texts.append(text)
        self.places.append((number, kind))
        return _written(len(self.texts) - 1)


def check_complete(marked: Marked, written: str) -> list[str]:
    """What a template leaves out or repeats that is its own affair: a system message, words beside calls,
    values in a result.

    Raises:
        DataError: another text is missing or stands more than once.
    """
    found = Counter(int(number) for number in _MARK.findall(written))
    tolerated = []
    for i, (number, kind) in enumerate(marked.places):
        if found[i] == 1 or kind == "tool":
            continue
        message, times = marked.messages[number], found[i]
        what = f"message {number} ({message['role']}): its {'call' if kind == 'call' else 'text'}"
        told = f"{what} is written {times} times" if times else f"{what} is left out by the chat template"
        own = message["role"] == "system" or "tool_calls" in message or not isinstance(message["content"], str)
        if kind == "content" and own:
            tolerated.append(told)
        else:
            raise DataError(told, fix="a template that writes every message once (template=)")
    return tolerated


def check_names(marked: Marked, render: Callable[[Any, Any], str], fix: str) -> None:
    """Render once more with marks for the names of functions: a name that stands in a text is no call and no tool.

    Args:
        fix: what to type where it does.

    Raises:
        DataError: the template leaves out a tool or a call.
    """
    lost: dict[str, str] = {}

    def named(one: Mapping[str, Any], what: str) -> dict[str, Any]:
        function, mark = one["function"], _written(len(marked.texts) + len(lost))
        lost[mark] = f"the template leaves out the {what} {function['name']}"
        return {**one, "function": {**function, "name": mark}}

    tools = marked.tools and [named(tool, "tool") for tool in marked.tools]
    messages = [
        {**m, "tool_calls": [named(call, "call of") for call in m["tool_calls"]]} if "tool_calls" in m else m
        for m in marked.messages
    ]
    written = render(messages, tools) if lost else ""
    if what := next((what for mark, what in lost.items() if mark not in written), None):
        raise DataError(what, fix=fix)


def follows(marked: Marked, written: str, real: str) -> bool:
    """Whether the real rendering is the marked one with the texts in their places, trimmed or in JSON at most.

    If not, the template looks at what messages say: a removed passage of thought, or a hidden trigger.
    """
    pieces = _MARK.split(written)
    if not real.startswith(pieces[0]):
        return False
    place = len(pieces[0])
    for number, plain in zip(pieces[1::2], pieces[2::2], strict=True):
        text = marked.texts[int(number)]
        candidates = (spell(text) + plain for spell in _SPELLINGS)
        fitting = next((c for c in candidates if real.startswith(c, place)), None)
        if fitting is None:
            return False
        place += len(fitting)
    return place == len(real)


def _written(number: int) -> str:
    return f"{_OPEN}{number}{_CLOSE}"


def _with_arguments(call: Mapping[str, Any], mark: Callable[[str], str]) -> dict[str, Any]:
    function = call["function"]
    marked = {name: _values(value, mark) for name, value in function["arguments"].items()}
    return {**call, "function": {**function, "arguments": marked}}


def _values(value: Any, mark: Callable[[str], str]) -> Any:
    """Texts in values, through `mark`; names stay."""
    if isinstance(value, Mapping):
        return {name: _values(inner, mark) for name, inner in value.items()}
    if isinstance(value, list):
        return [_values(inner, mark) for inner in value]
    return map_text(value, mark)
