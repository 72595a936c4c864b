"""llama2.c's `tokenizer.bin`: the longest piece's length, then of every piece its score (fp32), length and bytes."""

import struct
from collections.abc import Iterator

from puna.errors import DataError
from puna.tokenizer import sentencepiece_model as sp
from puna.tokenizer.sentencepiece_model import Piece, Pieces

_CONTROL = {1: ("<s>", b"\n<s>\n"), 2: ("</s>", b"\n</s>\n")}  # the line breaks are what llama2.c prints


def read_llama2c_vocab(raw: bytes, where: object) -> Pieces:
    """
    Raises:
        DataError: not such a file.
    """
    try:
        longest = struct.unpack_from("<I", raw)[0]
        pieces = [_piece(i, *row) for i, row in enumerate(_rows(raw, longest))]
    except (ValueError, struct.error):
        raise DataError("not a llama2.c tokenizer", where=where, cause="another format, or damaged") from None
    return sp.check(Pieces(pieces), where)


def write_llama2c_vocab(vocabulary: Pieces) -> bytes:
    """The file that llama2.c reads; its runtime takes id 1 for BOS and 2 for EOS."""
    rows = [(piece.score, _spelling(i, piece)) for i, piece in enumerate(vocabulary.pieces)]
    longest = max(len(content) for _, content in rows)
    body = [struct.pack("<fI", score, len(content)) + content for score, content in rows]
    return struct.pack("<I", longest) + b"".join(body)


def _rows(raw: bytes, longest: int) -> Iterator[tuple[float, bytes]]:
    at = 4
    while at < len(raw):
        score, size = struct.unpack_from("<fI", raw, at)
        at += 8
        if not 0 < size <= min(longest, len(raw) - at):
            raise ValueError("a piece that is empty or longer than the longest")
        yield score, raw[at : at + size]
        at += size


def _piece(id: int, score: float, content: bytes) -> Piece:
    if id in _CONTROL:
        return Piece(_CONTROL[id][0], score, sp.CONTROL)
    text = content.decode("utf-8").replace(" ", sp.SPACE)
    return Piece(text, score, sp.UNKNOWN if id == 0 else sp.BYTE if id < 3 + 256 else sp.NORMAL)


def _spelling(id: int, piece: Piece) -> bytes:
    if id in _CONTROL and piece.kind == sp.CONTROL:
        return _CONTROL[id][1]
    return piece.text.replace(sp.SPACE, " ").encode()
