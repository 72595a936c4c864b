"""Ids back to bytes, and bytes to text as they come. Bytes, because an id may be a part of a character."""

import codecs
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import tokenizers

from puna.errors import DataError

_KNOWN = {"ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
_SPACE = "▁"
_EACH = "puna.each"
# SentencePiece writes U+FFFD for every stray byte, tiktoken and Rust one for as many as could begin a character.
codecs.register_error(_EACH, lambda error: ("\ufffd" * (error.end - error.start), error.end))  # type: ignore[attr-defined]


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
        self.errors = "replace" if "ByteLevel" in kinds else _EACH
        """How bytes that are no UTF-8 are read, as each family's own code does."""
        self._byte_level, self._fallback = "ByteLevel" in kinds, "ByteFallback" in kinds
        self._drops_space = any(_drops_space(part) for part in parts)
        self._cache: dict[int, bytes] = {}

    def of(self, id: int, special: bool) -> bytes:
        """The bytes of one id."""
        if id in self._added:
            token = self._added[id]
            return token.content.encode() if special or not token.special else b""
        if id not in self._cache:
            self._cache[id] = self._bytes(self._engine.id_to_token(id) or "")
        return self._cache[id]

    def drops_space_of(self, id: int) -> bool:
        """Whether the space at the beginning of `id`, when it begins the text, was put there by `encode`."""
        return self._drops_space and (self._engine.id_to_token(id) or "").startswith(_SPACE)

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
        self._spelling, self._special, self._begun = spelling, special, False
        self._utf8 = codecs.getincrementaldecoder("utf-8")(spelling.errors)

    def feed(self, id: int) -> str:
        """What `id` adds: nothing while a character is incomplete."""
        return self._utf8.decode(self.feed_bytes(id))

    def feed_bytes(self, id: int) -> bytes:
        """The bytes that `id` adds."""
        content = self._spelling.of(id, self._special)
        if content and not self._begun:
            self._begun = True
            return content[1:] if self._spelling.drops_space_of(id) else content
        return content

    def end(self) -> str:
        """What is left of a character that never became whole: U+FFFD or nothing."""
        return self._utf8.decode(b"", final=True)


def _drops_space(part: Mapping[str, Any]) -> bool:
    if part["type"] == "Metaspace":
        return part.get("prepend_scheme", "always") != "never"
    return part["type"] == "Strip" and part["content"] == " " and part["start"] == 1
