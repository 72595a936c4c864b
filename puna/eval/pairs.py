"""Text to score as ids: a context and its continuation, long texts in windows. The rules of lm-eval's HFLM."""

from collections.abc import Sequence
from typing import NamedTuple

from puna.errors import DataError
from puna.tokenizer.tokenizer import Tokenizer


class Pair(NamedTuple):
    """A context, never empty, and what is scored after it."""

    context: list[int]
    continuation: list[int]


class Encoder:
    """Encodes for a model of `max_seq_len`.

    Args:
        special: control strings in a text become control ids, as a rendered chat template needs.
    """

    def __init__(self, tokenizer: Tokenizer, max_seq_len: int, *, special: bool = False):
        self.tokenizer, self.special = tokenizer, special
        self.room = max_seq_len + 1  # the last id is predicted, never read
        self.cut = 0
        """How many contexts have lost their beginning."""
        bos = tokenizer.named_id("bos_token")
        self.prefix = tokenizer.eos_id if bos is None else bos
        """Stands before a text that has no context: BOS, or EOS where there is none."""

    def ids(self, text: str) -> list[int]:
        """`text`, after BOS where the tokenizer's config asks for it and the text does not bring it."""
        return self.batch([text])[0]

    def batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`ids` of many texts, on all cores."""
        rows = self.tokenizer.encode_batch(texts, special=self.special)
        return [self._begun(row) for row in rows] if self.tokenizer.adds_bos else rows

    def pairs(self, asked: Sequence[tuple[str, str]]) -> list[Pair]:
        """(context, continuation) texts as ids. Spaces that end a context belong to the continuation; both are
        encoded together and then split, so a token is never cut where the text would not be.

        Raises:
            DataError: a continuation without any id.
        """
        moved = [_spaces_moved(*each) for each in asked]
        distinct = list(dict.fromkeys(context for context, _ in moved))  # choices share theirs
        contexts = dict(zip(distinct, self.batch(distinct), strict=True))
        wholes = self.batch([context + continuation for context, continuation in moved])
        return [self._pair(*each, contexts, whole) for each, whole in zip(moved, wholes, strict=True)]

    def windows(self, text: str) -> list[Pair]:
        """A text of any length, each id scored once: windows of the whole context, the last moved back to be full."""
        ids, size = self.ids(text), self.room - 1
        found = [Pair([self.prefix], ids[:size])] if ids else []
        for start in range(size, len(ids), size):
            end = min(start + size, len(ids))
            found.append(Pair(ids[max(0, end - size - 1) : start], ids[start:end]))
        return found

    def _pair(self, context: str, continuation: str, contexts: dict[str, list[int]], whole: list[int]) -> Pair:
        if context:
            before = contexts[context]
            rest = whole[len(before) :]
        else:
            rest = whole[1:] if whole[:1] == [self.prefix] else whole
            before = [self.prefix]
        if not rest:
            raise DataError("an answer has no token of its own", where=repr((context[-40:], continuation[:40])))
        return self._cut(before, rest)

    def _cut(self, context: list[int], continuation: list[int]) -> Pair:
        """The end of both that the model can read; of the context at least one id stays."""
        if len(continuation) >= self.room:
            raise DataError(f"an answer of {len(continuation)} tokens", cause=f"the model reads {self.room - 1}")
        room = self.room - len(continuation)
        self.cut += len(context) > room
        return Pair(context[-room:], continuation)

    def _begun(self, row: list[int]) -> list[int]:
        bos = self.tokenizer.bos_id
        return row if row[:1] == [bos] else [bos, *row]


def _spaces_moved(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation
