"""What tests/test_methods.py runs through the sft recipe, by itself and as two ranks. Imports nothing slow."""

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from puna.checkpoint.train_state import TrainState
from puna.data.loader import Batch
from puna.dist import collectives
from puna.dist.collectives import process_group
from puna.dist.fsdp import gathered
from puna.log import setup_logging
from puna.ranks import rank
from puna.recipes import run, sft
from puna.train.fit import train_step
from puna.train.optim import OptimizerConfig, build_optimizer


class Prepared(NamedTuple):
    """What the recipe hands to `fit`."""

    model: Any
    batches: Any
    objective: Any


def prepare(words: dict[str, Any], use: Any = None) -> Prepared:
    """Run the recipe with a `fit` that trains nothing; `use` is called in its place, while ranks are connected."""
    found: list[Prepared] = []

    def instead(run: Any, model: Any, batches: Any, objective: Any, *_: Any) -> TrainState:
        found.append(Prepared(model, batches, objective))
        if use is not None:
            use(found[-1])
        return TrainState()

    whole, sft.fit = (sft.fit, sft.use_machine), instead
    sft.use_machine = lambda run: None  # which measures threads, longer than all else takes
    try:
        run("sft", **words)
    finally:
        sft.fit, sft.use_machine = whole
    return found[-1]


def gradients(prepared: Prepared, micro: Sequence[Batch]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The row and the whole gradients of a step over `micro`, on rank 0."""
    model, kept = prepared.model, {}

    def keep(*_: float) -> bool:
        kept.update(gathered({n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        return False

    row = train_step(model, build_optimizer(model, OptimizerConfig()), micro, prepared.objective, 1e-3, 0, keep)
    return row, {name: gradient.clone() for name, gradient in kept.items()}


def first_step(words: dict[str, Any], file: Path) -> None:
    """The recipe's first step of two micro-batches: what it tells and its gradients, into `file`."""

    def save(prepared: Prepared) -> None:
        row, found = gradients(prepared, [next(prepared.batches), next(prepared.batches)])
        if rank() == 0:
            torch.save({"row": torch.tensor([row["loss"], row["n"]], dtype=torch.float64), **found}, file)

    prepare(words, save)


if __name__ == "__main__":
    folder, methods = Path(sys.argv[1]), json.loads(sys.argv[2])
    setup_logging(-1)
    torch.set_num_threads(1)
    with process_group("cpu"):
        collectives.process_group = contextlib.nullcontext  # the ranks are connected once, not for each run
        for name, words in methods.items():
            first_step({**words, "output": str(folder / name)}, folder / f"{name}.pt")
