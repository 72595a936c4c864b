"""`[f(a=1, b='x'), g()]`: calls in Python's spelling, read by hand. Python's own parser is not made for strangers."""

import math
import re
from typing import Any

from puna.tokenizer.chat.messages import NAME

_MAX_DEPTH = 32
_TOKEN = re.compile(
    rf"""\s*(?:
    (?P<text>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|
    (?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?![\w.])|
    (?P<name>{NAME})|
    (?P<mark>[\[\](){{}}=,])
    |(?P<colon>:))""",
    re.VERBOSE | re.DOTALL | re.ASCII,
)
_CONSTANTS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "0": "\0", "\n": ""}
_ESCAPED |= {c: c for c in "\\'\"/"}


def python_calls(text: str) -> list[dict[str, Any]]:
    """The calls of the list that `text` is: literals by name, nothing evaluated.

    Raises:
        ValueError: it is something else.
    """
    if not text.startswith("["):
        return []
    reader = _Reader(text)
    calls = reader.items("]", reader.call)
    if reader.place < len(text):
        raise ValueError("more than a list")
    return calls


class _Reader:
    """A place in a text; each method reads one thing and moves on, or raises ValueError."""

    def __init__(self, text: str):
        self.text, self.place, self.depth = text.rstrip(), 0, 0
        self.take("[")

    def next(self) -> tuple[str, str]:
        """Kind and spelling of the next token."""
        found = _TOKEN.match(self.text, self.place)
        if found is None or found.lastgroup is None:
            raise ValueError("not Python")
        self.place = found.end()
        return found.lastgroup, found[found.lastgroup]

    def take(self, wanted: str) -> None:
        if self.next()[1] != wanted:
            raise ValueError(f"no {wanted}")

    def ends(self, mark: str) -> bool:
        """Whether `mark` comes next, and past it if so."""
        place = self.place
        kind, found = self.next()
        if kind == "mark" and found == mark:
            return True
        self.place = place
        return False

    def items(self, closing: str, read: Any) -> list[Any]:
        """What `read` reads between commas up to `closing`."""
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise ValueError("too deep")
        found = []
        while not self.ends(closing):
            found.append(read())
            if self.ends(closing):
                break
            self.take(",")
        self.depth -= 1
        return found

    def call(self) -> dict[str, Any]:
        kind, name = self.next()
        if kind != "name":
            raise ValueError("no call")
        self.take("(")
        return {"name": name, "arguments": _unique(self.items(")", self.argument))}

    def argument(self) -> tuple[str, Any]:
        kind, name = self.next()
        self.take("=")
        if kind != "name":
            raise ValueError("an argument without a name")
        return name, self.value()

    def pair(self) -> tuple[str, Any]:
        kind, key = self.next()
        self.take(":")
        if kind != "text":
            raise ValueError("a key that is no text")
        return _unescaped(key), self.value()

    def value(self) -> Any:
        kind, found = self.next()
        if kind == "text":
            return _unescaped(found)
        if kind == "number":
            return _number(found)
        if kind == "name" and found in _CONSTANTS:
            return _CONSTANTS[found]
        if kind == "mark" and found == "[":
            return self.items("]", self.value)
        if kind == "mark" and found == "{":
            return _unique(self.items("}", self.pair))
        raise ValueError("not a literal")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def _number(text: str) -> int | float:
    number = float(text) if re.search("[.eE]", text) else int(text)
    if not math.isfinite(number):
        raise ValueError("no finite number")
    return number


def _unescaped(quoted: str) -> str:
    """The text of a Python or JSON literal; an escape that neither knows stays as it is written."""

    def one(found: re.Match[str]) -> str:
        code = found[1]
        return chr(int(code[1:], 16)) if code[0] in "xuU" and len(code) > 1 else _ESCAPED.get(code, found[0])

    return _ESCAPE.sub(one, quoted[1:-1]).encode("utf-16", "surrogatepass").decode("utf-16")
