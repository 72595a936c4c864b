"""Speculative decoding: guess what comes next, compute all of it at once, keep what the model itself would have said.

The model draws its id at every guessed place by the random number that belongs to the place, and a guess is kept when
it is that id. So a text is the same with and without guessing, whatever is guessed, at any temperature; its
distribution is the model's after all filters. A fixed guess is kept with the probability that the model gives it, as by
the rule of Leviathan et al. 2023 and Chen et al. 2023. A draft that samples uses the same random numbers (drafter-
invariant speculation, Daliri et al. 2024), so it mostly draws the same id where it believes about the same.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

from puna.infer.cache.paged_cache import PagedCache
from puna.infer.sample import Sample
from puna.infer.scheduler import Chunk
from puna.infer.speculation.goodput import Goodput, Times


class Proposer(ABC):
    """Whoever guesses. Wrong guesses cost time and nothing else."""

    @abstractmethod
    def propose(self, samples: Sequence[Sample], counts: Sequence[int], cache: PagedCache) -> list[list[int]]:
        """For each sample at most so many ids that may follow its `text.ids`.

        Args:
            cache: the engine's; it has room for the guesses after each sample's ids.
        """

    def end(self, sample: Sample) -> None:  # noqa: B027 (few keep anything)
        """Nothing more is asked about this sample."""

    def release(self) -> None:  # noqa: B027
        """Give memory back."""


class Guesses(Proposer):
    """A function (ids so far, most ids) -> ids as a proposer."""

    def __init__(self, guess: Callable[[Sequence[int], int], Sequence[int]]):
        self.guess = guess

    def propose(self, samples: Sequence[Sample], counts: Sequence[int], cache: PagedCache) -> list[list[int]]:
        """See `Proposer`."""
        return [list(self.guess(s.text.ids, n))[:n] if n else [] for s, n in zip(samples, counts, strict=True)]


class Lookup(Proposer):
    """What followed when the text last ended in the same ids (prompt look-up, Saxena 2023).

    Args:
        sizes: how many ids have to be the same, tried in this order.
    """

    def __init__(self, sizes: Sequence[int] = (3, 2)):
        self.sizes = sizes
        self._indices: WeakKeyDictionary[Sample, _Index] = WeakKeyDictionary()

    def propose(self, samples: Sequence[Sample], counts: Sequence[int], cache: PagedCache) -> list[list[int]]:
        """See `Proposer`."""
        return [self._index(s).following(s.text.ids, n) if n else [] for s, n in zip(samples, counts, strict=True)]

    def end(self, sample: Sample) -> None:
        """See `Proposer`."""
        self._indices.pop(sample, None)

    def _index(self, sample: Sample) -> "_Index":
        return self._indices.setdefault(sample, _Index(self.sizes))


class _Index:
    """Where runs of ids last ended; extended as the text grows, so that all of it costs what the text is long."""

    def __init__(self, sizes: Sequence[int]):
        self.sizes, self.known = sizes, 0
        self.ends: dict[tuple[int, ...], int] = {}

    def following(self, ids: Sequence[int], count: int) -> list[int]:
        for end in range(self.known, len(ids)):  # runs that end with the text itself have nothing after them
            self.ends.update({tuple(ids[end - size : end]): end for size in self.sizes if end >= size})
        self.known = len(ids)
        for size in self.sizes:
            if (end := self.ends.get(tuple(ids[-size:]))) is not None:
                period = len(ids) - end  # a guess that reaches the end of the text goes on with itself
                return [ids[end + i % period] for i in range(count)]
        return []


class Speculation:
    """Adds guesses to the steps of an engine as far as that pays.

    Args:
        most: ids guessed for one text at a time.
        clock: seconds; how long steps take decides how much is guessed, and never what is written.
    """

    def __init__(self, proposer: Proposer, most: int = 8, clock: Callable[[], float] = time.perf_counter):
        self.proposer, self.most, self.clock = proposer, most, clock
        self.goodput = Goodput()
        self.guessed = self.right = 0
        """Ids that were guessed, and those of them that were kept."""
        self._started = self._guessing = 0.0
        self._watched = False

    def __repr__(self) -> str:
        return f"{self.right} of {self.guessed} guessed ids were right"

    def extend(self, chunks: list[Chunk], cache: PagedCache) -> list[Chunk]:
        """The step with guesses, where all it does is write: reading prompts keeps the processor busy without them."""
        self._started, self._guessing = self.clock(), 0.0
        self._watched = all(c.length == 1 and c.start + 1 == len(c.sample.text.ids) for c in chunks)
        if not self._watched:
            return chunks
        samples = [chunk.sample for chunk in chunks]
        counts = self.goodput.counts(samples, [min(self.most, sample.room) for sample in samples])
        if not any(counts):
            return chunks
        counts = [n if cache.reserve(s.text, n) else 0 for s, n in zip(samples, counts, strict=True)]
        proposals = self.proposer.propose(samples, counts, cache)
        self._guessing = self.clock() - self._started
        return [chunk._replace(guess=tuple(ids)) for chunk, ids in zip(chunks, proposals, strict=True)]

    def learn(self, chunks: list[Chunk]) -> None:
        """What became of the guesses of this step."""
        if not self._watched:
            return
        tried, right = [], []
        for sample, start, length, guess in chunks:
            written = sample.text.ids[start + length :]
            tried.append(min(len(guess), len(written)))
            right.append(sum(a == b for a, b in zip(guess, written, strict=False)))
        sizes = [len(chunk.guess) for chunk in chunks]
        self.guessed, self.right = self.guessed + sum(sizes), self.right + sum(right)
        spent = self.clock() - self._started - self._guessing
        times = Times(sum(sizes), max(sizes), self._guessing, spent)
        self.goodput.learn([chunk.sample for chunk in chunks], tried, right, times)
