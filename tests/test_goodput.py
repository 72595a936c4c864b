"""When guessing ahead is worth it, on machines of which everything is known."""

import random

import pytest

from puna.infer.request import Request
from puna.infer.sample import Sample
from puna.infer.speculation.goodput import Goodput, Times


class Machine:
    """A step of one row costs a second, each row more `row`, a guess `guess`; a guess is right as often as `luck`."""

    def __init__(self, row: float, guess: float, luck: float, samples: int = 1):
        self.row, self.guess, self.luck, self.random = row, guess, luck, random.Random(0)
        self.goodput = Goodput()
        self.samples = [Sample(i, 0, Request([1]), 10**6, None) for i in range(samples)]
        self.ids, self.seconds = 0, 0.0

    def run(self, steps: int) -> float:
        """How many times as fast as without guessing it was."""
        ids, seconds, plain = self.ids, self.seconds, len(self.samples)
        for _ in range(steps):
            counts = self.goodput.counts(self.samples, [8] * plain)
            right = [next((i for i in range(n) if self.random.random() >= self.luck), n) for n in counts]
            tried = [min(n, good + 1) for n, good in zip(counts, right, strict=True)]
            noise = self.random.choice([1.0, 1.0, 1.0, 1.1, 3.0])
            step, guessing = noise * (1 + self.row * (plain - 1 + sum(counts))), noise * self.guess * max(counts)
            self.goodput.learn(self.samples, tried, right, Times(sum(counts), max(counts), guessing, step))
            self.ids, self.seconds = self.ids + plain + sum(right), self.seconds + (step + guessing) / noise
        return (self.ids - ids) / (self.seconds - seconds) * (1 + self.row * (plain - 1)) / plain


CASES = {  # row, guess, luck, samples: at least so many times as fast
    "a copy, looked up": (0.03, 0.0, 0.97, 1, 5.0),
    "a good draft": (0.05, 0.15, 0.8, 1, 1.5),
    "a draft as slow as the model": (0.05, 1.0, 0.9, 1, 0.97),
    "a bad draft": (0.05, 0.3, 0.1, 1, 0.97),
    "wrong look-ups": (0.1, 0.0, 0.02, 1, 0.97),
    "a full batch: a row costs as much as a text": (1.0, 0.0, 0.7, 16, 0.97),
    "a batch that leaves room": (0.02, 0.05, 0.8, 4, 1.8),
}


@pytest.mark.parametrize("name", CASES)
def test_guessing_goes_on_only_where_it_pays(name: str) -> None:
    """Speculation that makes texts come later: from the first 200 steps on, on a machine that is interrupted."""
    row, guess, luck, samples, least = CASES[name]
    machine = Machine(row, guess, luck, samples)
    assert machine.run(200) >= (0.97 if least < 1 else 0.9 * least)
    assert machine.run(2000) >= least


def test_guessing_comes_back_when_the_text_changes() -> None:
    """Switched off for ordinary text, and then the model begins to copy; and the other way round."""
    machine = Machine(0.05, 0.1, 0.05)
    assert machine.run(500) >= 0.97
    machine.luck = 0.95
    machine.run(100)
    assert machine.run(300) > 2
    machine.luck = 0.0
    machine.run(100)
    assert machine.run(1000) >= 0.97


def test_a_text_is_guessed_by_its_own_luck() -> None:
    """One text that copies among others that do not: guesses for all of them cost more than they bring."""
    machine = Machine(0.1, 0.0, 0.0, samples=4)
    machine.run(100)
    lucky = machine.samples[2]
    for _ in range(20):
        times = Times(4, 4, 0.0, 1.7)
        machine.goodput.learn(machine.samples, [0, 0, 4, 0], [0, 0, 4, 0], times)
    counts = machine.goodput.counts(machine.samples, [8] * 4)
    assert lucky is machine.samples[counts.index(max(counts))]
    assert sum(counts) == max(counts) > 2
