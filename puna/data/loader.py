"""Batches of packed text. The order is a pure function of (seed, epoch, data), so the position is two integers."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from puna.config import nearest
from puna.data.shards import Shards
from puna.dist.collectives import part
from puna.errors import DataError
from puna.ops.attention import Documents
from puna.ops.cross_entropy import IGNORE


@dataclass(frozen=True)
class Batch:
    """Rows of tokens with the label of every position. Packed rows also have positions and documents."""

    tokens: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64: the next token, IGNORE where nothing is trained
    n: int
    """Trained tokens. `fit` divides the step's loss by the sum of these over micro-batches and ranks."""
    positions: Tensor | None = None  # (B, T) int64, counted anew in each document
    documents: Documents | None = None

    @property
    def size(self) -> int:
        """Tokens computed, trained or not, padding too."""
        return self.tokens.numel()

    def to(self, device: torch.device) -> "Batch":
        positions = None if self.positions is None else self.positions.to(device)
        return Batch(self.tokens.to(device), self.labels.to(device), self.n, positions, self.documents)

    def halves(self) -> "tuple[Batch, Batch] | None":
        """The first half of the rows and the second; None of a single row."""
        rows = len(self.tokens)
        return (self._rows(0, rows // 2), self._rows(rows // 2, rows)) if rows > 1 else None

    def _rows(self, start: int, stop: int) -> "Batch":
        tokens, labels = self.tokens[start:stop], self.labels[start:stop]
        positions = None if self.positions is None else self.positions[start:stop]
        documents = None if self.documents is None else self.documents.rows(start, stop)
        return replace(
            self,
            tokens=tokens,
            labels=labels,
            n=int((labels != IGNORE).sum()),
            positions=positions,
            documents=documents,
        )


class _Draw(NamedTuple):
    """What an epoch reads of a stretch of one source."""

    source: str
    drawn: int  # windows; above `windows` some are read again
    windows: int
    first: int  # where the first window begins


class TokenLoader:
    """Endless batches of windows of seq_len + 1 ids, every window of an epoch once, in shuffled order.

    Each epoch cuts the text at another offset, so the windows differ from epoch to epoch. A batch has `batch_size`
    windows over all ranks, the same ones for any number of them; each rank reads its part.

    Args:
        mixture: passes over a source in an epoch, 1 where none is given: 0.5 draws half of its windows, 2 each twice,
            and any share at least one.

    Raises:
        DataError: too little text for a window, or a mixture of sources that the shards do not have.
        UsageError: the ranks cannot have equal parts.
    """

    def __init__(
        self, shards: Shards, seq_len: int, batch_size: int, seed: int, mixture: Mapping[str, float] | None = None
    ):
        self.shards, self.seq_len, self.batch_size, self.seed = shards, seq_len, batch_size, seed
        self.mixture = dict(mixture or {})
        self.epoch = self.index = 0
        # Without a mixture windows may run from one source into the next, as they do between documents.
        self._stretches = shards.sources if self.mixture else [("", shards.tokens)]
        if shards.tokens < 2 * seq_len + 1:
            raise DataError(
                f"the split has {shards.tokens:,} tokens, too few for windows of seq_len={seq_len}",
                where=shards.folder, fix="more text, or a smaller seq_len",
            )  # fmt: skip
        self._current: tuple[int, list[_Draw]] | None = None
        self._check_mixture()

    def __iter__(self) -> "TokenLoader":
        return self

    def __next__(self) -> Batch:
        starts = [self._next_start() for _ in range(self.batch_size)][part(self.batch_size)]
        rows = torch.from_numpy(np.stack([self.shards.read(start, self.seq_len + 1) for start in starts]))
        tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        return Batch(tokens, labels, labels.numel())

    def epochs(self) -> dict[str, float]:
        """Passes made over each source so far: windows drawn by windows there are, not what the mixture asks for."""
        passes = {name: 0.0 for name, _ in self._stretches}
        for epoch in range(self.epoch + 1):
            draws = self._draws(epoch)
            done = 1.0 if epoch < self.epoch else self.index / sum(d.drawn for d in draws)  # of all sources alike
            for name in {d.source for d in draws}:
                ours = [d for d in draws if d.source == name]
                passes[name] += done * sum(d.drawn for d in ours) / sum(d.windows for d in ours)
        return {name: passes[name if self.mixture else ""] for name, _ in self.shards.sources}

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "index": self.index, "data": self.shards.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            DataError: the data is not what the position was saved for.
        """
        if state["data"] != self.shards.fingerprint:
            raise DataError(
                f"the data changed since the checkpoint: {state['data'][:15]} then, {self.shards.fingerprint[:15]} now",
                where=self.shards.folder, fix="restore the data, or start a new run",
            )  # fmt: skip
        self.epoch, self.index = state["epoch"], state["index"]

    def _check_mixture(self) -> None:
        """Raise DataError unless every source named in the mixture has a window in every epoch."""
        folder, known = self.shards.folder, {name for name, _ in self.shards.sources}
        if self.mixture and not self.shards.tells_sources:
            raise DataError(
                "mixture: these shards do not tell which source a text came from", where=folder,
                cause="an older puna wrote them",
                fix="make them again with puna run data: remove the folder, or choose another output=...",
            )  # fmt: skip
        for name in self.mixture:
            if name not in known:
                raise DataError(
                    f"mixture: no source `{name}`" + nearest(name, sorted(known)), where=folder,
                    fix=f"mixture={{}}, or its sources: {', '.join(sorted(known))}",
                )  # fmt: skip
            longest = max(tokens for source, tokens in self._stretches if source == name)
            if longest < 2 * self.seq_len:  # an offset of seq_len - 1, and a window with its last label
                raise DataError(
                    f"mixture: `{name}` has {longest:,} tokens in a row, too few for windows of seq_len={self.seq_len}",
                    where=folder, fix="a smaller seq_len, or leave it out of the mixture",
                )  # fmt: skip

    def _next_start(self) -> int:
        if self._current is None or self._current[0] != self.epoch:  # once an epoch, not for each of its windows
            self._current = self.epoch, self._draws(self.epoch)
        draws = self._current[1]
        count = sum(d.drawn for d in draws)
        place = permute(self.index, count, self._key("order"))
        start = self._start(place, draws)
        self.index += 1
        if self.index == count:
            self.epoch, self.index = self.epoch + 1, 0
        return start

    def _draws(self, epoch: int) -> list[_Draw]:
        """Of each stretch with windows in this epoch, how many of them are drawn; never an empty list."""
        offset, begin, draws = _hash(self.seed, epoch, self.shards.fingerprint) % self.seq_len, 0, []
        for name, tokens in self._stretches:
            if windows := max(0, tokens - 1 - offset) // self.seq_len:
                drawn = max(1, round(windows * self.mixture.get(name, 1.0)))
                draws.append(_Draw(name, drawn, windows, begin + offset))
            begin += tokens
        return draws

    def _start(self, place: int, draws: list[_Draw]) -> int:
        """Where the window number `place` of an unshuffled epoch begins."""
        for number, (_, drawn, windows, first) in enumerate(draws):
            if place < drawn:
                if self.mixture:  # which of its windows, and in another order at each pass
                    place = permute(place % windows, windows, self._key(number, place // windows))
                return first + place * self.seq_len
            place -= drawn
        raise IndexError(place)

    def _key(self, *what: object) -> int:
        return _hash(self.seed, self.epoch, self.shards.fingerprint, *what)


def permute(index: int, count: int, key: int) -> int:
    """Where `index` goes in the permutation of range(count) chosen by `key`: constant memory at any count.

    A four-round Feistel network permutes the next power of four; values outside the range are walked on
    ("cycle walking") until they fall inside.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round in range(4):
            left, right = right, left ^ (_mix(right ^ key, round) & mask)
        index = left << half | right
        if index < count:
            return index


def _mix(value: int, round: int) -> int:
    """splitmix64's finalizer."""
    value = (value + (round + 1) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31


def _hash(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")
