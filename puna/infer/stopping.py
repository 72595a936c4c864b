"""Where an answer ends: at an id, at a string that may lie across ids, at a length."""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]


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

    def feed(self, ids: Sequence[int]) -> bool:
        """The answer so far, one id longer; whether it ends here."""
        self.text = self.decode(ids)
        self._ends.append(len(self.text))
        places = [place for string in self.strings if (place := self.text.find(string)) >= 0]
        self.found = bool(places)
        self.text = self.text[: min(places)] if places else self.text
        sure = len(self.text) - (0 if self.found else self._pending())
        self.certain = sum(end <= sure for end in self._ends)
        return self.found

    def _pending(self) -> int:
        """Characters at the end that may still become part of a stop string, or are half of a character."""
        broken = len(self.text) - len(self.text.rstrip("\ufffd"))
        started = (n for s in self.strings for n in range(len(s) - 1, 0, -1) if self.text.endswith(s[:n]))
        return max(broken, max(started, default=0))
