"""Where an answer ends: at an id, at a string that may lie across ids, at a length."""

from bisect import bisect_right
from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
_BROKEN = "\ufffd"


class StopStrings:
    """Watches an answer grow for strings that end it, and tells which of its ids are surely before any of them."""

    def __init__(self, strings: Sequence[str], decode: Decode):
        self.strings, self.decode = strings, decode
        self.text = ""
        """What is decoded; once `found`, only what lies before the string."""
        self.certain = 0
        """How many ids lie before whatever may be, or become, the end."""
        self.found = False
        self._ends: list[int] = []
        self._whole, self._context, self._known = "", 0, 0

    def feed(self, ids: Sequence[int]) -> bool:
        """The answer so far, one id longer; whether it ends here."""
        begin = max(0, len(self._whole) - max(map(len, self.strings)) + 1)  # nothing before it is part of what is new
        self.text = self._read(ids)
        self._add_end(len(self.text))
        places = [place for string in self.strings if (place := self.text.find(string, begin)) >= 0]
        self.found = bool(places)
        self.text = self.text[: min(places)] if places else self.text
        sure = len(self.text) - (0 if self.found else self._pending())
        self.certain = bisect_right(self._ends, sure)
        return self.found

    def _read(self, ids: Sequence[int]) -> str:
        """All text, of which only the end is decoded: after ids whose text is known, since a space may be theirs."""
        known = len(self.decode(ids[self._context : self._known]))
        text = self._whole + self.decode(ids[self._context :])[known:]
        if len(text) > len(self._whole) and not text.endswith(_BROKEN):  # whatever comes, so far it stays
            self._whole, self._context, self._known = text, self._known, len(ids)
        return text

    def _add_end(self, end: int) -> None:
        """Where the text of each id ends. Three bytes of a character are three marks, with the fourth they are one."""
        for i in range(len(self._ends) - 1, -1, -1):
            if self._ends[i] <= end:
                break
            self._ends[i] = end
        self._ends.append(end)

    def _pending(self) -> int:
        """Characters at the end that may still become part of a stop string, or are half of a character."""
        broken = len(self.text) - len(self.text.rstrip(_BROKEN))
        started = (n for s in self.strings for n in range(len(s) - 1, 0, -1) if self.text.endswith(s[:n]))
        return max(broken, max(started, default=0))
