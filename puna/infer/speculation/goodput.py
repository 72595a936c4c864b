"""How much guessing pays: the ids a second that a step is expected to bring, by measured costs and measured luck."""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from puna.infer.sample import Sample

_ALLOWANCE = 0.015  # of the time may be lost by trying
_TRIAL = 3  # ids guessed where guessing did not pay so far
_RETRY = 512  # steps after which it is tried whatever it cost
_MARGIN = 1.05  # what guessing has to promise: less is within the error of measures
_REMEASURE = 64  # steps after which a plain one is measured again: a machine changes


@dataclass
class Luck:
    """How often guesses were right; recent ones count more."""

    right: float = 1.0
    tried: float = 2.0

    def learn(self, right: int, tried: int) -> None:
        self.right = 0.8 * self.right + right
        self.tried = 0.8 * self.tried + tried

    @property
    def rate(self) -> float:
        """The probability that the next guess is right; never quite 0 or 1."""
        return min(0.99, (self.right + 0.02) / (self.tried + 0.04))


class Measures:
    """Seconds of something that is measured again and again on a machine that is interrupted."""

    def __init__(self) -> None:
        self.latest: deque[float] = deque(maxlen=8)
        self.last = 0

    def add(self, seconds: float, now: int) -> None:
        self.latest.append(seconds)
        self.last = now

    def known(self, now: int) -> bool:
        """Whether they are to be trusted: the fewer they are, the sooner they are forgotten, and so tried again."""
        return bool(self.latest) and now - self.last <= _REMEASURE * len(self.latest)

    @property
    def typical(self) -> float:
        """The least: interruptions only add. 0 if there is none."""
        return min(self.latest, default=0.0)


class Goodput:
    """Chooses the guesses of a step so that most ids come a second (goodput, Liu et al. 2024, arXiv 2406.14066).

    The j-th guess of a text is worth rate^j ids and costs a row, and for drafts a step of the draft. Guesses are taken
    from the best on while they raise the expected ids a second. A wrong estimate cannot cost much: what guessing lost
    is on an account that gets a small part of all time, and nothing is guessed while it is overdrawn.
    """

    def __init__(self) -> None:
        self._step: defaultdict[int, Measures] = defaultdict(Measures)
        self._guess = Measures()
        self._credit = 0.0
        self._steps = self._since_plain = self._since_guess = 0
        self._lucks: WeakKeyDictionary[Sample, Luck] = WeakKeyDictionary()
        self._everyone = Luck()

    def counts(self, samples: Sequence[Sample], rooms: Sequence[int]) -> list[int]:
        """How many ids to guess for each sample, at most its room."""
        nothing = [0] * len(samples)
        alone = self._step[_rounded(len(samples))]
        if len(alone.latest) < 2 or not alone.known(self._steps) or self._since_plain >= _REMEASURE:
            return nothing
        if self._since_guess >= _RETRY:
            return [min(room, _TRIAL) for room in rooms]
        if self._credit < 0:
            return nothing
        return self._best(samples, rooms) or self._trial(samples, rooms) or nothing

    def learn(self, samples: Sequence[Sample], guessed: Sequence[int], right: Sequence[int], times: "Times") -> None:
        """What a step that only wrote came to.

        Args:
            guessed: how many guesses of each sample were looked at: up to and including the first wrong one.
        """
        plain, rows = len(samples), len(samples) + times.guesses
        self._steps += 1
        self._step[_rounded(rows)].add(times.step, self._steps)
        self._since_plain = self._since_plain + 1 if times.guesses else 0
        self._since_guess = 0 if times.guesses else self._since_guess + 1
        if times.depth:
            self._guess.add(times.guessing / times.depth, self._steps)
        for sample, tried, good in zip(samples, guessed, right, strict=True):
            if tried:
                self._luck(sample).learn(good, tried)
                self._everyone.learn(good, tried)
        cost = self.seconds(rows) + (times.depth * self._guess.typical if times.depth else times.guessing)
        value = (plain + sum(right)) * self.seconds(plain) / plain
        self._credit = min(self._credit + value - cost + _ALLOWANCE * cost, 16 * self.seconds(plain))

    def seconds(self, rows: int) -> float:
        """What a step of so many rows takes: as measured, on the line between two measures, or more than the last."""
        return self._costs([rows])[0]

    def _costs(self, rows: Sequence[int]) -> list[float]:
        """The same for ascending numbers of rows."""
        known = sorted((r, m.typical) for r, m in self._step.items() if m.known(self._steps))
        if not known:
            return [0.0] * len(rows)
        costs, at, least = list[float](), 0, 0.0
        for count in rows:
            while at < len(known) and known[at][0] <= count:
                least, at = max(least, known[at][1]), at + 1  # no step gets faster by more rows
            if 0 < at < len(known):
                (r, before), (s, after) = known[at - 1], known[at]
                costs.append(max(least, before + (after - before) * (count - r) / (s - r)))
            elif at:
                last = known[-1][0]
                costs.append(least * (1 + (count - last) / (last + 16)))
            else:
                costs.append(known[0][1])
        return costs

    def _best(self, samples: Sequence[Sample], rooms: Sequence[int]) -> list[int] | None:
        """The number of guesses that brings most ids a second; None: no guess does better than none."""
        rates = [self._luck(sample).rate for sample in samples]
        guesses = sorted((-(rates[i] ** j), j, i) for i, room in enumerate(rooms) for j in range(1, room + 1))
        plain = len(samples)
        alone, *costs = self._costs(range(plain, plain + len(guesses) + 1))
        gained, depth, best, taken = float(plain), 0, _MARGIN * plain / alone, 0
        for count, ((minus, j, _), cost) in enumerate(zip(guesses, costs, strict=True), 1):
            gained, depth = gained - minus, max(depth, j)
            if (goodput := gained / (cost + depth * self._guess.typical)) > best:
                best, taken = goodput, count
        counts = [0] * plain
        for _, _, i in guesses[:taken]:
            counts[i] += 1
        return counts if taken else None

    def _trial(self, samples: Sequence[Sample], rooms: Sequence[int]) -> list[int] | None:
        """A few guesses for the sample that has tried least, if the account has what they cost."""
        chosen = min(
            (i for i, room in enumerate(rooms) if room), key=lambda i: self._luck(samples[i]).tried, default=None
        )
        if chosen is None:
            return None
        count, plain = min(_TRIAL, rooms[chosen]), len(samples)
        if self._credit < self.seconds(plain + count) - self.seconds(plain) + count * self._guess.typical:
            return None
        return [count if i == chosen else 0 for i in range(plain)]

    def _luck(self, sample: Sample) -> Luck:
        """A new text begins with what the others see."""
        if sample not in self._lucks:
            self._lucks[sample] = Luck(2 * self._everyone.rate, 2.0)
        return self._lucks[sample]


@dataclass(frozen=True)
class Times:
    """Of one step."""

    guesses: int
    """Ids guessed, of all samples together."""
    depth: int
    """The most of one sample."""
    guessing: float
    """Seconds spent on guessing."""
    step: float
    """Seconds of the rest."""


def _rounded(rows: int) -> int:
    """Rows in steps of a quarter, exact up to 16: one measure for what costs about the same."""
    step = max(1, 1 << max(0, rows.bit_length() - 4))
    return -(-rows // step) * step
