"""What a training step eats."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows of tokens with the label of every position."""

    tokens: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64: the next token, IGNORE where nothing is trained
    n: int
    """Trained tokens. `fit` divides the step's loss by the sum of these over micro-batches and ranks."""

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.tokens.to(device), self.labels.to(device), self.n)
