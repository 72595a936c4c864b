"""Distillation (Hinton et al. 2015): a student learns the rows' words and what a frozen teacher thinks of them."""

from typing import Literal

import torch
from pydantic import Field

from puna.config import Config
from puna.data.loader import Batch
from puna.model.transformer import Transformer
from puna.ops.divergence import Mix, linear_distillation
from puna.train.objectives import Loss


class DistillConfig(Config):
    """Learn from a larger model of the same tokenizer."""

    teacher: str
    """Any model that puna loads, quantized ones too. It is held beside the student, and adds a forward to each step."""
    ratio: float = Field(default=0.5, ge=0, le=1)
    """Share of the divergence in the loss. Higher: nearer to the teacher, less to the rows; 1 ignores their labels."""
    divergence: Literal["forward", "reverse", "symmetric"] = "forward"
    """forward: KL(teacher || student), covers all that the teacher finds possible; reverse: KL(student || teacher),
    keeps to what it finds likely; symmetric: their mean."""
    temperature: float = Field(default=1.0, gt=0)
    """Both distributions' logits are divided by it. Higher: more weight on the unlikely ids."""


def distill(model: Transformer, batch: Batch, *, teacher: Transformer, mix: Mix) -> Loss:
    """Sum over the trained positions of (1 - ratio) * -log p(next token) + ratio * divergence from the teacher."""
    with torch.no_grad():
        known = teacher(batch.tokens, positions=batch.positions, mask=batch.documents, head=False).flatten(0, 1)
    hidden = model(batch.tokens, positions=batch.positions, mask=batch.documents, head=False).flatten(0, 1)
    weight, labels = model.lm_head.weight, batch.labels.flatten()
    total, cross_entropy, divergence = linear_distillation(hidden, weight, known, teacher.lm_head, labels, mix)
    return Loss(total, {"cross_entropy": cross_entropy, "divergence": divergence})
