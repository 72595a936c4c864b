"""Ids back to bytes, and bytes to text as they come. Bytes, because an id may be a part of a character."""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import tokenizers

from puna.errors import DataError

_KNOWN = {"ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
_SPACE = "▁"


@cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-in of every byte, inverted."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(moved)}


class Spelling:
    """The bytes behind every id of a tokenizer, by the rules its tokenizer.json decodes with."""

    def __init__(self, engine: tokenizers.Tokenizer, decoder: Mapping[str, Any] | None, where: object):
        """
        Raises:
            DataError: a decoder of another family.
        """
        parts: Sequence[Mapping[str, Any]] = (decoder or {}).get("decoders", [decoder or {}])
        kinds = [part.get("type") for part in parts]
        if not kinds or not set(kinds) <= _KNOWN:
            raise DataError(f"its decoder is {kinds}", where=where, cause="neither byte-level BPE nor SentencePiece")
        self._engine, self._added = engine, engine.get_added_tokens_decoder()
        self._byte_level, self._fallback = "ByteLevel" in kinds, "ByteFallback" in kinds
        self.drops_space = any(_drops_space(part) for part in parts)
        """Whether the space that was put before the text is taken away again."""
        self._cache: dict[int, bytes] = {}

    def join(self, ids: Iterable[int], special: bool) -> bytes:
        """The bytes of `ids` in a row; control ids only if `special`."""
        return b"".join(self.of(i, special) for i in ids)

    def of(self, id: int, special: bool) -> bytes:
        """The bytes of one id."""
        if id in self._added:
            token = self._added[id]
            return token.content.encode() if special or not token.special else b""
        if id not in self._cache:
            self._cache[id] = self._bytes(self._engine.id_to_token(id) or "")
        return self._cache[id]

    def _bytes(self, token: str) -> bytes:
        if self._byte_level:
            table = byte_of_character()
            return bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()
        if self._fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace(_SPACE, " ").encode()


class Stream:
    """Text of ids as they come; see `Tokenizer.stream`."""

    def __init__(self, spelling: Spelling, special: bool):
        self._spelling, self._special = spelling, special
        self._drop = spelling.drops_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id: int) -> str:
        """What `id` adds: nothing while a character is incomplete."""
        content = self._spelling.of(id, self._special)
        if self._drop and content:
            content, self._drop = content.removeprefix(b" "), False
        return self._utf8.decode(content)

    def end(self) -> str:
        """What is left of a character that never became whole: U+FFFD or nothing."""
        return self._utf8.decode(b"", final=True)


def _drops_space(part: Mapping[str, Any]) -> bool:
    if part["type"] == "Metaspace":
        return part.get("prepend_scheme", "always") != "never"
    return part["type"] == "Strip" and part["content"] == " " and part["start"] == 1
