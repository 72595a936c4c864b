"""The optimizer and the learning rate of a step."""

import contextlib
import math
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from puna.config import Config
from puna.errors import UsageError
from puna.log import log
from puna.train.adamw8bit import AdamW8bit
from puna.train.muon import Muon


class OptimizerConfig(Config):
    """AdamW with the values of LLaMA 1 and 2, and their schedule: linear warm-up, cosine to a tenth."""

    kind: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """adamw8bit: moments in 2 bytes a weight instead of 8, for some time in each step. muon: orthogonal updates for the
    matrices of the blocks, AdamW for the rest; learns faster from nothing."""
    in_backward: bool = False
    """Step each weight as soon as its gradient is whole, and free it: saves a gradient of every weight but the largest.
    Costs clipping, accumulation and the skipping of bad steps, which need all gradients at once."""
    muon_lr: NonNegativeFloat = 0.02
    """Peak rate of Muon's matrices; `lr` stays that of the rest."""
    lr: NonNegativeFloat | None = None
    """Peak learning rate; higher learns faster until it diverges. null: pretraining takes 1.2 / dim."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Of matrices; norms have none."""
    clip: float = 1.0
    """Largest norm of the whole gradient; 0 does not clip."""
    warmup_steps: int = 100
    final_lr: float = 0.1
    """Where the cosine ends, as a share of lr."""


def with_rate(config: OptimizerConfig, dim: int) -> OptimizerConfig:
    """Where no rate is given, 1.2 / dim, as the papers chose: 3e-4 at 4,096, 1.5e-4 at 8,192, 8e-5 at 16,384."""
    if config.lr is not None:
        return config
    log.info("peak learning rate: %.2g (1.2 / dim)", 1.2 / dim)
    return config.model_copy(update={"lr": 1.2 / dim})


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (of 32 or 8 bits, or with Muon) over what trains; only tensors with two or more dimensions decay.

    `fit` sets rates: a group's is `rate` times that of the step.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inner = [p for name, p in named if p.ndim == 2 and name.startswith("layers.")] if config.kind == "muon" else []
    orthogonal = {id(p) for p in inner}
    rest = [p for _, p in named if id(p) not in orthogonal]
    rate = config.muon_lr / config.lr if config.lr else 1.0
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay, "rate": 1.0},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0, "rate": 1.0},
        {"params": inner, "weight_decay": config.weight_decay, "rate": rate, "orthogonal": True},
    ]
    groups = [g for g in groups if g["params"]]
    if config.kind == "adamw8bit":
        return AdamW8bit(groups, betas=config.betas, eps=config.eps)
    return (Muon if inner else torch.optim.AdamW)(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)


@contextlib.contextmanager
def stepping_in_backward(optimizer: torch.optim.Optimizer) -> Iterator[dict[Tensor, Tensor]]:
    """Inside the block a backward steps each parameter as soon as its gradient is whole, and frees the gradient.

    Yields the norm of each parameter's gradient. A backward needs no parameter any more whose gradient is whole: also a
    tied one, which has one gradient from all its uses.
    """
    groups, norms = optimizer.param_groups, dict[Tensor, Tensor]()

    def step(group: dict[str, Any], p: Tensor) -> None:
        assert p.grad is not None
        norms[p] = torch.linalg.vector_norm(p.grad)
        optimizer.param_groups = [{**group, "params": [p]}]  # its step looks at no other parameter
        optimizer.step()
        p.grad = None

    hooks = [p.register_post_accumulate_grad_hook(partial(step, g)) for g in groups for p in g["params"]]
    try:
        yield norms
    finally:
        for hook in hooks:
            hook.remove()
        optimizer.param_groups = groups


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Rate of `step` (from 0) in a run of `steps`: up over warmup_steps, then half a cosine to final_lr x lr."""
    if config.lr is None:
        raise UsageError("no learning rate", fix="train.optimizer.lr=1e-4")
    warmup = min(config.warmup_steps, steps // 2)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))
