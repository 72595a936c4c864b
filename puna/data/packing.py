"""Conversations packed into rows: encoded once, several to a row, never seeing one another."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from puna.data.conversations import Conversation
from puna.data.loader import Batch, permute
from puna.dist.collectives import part
from puna.errors import DataError
from puna.log import log
from puna.ops.attention import Documents
from puna.ops.cross_entropy import IGNORE
from puna.tokenizer.chat.format import ChatFormat, Encoded, Train


def encode_conversations(
    conversations: Iterable[Conversation], chat: ChatFormat, seq_len: int, train: Train
) -> list[Encoded]:
    """Each conversation as ids and mask, cut to `seq_len` ids.

    Raises:
        DataError: one in which nothing is trained, BOS stands twice, or an answer's end is not trained.
    """
    rows, cut = [], 0
    bos = chat.tokenizer.named_id("bos_token")
    for where, messages, tools, *_ in conversations:
        try:
            ids, trained = chat.encode(messages, train, tools)
        except DataError as error:
            raise DataError(error.what, where=where, cause=error.cause, fix=error.fix) from None
        if ids[:2] == [bos, bos]:
            raise DataError("BOS stands twice at the start", where=where, cause="template and tokenizer both add it")
        cut += len(ids) > seq_len
        row = Encoded(ids[:seq_len], trained[:seq_len])
        if not any(row.trained[1:]):
            why = "no assistant message" if not any(trained) else f"its answer lies beyond seq_len={seq_len}"
            raise DataError("nothing to train in this conversation", where=where, cause=why, fix="mend or drop it")
        rows.append(row)
    if not rows:
        raise DataError("no conversations in the data", cause="an empty file", fix="look at data.path")
    if cut:
        log.warning("%d of %d conversations are longer than seq_len=%d and were cut", cut, len(rows), seq_len)
    return rows


def split_rows(rows: Sequence[Encoded], share: float) -> tuple[list[Encoded], list[Encoded]]:
    """(training, held out) by the hash of their ids: equal rows are on one side, and more rows move none."""
    sides: tuple[list[Encoded], list[Encoded]] = ([], [])
    for row in rows:
        draw = int.from_bytes(hashlib.sha256(repr(row.ids).encode()).digest()[:8], "little") / 2**64
        sides[draw < share].append(row)
    return sides


def pack(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Which rows share a pack: best fit, longest first; a pure function of its arguments."""
    packs: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        room = next((r for r in range(lengths[row], seq_len + 1) if by_room.get(r)), seq_len)
        index = by_room[room].pop() if by_room.get(room) else len(packs)
        if index == len(packs):
            packs.append([])
        packs[index].append(row)
        by_room.setdefault(room - lengths[row], []).append(index)
    return packs


class PackedLoader:
    """Endless batches of packed conversations (each rank its part) in an order that (seed, epoch, data) decides."""

    def __init__(self, rows: Sequence[Encoded], seq_len: int, batch_size: int, pad_id: int, seed: int):
        self.rows, self.seq_len, self.batch_size, self.pad_id, self.seed = rows, seq_len, batch_size, pad_id, seed
        if longest := max((len(r.ids) for r in rows if len(r.ids) > seq_len), default=0):
            raise DataError(f"a conversation of {longest} ids does not fit seq_len={seq_len}", fix="a larger seq_len")
        self.packs = pack([len(r.ids) for r in rows], seq_len)
        digest = hashlib.sha256(repr([(r.ids, r.trained) for r in rows]).encode())
        self.fingerprint = "sha256:" + digest.hexdigest()
        self.epoch = self.index = 0

    def __iter__(self) -> "PackedLoader":
        return self

    def __next__(self) -> Batch:
        return self.batch([self._next_pack() for _ in range(self.batch_size)][part(self.batch_size)])

    def batch(self, packs: Sequence[Sequence[int]]) -> Batch:
        """The packs as one batch: padding is its own last id, trained nowhere and seen by nobody."""
        tokens = torch.full((len(packs), self.seq_len), self.pad_id)
        labels, positions = torch.full_like(tokens, IGNORE), torch.zeros_like(tokens)
        spans = []
        for row, members in enumerate(packs):
            start = 0
            for ids, trained in (self.rows[i] for i in members):
                end = start + len(ids)
                tokens[row, start:end] = torch.tensor(ids)
                positions[row, start:end] = torch.arange(len(ids))
                target = torch.tensor(ids[1:])
                labels[row, start : end - 1] = torch.where(torch.tensor(trained[1:]), target, IGNORE)
                spans.append((row, start, end))
                start = end
        return Batch(tokens, labels, int((labels != IGNORE).sum()), positions, Documents(tuple(spans)))

    def epochs(self) -> dict[str, float]:
        """Passes made over the conversations so far."""
        return {"conversations": self.epoch + self.index / len(self.packs)}

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "index": self.index, "data": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            DataError: the conversations, the template or the tokenizer are not what they were.
        """
        if state["data"] != self.fingerprint:
            raise DataError(
                "the encoded conversations changed since the checkpoint", fix="restore them, or start a new run"
            )
        self.epoch, self.index = state["epoch"], state["index"]

    def _next_pack(self) -> list[int]:
        key = hashlib.sha256(f"{self.seed}/{self.epoch}".encode()).digest()
        place = permute(self.index, len(self.packs), int.from_bytes(key[:8], "little"))
        self.index += 1
        if self.index == len(self.packs):
            self.epoch, self.index = self.epoch + 1, 0
        return self.packs[place]
