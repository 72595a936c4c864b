"""The checks of `puna doctor MODEL --data FILE`, as a table, and what runs them."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from puna.eval.doctor import data_checks as data
from puna.eval.doctor import model_checks as model
from puna.eval.doctor import training_checks as training
from puna.eval.doctor.case import TOLERANCE, Case
from puna.log import log


def _always(case: Case) -> bool:
    return True


def _chat(case: Case) -> bool:
    return case.chat is not None


def _small(case: Case) -> bool:
    return case.small


def exact(case: Case) -> float:
    return 0.0


def close(case: Case) -> float:
    return TOLERANCE[case.dtype]


def angles(case: Case) -> float:
    """RoPE's angles are fp32: at position p they are off by up to p x 6e-8."""
    return max(close(case), 2e-6 * (64 + model.shift(case)))


@dataclass(frozen=True)
class Check:
    """What is compared, how far apart it may be, and what it usually is if it is not."""

    name: str
    compares: str
    measure: Callable[[Case], data.Parts]
    tolerance: Callable[[Case], float]
    cause: str
    applies: Callable[[Case], bool] = _always


CHECKS = (
    Check("round-trip", "decode(encode(text)) = text", data.round_trip, exact,
          "a tokenizer that normalises text, or a vocabulary larger than the embedding"),
    Check("control", "typed control strings stay text", data.control, exact,
          "a tokenizer.json whose control tokens are ordinary words of the vocabulary"),
    Check("bos", "one BOS at the start", data.bos, exact, "template and tokenizer both add it"),
    Check("mask", "trained = the answers and their ends", data.mask, exact,
          "a template that puts other text into the assistant's turn, or does not end it", _chat),
    Check("stop", "a trained end stops generation", data.stop, exact,
          "generation_config.json or tokenizer_config.json lack the template's end of turn", _chat),
    Check("prompt", "asked as it was trained", data.prompt, exact,
          "add_generation_prompt of the template differs from its assistant turn", _chat),
    Check("labels", "labels = next ids, positions from 0", data.labels, exact, "a shift that is missing or made twice"),
    Check("disk", "logits = a Llama written out from disk", model.disk, close,
          "RoPE's theta, scaling or layout, norm eps, head sizes, a tied head: config.json and the weights disagree"),
    Check("causality", "a later id changes no earlier logit", model.causality, close,
          "an attention mask that is off by one"),
    Check("positions", "only distances count", model.positions, angles, "RoPE on values, or absolute positions"),
    Check("batch", "rows side by side = each alone", model.batch, close, "padding is attended to"),
    Check("cache", "through the cache = one forward", model.cache, close, "positions or slots off by one"),
    Check("generation", "generated ids = full forwards", model.generation, close,
          "padding, positions or stop ids of a ragged batch"),
    Check("gradients", "a training step = written out", training.gradients, close,
          "labels, masks, a fast kernel's backward, or a loss that is divided twice"),
    Check("accumulation", "micro-batches = one batch", training.accumulation, close,
          "each micro-batch divides by its own count"),
    Check("clipping", "clipped = the gradient, shorter", training.clipping, close, "clipped before it is divided"),
    Check("packing", "packed rows = each alone", training.packing, close, "texts in a row see one another"),
    Check("decay", "matrices decay, norms do not, once", training.decay, exact, "parameter groups of the optimizer"),
    Check("resume", "stopped and resumed = straight", training.resume, exact,
          "moments, random numbers, data position or schedule are not restored"),
    Check("resume-all", "the same with every weight trained", training.resume_weights, exact,
          "moments, data position or schedule are not restored", _small),
    Check("merge", "merged adapter = adapter on its base", training.merge, close, "alpha / rank, or a rounded sum"),
    Check("adapter", "adapter from files = in memory", training.adapter_files, exact, "stored in a smaller dtype"),
    Check("reload", "saved and loaded = in memory", training.reload, exact,
          "stored in a smaller dtype, a second head, or a tokenizer file left behind"),
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """What a check measured. `parts`: each thing compared with its difference; `error`: why it could not finish."""

    name: str
    compares: str
    difference: float
    tolerance: float
    ok: bool
    parts: data.Parts
    cause: str
    error: str
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity."""
        finite = {k: v if math.isfinite(v) else None for k, v in self.parts.items()}
        return {
            **asdict(self),
            "difference": self.difference if math.isfinite(self.difference) else None,
            "parts": finite,
        }


def diagnose(case: Case, only: Sequence[str] = (), checks: Sequence[Check] = CHECKS) -> Iterator[Finding]:
    """Run the checks that apply (or those named), one finding after the other."""
    for check in checks:
        if check.applies(case) and (not only or check.name in only):
            yield examine(case, check)


def examine(case: Case, check: Check) -> Finding:
    """One check. One that cannot finish has failed: the fault may well be what stops it."""
    started = time.perf_counter()
    parts, error = {}, ""
    try:
        with _quiet():
            parts = {name: float(value) for name, value in check.measure(case).items()}
    except Exception as wrong:
        error = f"{type(wrong).__name__}: {wrong}"
    difference = math.inf if error else max(parts.values(), default=0.0)
    tolerance = check.tolerance(case)
    ok = difference <= tolerance
    cause = "" if ok else check.cause
    took = time.perf_counter() - started
    return Finding(check.name, check.compares, difference, tolerance, ok, parts, cause, error, took)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What `fit` and `load` say of themselves would bury the report."""
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
