"""Texts that are nearly the same, found in one pass: MinHash signatures in bands (Broder 1997; LSH, Leskovec 3.4)."""

import zlib
from collections.abc import Sequence

import numpy as np

_VALUES = 128  # of a signature: its estimate of a similarity s errs by sqrt(s (1 - s) / 128), 0.035 at 0.8
_BLOCK = 128  # sequences hashed at a time: what stays in a core's cache is twenty times faster
_GRAM = 3
_FACTORS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0x165667B19E3779F9))
_SHIFT = np.uint64(32)
_random = np.random.Generator(np.random.PCG64(0))
_ODD = _random.integers(0, 1 << 63, _VALUES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_ADD = _random.integers(0, 1 << 63, _VALUES, dtype=np.uint64)
Near = tuple[int, float]
"""Which earlier text, and how similar."""


def word_ids(words: Sequence[str]) -> np.ndarray:
    """A number for each word, the same on every machine."""
    return np.fromiter((zlib.crc32(word.encode("utf-8", "replace")) for word in words), np.uint64, len(words))


def grams(ids: np.ndarray) -> np.ndarray:
    """The distinct sequences of three ids as 64-bit hashes; of a shorter text the text itself. (N,) sorted."""
    n = max(1, min(_GRAM, len(ids)))
    mixed = sum((_mix(ids[i : len(ids) - n + 1 + i]) * _FACTORS[i] for i in range(n)), np.zeros(1, np.uint64))
    return np.unique(_mix(mixed)) if len(ids) else np.zeros(0, np.uint64)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Shared part of two sets of sequences, the similarity that signatures estimate."""
    shared = len(np.intersect1d(a, b))
    return shared / max(1, len(a) + len(b) - shared)


def signature(hashes: np.ndarray) -> np.ndarray:
    """The least value of 128 hash functions over the set: two sets share each with their similarity. (128,) uint32."""
    least = np.full(_VALUES, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(hashes), _BLOCK):
        values = hashes[start : start + _BLOCK, None] * _ODD
        values += _ADD
        np.minimum(least, values.min(0), out=least)
    return (least >> _SHIFT).astype(np.uint32)


def rows_of_a_band(threshold: float) -> int:
    """Values in a band: the most that still let 99 of 100 pairs at the threshold share a band."""
    fits = [r for r in range(1, 33) if 1 - (1 - threshold**r) ** (_VALUES // r) >= 0.99]
    return max(fits)


class NearDuplicates:
    """Signatures of the texts added so far, found again by any band they share."""

    def __init__(self, threshold: float):
        self.threshold, self.rows = threshold, rows_of_a_band(threshold)
        self.signatures = np.zeros((1024, _VALUES), np.uint32)
        self.count = 0
        self._buckets: dict[int, tuple[int, ...]] = {}

    def find(self, own: np.ndarray) -> Near | None:
        """The text whose signature is most like this one (of equals the first), if it reaches the threshold."""
        return max(self.all_near(own), key=lambda near: (near[1], -near[0]), default=None)

    def all_near(self, own: np.ndarray) -> list[Near]:
        """Every text whose signature reaches the threshold."""
        candidates = sorted({number for band in self._bands(own) for number in self._buckets.get(band, ())})
        if not candidates:
            return []
        alike = (self.signatures[candidates] == own).mean(1).tolist()
        return [(n, share) for n, share in zip(candidates, alike, strict=True) if share >= self.threshold]

    def add(self, own: np.ndarray) -> int:
        """Keep a signature to compare others with; its number."""
        if self.count == len(self.signatures):
            self.signatures = np.concatenate([self.signatures, np.zeros_like(self.signatures)])
        self.signatures[self.count] = own
        for band in self._bands(own):
            # Most bands are of one text: a tuple of one is half the size of a list.
            self._buckets[band] = (*self._buckets.get(band, ()), self.count)
        self.count += 1
        return self.count - 1

    def _bands(self, own: np.ndarray) -> list[int]:
        """A 64-bit key for each band, which holds the band's number too."""
        bands = own[: _VALUES // self.rows * self.rows].reshape(-1, self.rows).astype(np.uint64)
        keys = np.arange(len(bands), dtype=np.uint64)
        for column in bands.T:
            keys = _mix(keys * _FACTORS[0] + column)
        return keys.tolist()


def _mix(values: np.ndarray) -> np.ndarray:
    """Every bit depends on every bit (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
