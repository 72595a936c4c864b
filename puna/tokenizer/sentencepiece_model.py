"""SentencePiece's `tokenizer.model`: the protobuf of a BPE vocabulary, read and written without trusting it.

Field numbers are those of sentencepiece_model.proto. Only what decides ids is read; what Llama 1 and 2 do not use
(another algorithm, a normaliser that rewrites text) is refused by name.
"""

import math
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from puna.errors import DataError

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
"""Kinds of pieces; GGUF's token types are the same numbers."""
SPACE = "▁"
"""What a space is spelled like."""
_BPE = 2
_MODEL_TYPES = {1: "unigram", 3: "word", 4: "char"}


class Piece(NamedTuple):
    """`score` orders merges (higher first); SentencePiece and GGUF store it as fp32."""

    text: str
    score: float
    kind: int


class Pieces(NamedTuple):
    """A Llama 1/2 vocabulary, in id order."""

    pieces: list[Piece]
    bos: int = 1
    eos: int = 2
    add_prefix: bool = True
    """A space before the text, so that its first word is spelled like any other."""


def check(vocabulary: Pieces, where: object) -> Pieces:
    """
    Raises:
        DataError: repeated pieces, unknown kinds, scores that are no numbers, bytes that are not `<0x00>`..`<0xFF>`.
    """
    pieces = vocabulary.pieces
    if len({piece.text for piece in pieces}) != len(pieces):
        raise DataError("the vocabulary has a piece twice", where=where, cause="a damaged or hostile file")
    for number, piece in enumerate(pieces):
        if piece.kind not in range(NORMAL, BYTE + 1) or not math.isfinite(piece.score) or not piece.text:
            raise DataError(f"piece {number} is {piece}", where=where, cause="a damaged or hostile file")
    bytes_ = [piece.text for piece in pieces if piece.kind == BYTE]
    if sorted(bytes_) != byte_pieces():
        what = f"the bytes are spelled {bytes_[:3]}..." if bytes_ else "no byte pieces"
        raise DataError(what, where=where, fix="a vocabulary with byte fallback, <0x00> to <0xFF>")
    if not (0 <= vocabulary.bos < len(pieces) and 0 <= vocabulary.eos < len(pieces)):
        raise DataError(f"BOS {vocabulary.bos} or EOS {vocabulary.eos} is no piece", where=where)
    if [piece.kind for piece in pieces].count(UNKNOWN) != 1:
        raise DataError("there is not exactly one unknown piece", where=where)
    return vocabulary


def byte_pieces() -> list[str]:
    """The spelling of every byte, in order."""
    return [f"<0x{byte:02X}>" for byte in range(256)]


def read_sentencepiece(raw: bytes, where: object) -> Pieces:
    """
    Raises:
        DataError: not such a file, or not a BPE that leaves text as it is.
    """
    try:
        fields = list(_fields(raw))
        pieces = [_piece(dict(_fields(value))) for number, value in fields if number == 1]
        trainer = dict(_fields(b"".join(v for n, v in fields if n == 2)))
        normalizer = dict(_fields(b"".join(v for n, v in fields if n == 3)))
    except (ValueError, TypeError, KeyError, IndexError, struct.error, AttributeError):
        raise DataError("not a SentencePiece model", where=where, cause="another format, or damaged") from None
    if (kind := trainer.get(3, 1)) != _BPE:
        raise DataError(f"a SentencePiece {_MODEL_TYPES.get(kind, kind)} model", where=where, fix="a BPE model")
    if normalizer.get(2) or normalizer.get(4, 1) or not normalizer.get(5, 1) or trainer.get(24, 0):
        what = "the SentencePiece normaliser rewrites text"
        raise DataError(what, where=where, cause="not a Llama's: those keep every character and every space")
    bos, eos = trainer.get(41, 1), trainer.get(42, 2)
    if type(bos) is not int or type(eos) is not int:
        raise DataError(f"BOS is {bos!r}, EOS {eos!r}", where=where, cause="a damaged or hostile file")
    vocabulary = Pieces(pieces, bos, eos, bool(normalizer.get(3, 1)))
    return check(vocabulary, where)


def write_sentencepiece(vocabulary: Pieces) -> bytes:
    """The file that sentencepiece opens, with the settings of Llama 1 and 2."""
    pieces, unknown = vocabulary.pieces, [piece.kind for piece in vocabulary.pieces].index(UNKNOWN)
    names = (pieces[unknown].text, pieces[vocabulary.bos].text, pieces[vocabulary.eos].text)
    trainer = {
        3: _BPE, 4: len(pieces), 10: 0.99995, 20: 16, 25: True, 26: True, 35: True, 40: unknown, 41: vocabulary.bos,
        42: vocabulary.eos, 43: -1, 44: " \u2047 ", 45: names[0], 46: names[1], 47: names[2],
    }  # fmt: skip
    normalizer = {1: "identity", 2: b"", 3: vocabulary.add_prefix, 4: False, 5: True}
    body = [_message({1: _message({1: p.text, 2: float(p.score), 3: p.kind})}) for p in pieces]
    return b"".join([*body, _message({2: _message(trainer), 3: _message(normalizer)})])


def _piece(fields: dict[int, Any]) -> Piece:
    score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
    return Piece(fields[1].decode("utf-8"), score, fields.get(3, NORMAL))


def _fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a message: varints as int, everything else as its bytes."""
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(raw, at)
            yield number, value
            continue
        size = {1: 8, 5: 4}.get(wire)
        if size is None:
            if wire != 2:
                raise ValueError("no such wire type")
            size, at = _varint(raw, at)
        if not number or size > len(raw) - at:
            raise ValueError("reaches beyond the end")
        yield number, raw[at : at + size]
        at += size


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = raw[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("a varint without an end")


def _message(fields: dict[int, int | float | str | bytes | bool]) -> bytes:
    out = bytearray()
    for number, value in fields.items():
        if isinstance(value, int):
            out += _encode_varint(number << 3) + _encode_varint(int(value) & (1 << 64) - 1)
        elif isinstance(value, float):
            out += _encode_varint(number << 3 | 5) + struct.pack("<f", value)
        else:
            content = value.encode() if isinstance(value, str) else value
            out += _encode_varint(number << 3 | 2) + _encode_varint(len(content)) + content
    return bytes(out)


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
