"""Keys and values of the tokens seen so far, in fixed slots: row b keeps position p in slot p."""

import torch
from torch import Tensor

from puna.model.config import ModelConfig


class KVCache:
    """An argument of `Transformer.forward`, never hidden in it. Rows may have different lengths (ragged batches)."""

    def __init__(self, config: ModelConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device):
        shape = (config.n_layers, batch, config.n_kv_heads, length, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def update(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, K, T, D) at `positions` (B, T); return everything stored: (B, K, length, D) each."""
        slots = positions[:, None, :, None].expand_as(k)
        self.keys[layer].scatter_(2, slots, k)
        self.values[layer].scatter_(2, slots, v)
        return self.keys[layer], self.values[layer]

    def begin_with(self, one: "KVCache") -> None:
        """Every row begins with what the only row of `one` holds."""
        length = one.keys.shape[3]
        self.keys[:, :, :, :length] = one.keys
        self.values[:, :, :, :length] = one.values

    def mask(self, positions: Tensor) -> Tensor:
        """(B, 1, T, length): a query sees the slots up to its own position. What padding wrote lies beyond it."""
        slots = torch.arange(self.keys.shape[3], device=positions.device)
        return slots <= positions[:, None, :, None]
