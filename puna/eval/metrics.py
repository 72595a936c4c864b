"""What answers are worth: values for each question, then means with 95 % intervals."""

import math
import re
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from puna.eval.question import Question
from puna.eval.tasks import Interval, Score, Z, gain
from puna.infer.request import Likelihood

Values = dict[str, float]
METRICS = {
    "acc": "the right answer has the highest log-likelihood",
    "acc_norm": "the highest log-likelihood per character of the answer, without the space before it",
    "acc_bytes": "the highest log-likelihood per UTF-8 byte of the answer, without the space before it",
    "acc_uncond": "the highest gain of log-likelihood over the answer without its question",
    "acc_macro": "mean over the subjects of acc",
    "greedy": "each token of the answer is the most likely one",
    "nll": "-log p of the right answer, nats",
    "perplexity": "exp of the mean nll of an answer",
    "bits_per_byte": "-log2 p of the right answer per UTF-8 byte of it, without the space before it; mean over answers",
    "exact_match": "the number after #### is right",
    "exact_match_flexible": "the last number is right",
    "pass@1": "expected share of samples that pass all tests",
}


class Measured(NamedTuple):
    """A metric over all questions of a task, with its 95 % interval."""

    metric: str
    low: float
    value: float
    high: float
    n: int

    @property
    def about(self) -> str:
        k = self.metric.removeprefix("pass@")
        return METRICS.get(self.metric, f"chance that one of {k} samples passes all tests (Chen et al. 2021)")


def of_choices(question: Question, found: Sequence[Likelihood], alone: Sequence[Likelihood] = ()) -> Values:
    """Of a question with several answers. A tie goes to the first one."""
    totals = [each.total for each in found]
    answers = [text.removeprefix(" ") for text in question.continuations]
    scored = {
        "acc": totals,
        "acc_norm": [t / max(1, len(a)) for t, a in zip(totals, answers, strict=True)],
        "acc_bytes": [t / max(1, len(a.encode())) for t, a in zip(totals, answers, strict=True)],
    }
    if alone:
        scored["acc_uncond"] = [t - a.total for t, a in zip(totals, alone, strict=True)]
    values = {name: float(row.index(max(row)) == question.gold) for name, row in scored.items()}
    return values | {"bits_per_byte": _bits_per_byte(answers[question.gold], totals[question.gold])}


def of_one(question: Question, found: Likelihood) -> Values:
    """Of a question with one answer, given."""
    bits = _bits_per_byte(question.continuations[0].removeprefix(" "), found.total)
    return {"greedy": float(found.greedy), "nll": -found.total, "bits_per_byte": bits}


def of_numbers(reply: str, right: str) -> Values:
    """GSM8K: the number behind ####, or the last one at all."""
    marked = re.search(r"#### (\-?[0-9.,]+)", reply)
    numbers = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", reply)
    wanted = _plain(right)
    return {
        "exact_match": float(marked is not None and _plain(marked[1]) == wanted),
        "exact_match_flexible": float(bool(numbers) and _plain(numbers[-1]) == wanted),
    }


def of_passed(passed: Sequence[bool]) -> Values:
    """pass@k for k = 1, 10, 100 as far as there are samples: 1 - C(n - c, k) / C(n, k), unbiased (Chen et al. 2021)."""
    n, c = len(passed), sum(passed)
    return {f"pass@{k}": 1 - math.comb(n - c, k) / math.comb(n, k) for k in (1, 10, 100) if k <= n}


def measure(values: Sequence[Values], groups: Sequence[str]) -> list[Measured]:
    """Every metric over all questions; `groups` names the subject of each."""
    found = [_mean(name, [each[name] for each in values]) for name in values[0]]
    subjects = dict.fromkeys(groups)
    if len(subjects) > 1 and "acc" in values[0]:
        found.insert(1, _macro([[v["acc"] for v, g in zip(values, groups, strict=True) if g == s] for s in subjects]))
    if "nll" in values[0]:
        nll = next(each for each in found if each.metric == "nll")
        found.append(Measured("perplexity", _exp(nll.low), _exp(nll.value), _exp(nll.high), nll.n))
    return found


def _mean(name: str, row: Sequence[float]) -> Measured:
    if set(row) <= {0.0, 1.0}:
        low, value, high = Score(name, "".join("01"[int(x)] for x in row)).interval
        return Measured(name, low, value, high, len(row))
    error = statistics.stdev(row) / math.sqrt(len(row)) if len(row) > 1 else math.inf
    return Measured(name, *_normal(statistics.fmean(row), error), len(row))


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _macro(subjects: Sequence[Sequence[float]]) -> Measured:
    """The mean of means, each with a doubt of its own (Agresti and Coull's, which is honest near 0 and 1)."""
    near = [((sum(row) + 2) / (len(row) + 4), len(row) + 4) for row in subjects]
    error = math.sqrt(sum(p * (1 - p) / n for p, n in near)) / len(near)
    low, value, high = _normal(statistics.fmean(map(statistics.fmean, subjects)), error)
    return Measured("acc_macro", max(0.0, low), value, min(1.0, high), sum(map(len, subjects)))


def _normal(mean: float, error: float) -> Interval:
    return mean - Z * error, mean, mean + Z * error


def _bits_per_byte(answer: str, total: float) -> float:
    return -total / math.log(2) / max(1, len(answer.encode()))


def _plain(number: str) -> str:
    """lm-eval's way to compare: without $ and commas, what comes before ####, and a dot at the end."""
    number = re.sub(r"(?s).*#### ", "", re.sub(r"[,$]", "", number))
    return re.sub(r"\.$", "", number).strip().lower()


def gained(before: Sequence[Values], after: Sequence[Values]) -> Measured:
    """After minus before on the same questions, paired, in the first metric that is a share of them."""
    name = next((each for each in after[0] if each not in ("nll", "bits_per_byte")), "bits_per_byte")
    rows = [[each[name] for each in side] for side in (before, after)]
    if {*rows[0], *rows[1]} <= {0.0, 1.0}:
        marks = ["".join("01"[int(x)] for x in row) for row in rows]
        return Measured(name, *gain(Score(name, marks[0]), Score(name, marks[1])), len(after))
    return _mean(name, [a - b for b, a in zip(*rows, strict=True)])
