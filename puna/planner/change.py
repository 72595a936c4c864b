"""What to change in a config that does not fit: of the changes that alter least, the one that costs least time."""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

from puna.config import RecipeConfig
from puna.errors import UsageError
from puna.planner.memory import fullest
from puna.planner.time import Rates, seconds
from puna.planner.work import Known, Work, work_of

Words = dict[str, Any]
_IN_BACKWARD = {"train.optimizer.in_backward": True, "train.optimizer.clip": 0, "train.skip_budget": 0}


class Change(NamedTuple):
    """Words to type, and what becomes of the run."""

    words: tuple[str, ...]
    memory: float
    seconds: float
    what: str
    """What it changes in what is learned."""


def cheapest(config: RecipeConfig, known: Known, rates: Rates, has: float) -> Change | None:
    """The fastest change that needs at most `has` bytes, of those that alter least; None: nothing here helps."""
    for what, words in _levels(config, known):
        fitting = []
        for more, less in product(words, list(_same_gradient(config, known))):
            work = _changed(config, known, {**less, **more})
            if work is None or (memory := fullest(work).total) > has:
                continue
            fitting.append(Change(typed({**more, **less}), memory, seconds(work, rates), what))
        if fitting:
            return min(fitting, key=lambda change: (round(change.seconds, 3), len(change.words)))
    return None


def typed(words: Mapping[str, Any]) -> tuple[str, ...]:
    """As `key=value`."""
    return tuple(f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in words.items())


def _levels(config: Any, known: Known) -> Iterator[tuple[str, list[Words]]]:
    """What a change alters in the result, from nothing on, and the changes of that kind."""
    asked = config.model_dump()
    yield "the same gradients", [{}]
    train = asked["train"]
    eight = {"train.optimizer.kind": "adamw8bit"} if train["optimizer"]["kind"] == "adamw" and known.ranks == 1 else {}
    early = _IN_BACKWARD if train["accumulate"] == 1 and known.ranks == 1 else {}
    if "lora" not in asked or asked["lora"] is None:
        yield "another optimizer's rounding", [w for w in (eight, early, {**eight, **early}) if w]
    if "lora" not in asked:
        return
    adapters = {} if asked["lora"] else {"lora.rank": 16}
    if adapters:
        yield "adapters are trained, not every weight", [adapters]
    if asked.get("quantize") is None:
        yield "the frozen base is rounded to 4 bits", [{**adapters, "quantize": "nf4"}]
    shorter = asked["seq_len"] // 2
    while shorter >= 128:
        yield "longer texts are cut", [{**adapters, "quantize": "nf4", "seq_len": shorter}]
        shorter //= 2


def _same_gradient(config: Any, known: Known) -> Iterator[Words]:
    """Checkpointing, and fewer rows at a time with more micro-batches a step: the loss is the same."""
    rows, accumulate = config.batch_size, config.train.accumulate
    splits: list[Words] = [{}]
    while rows % 2 == 0 and rows // 2 >= known.ranks:
        rows, accumulate = rows // 2, 2 * accumulate
        splits.append({"batch_size": rows, "train.accumulate": accumulate})
    stronger = {"none": ("selective", "full"), "selective": ("full",), "full": ()}
    kinds: list[Words] = [{}]
    kinds += [{"train.checkpoint_activations": k} for k in stronger[config.train.checkpoint_activations]]
    yield from ({**kind, **split} for kind, split in product(kinds, splits))


def _changed(config: RecipeConfig, known: Known, words: Words) -> Work | None:
    """The work under these words; None where the config refuses them, or they exclude one another."""
    if "train.optimizer.in_backward" in words and "train.accumulate" in words:
        return None
    values = config.model_dump()
    for key, value in words.items():
        at = values
        *above, last = key.split(".")
        for name in above:
            at[name] = at = dict(at[name] or {})
        at[last] = value
    try:
        return work_of(type(config).model_validate(values), known)
    except (UsageError, ValueError):
        return None
