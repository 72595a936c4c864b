"""Which tokens a step computes, and whose blocks they are stored in."""

from collections import deque
from typing import NamedTuple

from puna.infer.cache.paged_cache import PagedCache
from puna.infer.sample import Sample


class Chunk(NamedTuple):
    """The ids start .. start + length - 1 of a sample, and what is guessed to follow them."""

    sample: Sample
    start: int
    length: int
    guess: tuple[int, ...] = ()

    @property
    def ids(self) -> list[int]:
        """What is computed."""
        return [*self.sample.text.ids[self.start : self.start + self.length], *self.guess]


class Scheduler:
    """Samples that wait and samples that are being written, the oldest first.

    Args:
        batch: most samples written at a time.
        chunk: most tokens of a step, as long as every sample that is being written gets one.
    """

    def __init__(self, cache: PagedCache, batch: int, chunk: int):
        self.cache, self.batch, self.chunk = cache, batch, chunk
        self.waiting: deque[Sample] = deque()
        self.running: list[Sample] = []

    def plan(self) -> list[Chunk]:
        """The next step: a token of everything that is being written, then as much of the prompts as fits."""
        budget = max(self.chunk, len(self.running))
        share: dict[Sample, int] = {}
        for each in sorted(self.running, key=lambda s: s.goal - s.text.stored > 1):  # stable: the oldest first
            self.cache.take_shared(each.text, each.reusable)
            share[each] = min(each.goal - each.text.stored, budget)
            budget -= share[each]
        chunks = []
        for each in list(self.running):  # by age: those who lose their blocks come last, with nothing planned yet
            if each in self.running and share[each] and self._make_room(each, share[each]):
                chunks.append(self._chunk(each, share[each]))
        return chunks + self._admit(budget)

    def remove(self, each: Sample) -> None:
        """It is not computed any further."""
        if each in self.running:
            self.running.remove(each)
        elif each in self.waiting:  # thousands may wait
            self.waiting.remove(each)
        self.cache.end(each.text)

    def _make_room(self, each: Sample, count: int) -> bool:
        """Blocks for the next `count` ids, if need be those of the youngest, who will be computed again."""
        while not self.cache.reserve(each.text, count):
            youngest = self.running.pop()
            self.cache.end(youngest.text)
            self.waiting.appendleft(youngest)
            if youngest is each:
                return False
        return True

    def _admit(self, budget: int) -> list[Chunk]:
        """Begin with those who wait, while there is room for them and for one more block of everybody."""
        chunks, later = [], []
        while self.waiting and budget > 0 and len(self.running) < self.batch:
            each = self.waiting.popleft()
            if not self.cache.begin(each.text, each.first_key, each.reusable):
                later.append(each)  # another one computes its beginning in this step
                continue
            count = min(each.goal - each.text.stored, budget)
            if not self.cache.reserve(each.text, count, spare=len(self.running)):
                self.cache.end(each.text)
                later.append(each)
                break
            self.running.append(each)
            chunks.append(self._chunk(each, count))
            budget -= count
        self.waiting.extendleft(reversed(later))
        return chunks

    def _chunk(self, each: Sample, count: int) -> Chunk:
        start = each.text.stored
        self.cache.plan(each.text, count)
        return Chunk(each, start, count)
