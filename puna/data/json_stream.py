"""JSON values out of a file larger than memory: the members of one list, or values one after another."""

import codecs
import re
from collections.abc import Iterator
from json.decoder import JSONDecodeError, JSONDecoder
from typing import Any, BinaryIO, NoReturn

from puna.errors import DataError

_CHUNK = 1 << 16
_SPACE = re.compile(r"[ \t\n\r]*")


def read_values(stream: BinaryIO, name: str, longest: int) -> Iterator[Any]:
    """Each value; about one is in memory at a time.

    Args:
        name: of the file, for errors.
        longest: characters of a value beyond which the file is refused.

    Raises:
        DataError: not JSON, cut short, not UTF-8, or with a value that is too long; with the line where it begins.
    """
    text = _Text(stream, name, longest)
    listed = text.peek() == "["
    if listed:
        text.step()
    while (mark := text.peek()) and not (listed and mark == "]"):
        yield text.value()
        if listed and text.peek() == ",":
            text.step()
            if text.peek() == "]":
                text.refuse("a comma before the end of the list")
        elif listed and text.peek() not in ("]", ""):
            text.refuse("no comma between two rows")
    if listed:
        if not mark:
            text.refuse("the list has no end: the file is cut short")
        text.step()
        if text.peek():
            text.refuse("more after the end of the list")


class _Text:
    """The file from `place` on, as much of it as was needed so far."""

    def __init__(self, stream: BinaryIO, name: str, longest: int):
        self.stream, self.name, self.longest = stream, name, longest
        self.text, self.place, self.line, self.ended = "", 0, 1, False
        self.utf8, self.json = codecs.getincrementaldecoder("utf-8-sig")(), JSONDecoder()
        self.read_lines = 1

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            found = _SPACE.match(self.text, self.place)
            self._go_to(found.end() if found else self.place)
            if self.place < len(self.text):
                return self.text[self.place]
            if self.ended:
                return ""
            self._read(_CHUNK)

    def step(self) -> None:
        self._go_to(self.place + 1)

    def value(self) -> Any:
        while True:
            try:
                value, end = self.json.raw_decode(self.text, self.place)
            except JSONDecodeError as error:
                if self.ended or (error.pos < len(self.text) - 16 and not error.msg.startswith("Unterminated")):
                    self.refuse(f"not JSON: {error.msg}, {error.pos - self.place} characters into the row")
            except (ValueError, RecursionError) as error:
                self.refuse(f"not JSON: {error}")
            else:
                if end < len(self.text) or self.ended:  # a number at the very end may go on
                    self._go_to(end)
                    return value
            if len(self.text) - self.place > self.longest:
                self.refuse(f"a row of more than {self.longest >> 20} MB")
            self._read(len(self.text) - self.place)  # twice as much each time keeps a long row linear

    def refuse(self, what: str) -> NoReturn:
        raise DataError(what, where=f"{self.name}:{self.line}")

    def _go_to(self, place: int) -> None:
        self.line += self.text.count("\n", self.place, place)
        self.place = place

    def _read(self, size: int) -> None:
        chunk = self.stream.read(max(_CHUNK, size))
        where, lines = f"{self.name}:", chunk.count(b"\n")
        if 0 in chunk:
            where += str(self.read_lines + chunk.count(b"\n", 0, chunk.index(0)))
            raise DataError("a NUL byte", where=where, cause="a binary or damaged file, or UTF-16")
        try:
            decoded = self.utf8.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            where += str(self.read_lines + error.object.count(b"\n", 0, error.start))
            raise DataError("not UTF-8", where=where, cause="another encoding, such as Latin-1") from None
        self.text, self.place, self.ended = self.text[self.place :] + decoded, 0, not chunk
        self.read_lines += lines
