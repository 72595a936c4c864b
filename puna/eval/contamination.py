"""How much of an evaluation set a model may have read while it was trained.

A token of an example is contaminated if it lies in a run of `n` tokens that occurs in a training document (Llama 3,
section 5.1.4: n = 8; Llama 2, appendix A.6: runs of more than 10). Exact: a hash only chooses what is compared. Time is
linear in the shards, which are read once in pieces; memory is that of the examples' runs and one piece.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from puna.data.shards import Shards, read_index
from puna.log import Progress

_PIECE = 1 << 20  # tokens read at a time
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_BITS = 22  # a table of 4 MB tells most runs of the shards apart from all of the examples
CLEAN, DIRTY = 0.2, 0.8
"""Llama 2's borders: clean and not clean, not dirty and dirty."""


def contaminated(examples: Sequence[Sequence[int]], shards: Path, n: int = 8) -> list[float]:
    """The share of each example's tokens that is contaminated; 0 for one shorter than `n`.

    Args:
        shards: a folder of token shards whose tokenizer made the examples' ids.

    Raises:
        DataError: no shards there.
    """
    rows = [np.asarray(row, dtype=np.int64) for row in examples]
    runs = np.concatenate([_runs(row, n) for row in rows]) if rows else np.zeros((0, n), np.int64)
    seen = _found_in(runs, Shards(shards, "train")) if len(runs) else np.zeros(0, bool)
    shares, first = [], 0
    for row in rows:
        count = max(0, len(row) - n + 1)
        shares.append(_share(seen[first : first + count], len(row), n))
        first += count
    return shares


def subsets(shares: Sequence[float]) -> Mapping[str, list[int]]:
    """Places of the examples in Llama 2's four subsets, which overlap."""
    share = np.asarray(shares)
    chosen = {
        "clean": share < CLEAN, "not clean": share >= CLEAN, "not dirty": share < DIRTY, "dirty": share >= DIRTY,
    }  # fmt: skip
    return {name: np.flatnonzero(where).tolist() for name, where in chosen.items()}


def tokenizer_of_shards(shards: Path) -> str:
    """The fingerprint of the tokenizer that made the ids."""
    return str(read_index(shards)["tokenizer"])


def _share(seen: np.ndarray, length: int, n: int) -> float:
    marks = np.zeros(length + 1, np.int64)
    starts = np.flatnonzero(seen)
    np.add.at(marks, starts, 1)
    np.add.at(marks, starts + n, -1)
    return float((marks.cumsum()[:-1] > 0).mean()) if length else 0.0


def _found_in(runs: np.ndarray, shards: Shards) -> np.ndarray:
    """Which of `runs` (R, n) occur. None reaches over two documents: BOS and EOS stand between them in shards."""
    n = runs.shape[1]
    distinct, place = np.unique(runs, axis=0, return_inverse=True)
    hashes = _hashes(distinct)
    order = np.argsort(hashes, kind="stable")
    distinct, hashes = distinct[order], hashes[order]
    table = np.zeros(1 << _BITS, bool)
    table[hashes >> np.uint64(64 - _BITS)] = True
    seen = np.zeros(len(distinct), bool)
    with Progress("contamination", shards.tokens) as progress:
        for start in range(0, shards.tokens, _PIECE):
            ids = shards.read(start, min(_PIECE + n - 1, shards.tokens - start))
            _mark(_runs(ids, n), distinct, hashes, table, seen)
            progress.update(start + len(ids))
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    return seen[back][place.reshape(-1)]


def _mark(there: np.ndarray, distinct: np.ndarray, hashes: np.ndarray, table: np.ndarray, seen: np.ndarray) -> None:
    """Set `seen` for each of `distinct`, sorted by hash, that is among `there`."""
    found = _hashes(there)
    maybe = np.flatnonzero(table[found >> np.uint64(64 - _BITS)])
    found, there = found[maybe], there[maybe]
    place = np.searchsorted(hashes, found)
    while len(place):  # more than one turn only where two runs have one hash
        inside = place < len(hashes)
        inside[inside] = hashes[place[inside]] == found[inside]
        place, found, there = place[inside], found[inside], there[inside]
        same = (distinct[place] == there).all(1)
        seen[place[same]] = True
        place, found, there = place[~same] + 1, found[~same], there[~same]


def _runs(ids: np.ndarray, n: int) -> np.ndarray:
    """(T,) -> (T - n + 1, n), a view."""
    return np.lib.stride_tricks.sliding_window_view(ids, n) if len(ids) >= n else np.zeros((0, n), ids.dtype)


def _hashes(runs: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each row."""
    found = np.zeros(len(runs), np.uint64)
    with np.errstate(over="ignore"):
        for column in range(runs.shape[1]):
            found = (found ^ runs[:, column].astype(np.uint64)) * _FACTOR
            found ^= found >> np.uint64(29)
    return found
