"""A plan: what a config will take in memory and time, whether this machine has it, and what to change if not."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from puna.config import RecipeConfig
from puna.device import memory, peak_memory
from puna.errors import PunaError
from puna.log import log
from puna.ops.native.allocator import unusable
from puna.planner.activations import kept_by_block
from puna.planner.change import Change, cheapest
from puna.planner.memory import fullest, moments
from puna.planner.time import SPREAD, measured_rates, seconds
from puna.planner.work import Known, know, work_of
from puna.ranks import ranks, started_as


@dataclass(frozen=True)
class Plan:
    """All sizes in bytes, of one rank."""

    memory: dict[str, float]
    """By class, at the fullest moment."""
    when: str
    moments: dict[str, float]
    """The total at each moment."""
    activations: dict[str, float]
    """Bytes a token that one block keeps, by what they are."""
    total: float
    has: float | None
    """What the machine or the device has free; None where nothing tells."""
    seconds_per_step: float
    seconds: float
    """Of all steps; validations and checkpoints not counted."""
    spread: float
    """The times may be off by this share."""
    steps: int
    device: str
    ranks: int
    change: Change | None
    """What makes it fit, where it does not."""
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.has is None or self.total <= self.has

    def as_data(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "change": self.change and self.change._asdict(), "fits": self.fits}


def plan(config: RecipeConfig, count: int | None = None) -> Plan:
    """Predict what a run of `config` takes; nothing is trained, and no weights are read.

    Args:
        count: processes that train together; by default those of this one.

    Raises:
        UsageError: a recipe that trains nothing. CheckpointError, DataError: what the config names is not there.
    """
    known = know(config, count or started_as().ranks)
    work = work_of(config, known)
    full, rates, has = fullest(work), measured_rates(work), _free(known)
    step, steps = seconds(work, rates), work.asked["steps"] or 0
    short = has is not None and full.total > has
    return Plan(
        memory=full.classes, when=full.when, moments={m.when: m.total for m in moments(work)},
        activations=kept_by_block(work), total=full.total, has=has, seconds_per_step=step, seconds=step * steps,
        spread=SPREAD, steps=steps, device=known.device.type, ranks=known.ranks,
        change=cheapest(config, known, rates, has) if short and has is not None else None,
        notes=(*known.notes, *_holes(known), *_not_counted(work.asked)),
    )  # fmt: skip


def forecast_of(config: RecipeConfig) -> Callable[[], dict[str, float] | None]:
    """What foretells a run of `config`, counted from what this process takes by now."""
    return partial(forecast, config, peak_memory(torch.device("cpu")))


def forecast(config: RecipeConfig, before: int) -> dict[str, float] | None:
    """The plan of a run that has started, in two numbers; None, and one line, where it cannot be made.

    Args:
        before: bytes that the process took before it; on a CUDA device they do not count.
    """
    started = time.perf_counter()
    try:
        work = work_of(config, know(config, ranks()))
        taken = before * (work.known.device.type != "cuda")
        made = {"memory": fullest(work).total + taken, "seconds_per_step": seconds(work, measured_rates(work))}
    except (PunaError, RuntimeError, OSError, ValueError, LookupError, AttributeError) as error:
        log.warning("no forecast of memory and time: %s", (str(error).splitlines() or [type(error).__name__])[0][:100])
        return None  # a run is never stopped by its plan
    log.debug("forecast made in %.1f s", time.perf_counter() - started)
    return made


def _free(known: Known) -> float | None:
    """Bytes free for a rank."""
    if known.device.type == "cuda":
        return float(torch.cuda.mem_get_info(known.device)[0])
    free = memory().available
    return None if free is None else free / known.ranks


def _holes(known: Known) -> tuple[str, ...]:
    """Where tensors cannot have the allocator that the planner's shares were measured with."""
    why = unusable()
    if not why or known.device.type != "cpu":
        return ()
    return (f"holes between tensors, of a third of the activations and more, are not counted ({why})",)


def _not_counted(asked: Mapping[str, Any]) -> tuple[str, ...]:
    told = {
        "compile": "compile: compiled blocks keep other tensors, and the compiler takes some 0.3 GB; not counted",
        "distill": "distill: the logits of the teacher are not counted",
        "qat": "qat: what rounding keeps is not counted",
        "rehearse": "rehearse: the cache of generation is not counted",
    }
    return tuple(text for key, text in told.items() if asked.get(key))
