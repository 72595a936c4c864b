"""Batches of conversations packed into rows, none of which sees another."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from puna.config import nearest
from puna.data.loader import Batch, permute
from puna.data.packs import pack_rows, single
from puna.data.rows import Rows
from puna.dist.collectives import part
from puna.errors import DataError
from puna.ops.attention import Documents
from puna.ops.cross_entropy import IGNORE
from puna.tokenizer.chat.format import Encoded


class _Stretch(NamedTuple):
    """The packs of one source."""

    name: str
    first: int
    packs: int
    drawn: int  # in an epoch; above `packs` some are read again


class PackedLoader:
    """Endless batches of packed conversations (each rank its part) in an order that (seed, epoch, data) decides.

    Args:
        passes: how often a source is read while an epoch goes by, 1 where none is given. With 0.5 an epoch reads one
            half of its packs and the next epoch the other: no pack is read again before all were.
        packed: several conversations to a row. Else each has a row, padded to the longest of its batch: what most do,
            and what packed rows have to equal.

    Raises:
        DataError: no rows, one longer than seq_len, or passes over a source that the rows do not have.
    """

    def __init__(
        self,
        rows: Sequence[Encoded],
        seq_len: int,
        batch_size: int,
        pad_id: int,
        seed: int,
        passes: Mapping[str, float] | None = None,
        packed: bool = True,
    ):
        self.rows = rows if isinstance(rows, Rows) else Rows.of(rows)
        self.seq_len, self.batch_size, self.pad_id, self.seed = seq_len, batch_size, pad_id, seed
        self.passes = {name: times for name, times in (passes or {}).items() if times != 1}
        self.packed = packed
        if (longest := max(self.rows.lengths, default=0)) > seq_len:
            raise DataError(f"a conversation of {longest} ids does not fit seq_len={seq_len}", fix="a larger seq_len")
        if not len(self.rows):
            raise DataError("no conversations to train on", fix="a smaller valid_fraction, or more of them")
        self.packs = pack_rows(self.rows, seq_len) if packed else single(self.rows)
        self.fingerprint = self.rows.fingerprint
        self.epoch = self.index = 0
        self._stretches = self._find_stretches()
        self.drawn = sum(stretch.drawn for stretch in self._stretches)
        """Packs read in an epoch."""

    def __iter__(self) -> "PackedLoader":
        return self

    def __next__(self) -> Batch:
        return self.batch([self._next_pack() for _ in range(self.batch_size)][part(self.batch_size)])

    def batch(self, packs: Sequence[Sequence[int]]) -> Batch:
        """The packs as one batch: padding is its own last id, trained nowhere and seen by nobody."""
        read = [[self.rows.read(i) for i in members] for members in packs]
        width = self.seq_len if self.packed else max(len(ids) for members in read for ids, _ in members)
        tokens = np.full((len(packs), width), self.pad_id, dtype=np.int64)
        labels, positions = np.full_like(tokens, IGNORE), np.zeros_like(tokens)
        spans = []
        for row, members in enumerate(read):
            start = 0
            for ids, trained in members:
                end = start + len(ids)
                tokens[row, start:end] = ids
                positions[row, start:end] = np.arange(len(ids))
                labels[row, start : end - 1] = np.where(trained[1:], ids[1:], IGNORE)
                spans.append((row, start, end))
                start = end
        n = int((labels != IGNORE).sum())
        tensors = [torch.from_numpy(array) for array in (tokens, labels, positions)]
        return Batch(tensors[0], tensors[1], n, tensors[2], Documents(tuple(spans)))

    def epochs(self) -> dict[str, float]:
        """Passes made over each source so far."""
        done = self.epoch + self.index / max(1, self.drawn)
        return {stretch.name or "conversations": done * stretch.drawn / stretch.packs for stretch in self._stretches}

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

    def _find_stretches(self) -> list[_Stretch]:
        numbers, firsts, counts = np.unique(self.packs.source, return_index=True, return_counts=True)
        names = [self.rows.names[number] for number in numbers]
        for name in self.passes:
            if name not in names:
                raise DataError(f"passes: no rows of a source `{name}`" + nearest(name, names), fix=", ".join(names))
        return [
            _Stretch(name, int(first), int(count), max(1, round(count * self.passes.get(name, 1.0))))
            for name, first, count in zip(names, firsts, counts, strict=True)
        ]

    def _next_pack(self) -> list[int]:
        place = permute(self.index, self.drawn, _key(self.seed, self.epoch))
        if self.passes:
            place = self._drawn_place(place)
        self.index += 1
        if self.index == self.drawn:
            self.epoch, self.index = self.epoch + 1, 0
        return self.packs[place]

    def _drawn_place(self, place: int) -> int:
        """The pack that stands at `place` of an unshuffled epoch: each source goes on where its last epoch ended."""
        for name, first, packs, drawn in self._stretches:
            if place < drawn:
                passed, place = divmod(self.epoch * drawn + place, packs)
                return first + permute(place, packs, _key(self.seed, name, passed))
            place -= drawn
        raise IndexError(place)


def _key(*what: object) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, what)).encode()).digest()[:8], "little")
