"""Conversations and raw texts to rows of ids, each id marked as trained or only read.

No torch here: processes that do nothing but encode start without it.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, NamedTuple

import numpy as np

from puna.data.conversations import Conversation
from puna.errors import DataError
from puna.log import log
from puna.tokenizer.chat.format import ChatFormat, Encoded, Train

TooLong = Literal["cut", "drop", "error"]
Fate = Literal["whole", "cut", "dropped"]


@dataclass(frozen=True)
class Encoding:
    """What decides on the ids of a conversation besides its words."""

    chat: ChatFormat
    seq_len: int
    """The most ids of a row."""
    train: Train = "all"
    too_long: TooLong = "cut"


class Chunk(NamedTuple):
    """Rows as flat arrays, and what became of the conversations they were made of."""

    ids: np.ndarray  # (ids of all rows,) uint32
    trained: np.ndarray  # (ids of all rows,) bool
    lengths: np.ndarray  # (rows,) int32
    draws: np.ndarray  # (rows,) float64, see `draw`
    sources: list[str]  # one a row
    fates: Mapping[str, int]


def encode_conversation(conversation: Conversation, encoding: Encoding) -> tuple[list[Encoded], Fate]:
    """The rows of a conversation: one of at most `seq_len` ids, none if it is dropped; of a raw text all its pieces.

    Raises:
        DataError: nothing is trained in it, BOS stands twice, an answer's end is not trained, or it is too long.
    """
    where, messages, tools, _, text = conversation
    chat, seq_len = encoding.chat, encoding.seq_len
    bos = chat.tokenizer.named_id("bos_token")
    if text is not None:
        ids = [chat.tokenizer.bos_id, *chat.tokenizer.encode(text), chat.tokenizer.eos_id]
        return list(_pieces(ids, seq_len)), "whole"
    try:
        ids, trained = chat.encode(messages, encoding.train, tools)
    except DataError as error:
        raise DataError(error.what, where=where, cause=error.cause, fix=error.fix) from None
    if ids[:2] == [bos, bos]:
        raise DataError("BOS stands twice at the start", where=where, cause="template and tokenizer both add it")
    longer = len(ids) > seq_len
    if longer and encoding.too_long == "error":
        fix = "a larger seq_len, too_long=cut, or too_long=drop"
        raise DataError(f"this conversation has {len(ids):,} ids, seq_len={seq_len:,}", where=where, fix=fix)
    if longer and encoding.too_long == "drop":
        return [], "dropped"
    row = Encoded(ids[:seq_len], trained[:seq_len])
    if not any(row.trained[1:]):
        why = "no assistant message" if not any(trained) else f"its answer lies beyond seq_len={seq_len}"
        fix = "mend or drop it" + ("; too_long=drop drops all that are longer" if longer else "")
        raise DataError("nothing to train in this conversation", where=where, cause=why, fix=fix)
    return [row], "cut" if longer else "whole"


def _pieces(ids: list[int], seq_len: int) -> Iterator[Encoded]:
    """A text in rows. A piece begins with the last id of the one before, so every id but BOS is predicted once."""
    for start in range(0, max(1, len(ids) - 1), seq_len - 1):
        piece = ids[start : start + seq_len]
        yield Encoded(piece, [False] + [True] * (len(piece) - 1))


def encode_conversations(
    conversations: Iterable[Conversation], chat: ChatFormat, seq_len: int, train: Train, too_long: TooLong = "cut"
) -> list[Encoded]:
    """The rows of all conversations, in one process and in memory: what the fast way has to equal.

    Raises:
        DataError: see `encode_conversation`; or no conversation leaves a row.
    """
    rows: list[Encoded] = []
    fates: Counter[str] = Counter()
    for conversation in conversations:
        made, fate = encode_conversation(conversation, Encoding(chat, seq_len, train, too_long))
        rows += made
        fates[fate] += 1
    tell(fates, len(rows), seq_len)
    return rows


def tell(fates: Mapping[str, int], rows: int, seq_len: int) -> None:
    """Warn of conversations that were cut or dropped.

    Raises:
        DataError: no rows.
    """
    count = sum(fates.values())
    if not count:
        raise DataError("no conversations in the data", cause="an empty file", fix="look at data.path")
    if not rows:
        raise DataError(f"all {count:,} conversations are longer than seq_len={seq_len}", fix="a larger seq_len")
    for fate in ("cut", "dropped"):
        if fates.get(fate):
            what = "%s of %s conversations are longer than seq_len=%d and were %s"
            log.warning(what, f"{fates[fate]:,}", f"{count:,}", seq_len, fate)


def encode_chunk(conversations: Sequence[Conversation], encoding: Encoding) -> Chunk:
    """`encode_conversation` of each."""
    rows: list[Encoded] = []
    sources: list[str] = []
    fates: Counter[str] = Counter()
    for conversation in conversations:
        made, fate = encode_conversation(conversation, encoding)
        rows += made
        sources += [conversation.source] * len(made)
        fates[fate] += 1
    return chunk_of(rows, sources, fates)


def chunk_of(rows: Sequence[Encoded], sources: list[str], fates: Mapping[str, int]) -> Chunk:
    """Rows as flat arrays."""
    lengths = np.array([len(row.ids) for row in rows], dtype=np.int32)
    total = int(lengths.sum())
    ids = np.fromiter(chain.from_iterable(row.ids for row in rows), dtype=np.uint32, count=total)
    trained = np.fromiter(chain.from_iterable(row.trained for row in rows), dtype=bool, count=total)
    return Chunk(ids, trained, lengths, np.array([draw(row.ids) for row in rows], dtype=np.float64), sources, fates)


def draw(ids: Sequence[int]) -> float:
    """A number in [0, 1) that a row's ids decide: on which side of a split it is."""
    return int.from_bytes(hashlib.sha256(repr(ids).encode()).digest()[:8], "little") / 2**64
