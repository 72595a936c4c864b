"""Which rows share a pack: best fit, longest first. A slow oracle, and a way that packs millions of rows in seconds."""

import contextlib
import hashlib
import zipfile
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import overload

import numpy as np

from puna.data.rows import Rows
from puna.files import atomic_file

_KEPT = 200_000  # rows from which packs are kept beside them: fewer take less than a tenth of a second


class Packs(Sequence[list[int]]):
    """The members of each pack, as two arrays: pack i is members[bounds[i]:bounds[i + 1]]."""

    def __init__(self, members: np.ndarray, bounds: np.ndarray, source: np.ndarray):
        self.members, self.bounds, self.source = members, bounds, source
        """`source`: (packs,) the number of the source that all members of a pack come from, ascending."""

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...
    def __getitem__(self, index: int | slice) -> list[int] | list[list[int]]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        place = range(len(self))[index]
        return self.members[self.bounds[place] : self.bounds[place + 1]].tolist()


def pack(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """The packs of rows none of which is longer than `seq_len`; a pure function of its arguments. The oracle."""
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


def best_fit(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(members, bounds) of the packs that `pack` makes, in its order.

    Rows of one length are placed together: the tightest pack that has room takes as many of them as fit, because with
    every one it takes it becomes tighter still. So the steps are as many as lengths times rooms, not as rows.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    ordered = lengths[order]
    pack_of = np.empty(len(order), dtype=np.int64)
    by_room: list[list[int]] = [[] for _ in range(seq_len + 1)]
    has_room = np.zeros(seq_len + 1, dtype=bool)
    made = 0
    for begin, end in pairwise([0, *(np.flatnonzero(np.diff(ordered)) + 1).tolist(), len(order)]):
        length = int(ordered[begin]) if len(order) else 0
        while begin < end:
            room = length + int(has_room[length:].argmax())
            opened = not has_room[room]
            room = seq_len if opened else room
            each = room // length
            wanted = -(-(end - begin) // each)
            if opened:
                taken = list(range(made, made + wanted))
                made += wanted
            else:
                taken = by_room[room][-wanted:][::-1]
                del by_room[room][-wanted:]
                has_room[room] = bool(by_room[room])
            placed = min(len(taken) * each, end - begin)
            pack_of[begin : begin + placed] = np.repeat(taken, each)[:placed]
            begin += placed
            last = placed - (len(taken) - 1) * each  # rows in the last pack, which may not be full
            full = len(taken) if last == each else len(taken) - 1
            for some, rows in ((taken[:full], each), (taken[full:], last)):
                if some:
                    by_room[room - rows * length] += some
                    has_room[room - rows * length] = True
    members = order[np.argsort(pack_of, kind="stable")]
    return members, np.concatenate([[0], np.cumsum(np.bincount(pack_of, minlength=made))]).astype(np.int64)


def pack_rows(rows: Rows, seq_len: int) -> Packs:
    """The packs of the rows, none with rows of two sources. Of many rows they are kept beside the rows."""
    if rows.folder is None or len(rows) < _KEPT:
        return _packed(rows, seq_len)
    key = hashlib.sha256(f"{rows.fingerprint} {seq_len} {Path(__file__).read_text()}".encode()).hexdigest()[:32]
    file = rows.folder.with_name(f"{key}.packs.npz")
    with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile), file.open("rb") as stream:
        kept = np.load(stream)
        packs = Packs(kept["members"], kept["bounds"], kept["source"])
        if len(packs.members) == packs.bounds[-1] == len(rows):
            return packs
    packs = _packed(rows, seq_len)
    with contextlib.suppress(OSError):  # without them the next start takes seconds longer
        file.unlink(missing_ok=True)
        with atomic_file(file) as temporary, temporary.open("wb") as stream:
            np.savez(stream, members=packs.members, bounds=packs.bounds, source=packs.source)
    return packs


def single(rows: Rows) -> Packs:
    """Every row a pack of its own."""
    members = np.argsort(rows.entries["source"], kind="stable")
    return Packs(members, np.arange(len(rows) + 1), rows.entries["source"][members])


def _packed(rows: Rows, seq_len: int) -> Packs:
    sources, lengths = rows.entries["source"], rows.lengths
    numbers = np.unique(sources)
    of_each = [np.flatnonzero(sources == number) for number in numbers]
    packed = [best_fit(lengths[places], seq_len) for places in of_each]
    members = [places[chosen] for places, (chosen, _) in zip(of_each, packed, strict=True)]
    sizes = [np.diff(bounds) for _, bounds in packed]
    return Packs(
        _joined(members), np.concatenate([[0], np.cumsum(_joined(sizes))]),
        np.repeat(numbers, [len(size) for size in sizes]),
    )  # fmt: skip


def _joined(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])
