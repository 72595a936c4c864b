"""Keys and values of the tokens seen so far: an argument of `Transformer.forward`, never hidden in it."""

from typing import Protocol

import torch
from torch import Tensor

from puna.model.config import ModelConfig
from puna.ops.attention import Mask, attention


class Cache(Protocol):
    """What a forward asks of a cache, whatever its layout: where to put keys and values, what a query sees of them."""

    def mask(self, positions: Tensor) -> Mask:
        """What queries at `positions` (B, T) may see; once a forward, handed to every layer's `attend`."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, mask: Mask) -> Tensor:
        """Store k, v (B, K, T, D) of a layer, then attend with q (B, H, T, D): heads (B, H, T, D)."""
        ...


class KVCache:
    """Fixed slots: row b keeps position p in slot p. Rows may have different lengths (ragged batches)."""

    def __init__(self, config: ModelConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device):
        shape = (config.n_layers, batch, config.n_kv_heads, length, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, mask: Mask) -> Tensor:
        """See `Cache`."""
        return attention(q, *self.update(layer, k, v, positions), mask)

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
