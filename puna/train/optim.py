"""The optimizer and the learning rate of a step."""

import math

import torch
from pydantic import NonNegativeFloat
from torch import nn

from puna.config import Config


class OptimizerConfig(Config):
    """AdamW with the values of LLaMA 1 and 2, and their schedule: linear warm-up, cosine to a tenth."""

    lr: NonNegativeFloat | None = None
    """Peak learning rate; higher learns faster until it diverges. null: 1.2 / dim, see `peak_rate`."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Of matrices; norms have none."""
    clip: float = 1.0
    """Largest norm of the whole gradient; 0 does not clip."""
    warmup_steps: int = 100
    final_lr: float = 0.1
    """Where the cosine ends, as a share of lr."""


def peak_rate(dim: int) -> float:
    """1.2 / dim: what the papers chose at their widths (3e-4 at 4,096, 1.5e-4 at 8,192, 8e-5 at 16,384)."""
    return 1.2 / dim


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; only tensors with two or more dimensions decay. `fit` sets the rate."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(step: int, steps: int, peak: float, config: OptimizerConfig) -> float:
    """Rate of `step` (from 0) in a run of `steps`: up over warmup_steps, then half a cosine to final_lr x peak."""
    warmup = min(config.warmup_steps, steps // 2)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))
