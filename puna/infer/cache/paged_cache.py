"""Keys and values of many texts in one pool of blocks; equal beginnings are kept once."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from puna.infer.cache.blocks import Blocks, key_of
from puna.model.config import ModelConfig
from puna.ops.attention import Mask
from puna.ops.paged_attention import BLOCK, Piece, Pieces, paged_attention

_WORTH_WAITING = 8  # ids: computing fewer of them again costs less than a step of delay


@dataclass(eq=False)
class CachedText:
    """A text as the cache knows it."""

    ids: list[int]
    """All of it; grows at the end."""
    stored: int = 0
    """How many of them have their keys and values in the cache, after the step that is being planned."""
    table: list[int] = field(default_factory=list)
    """Block i holds the ids from i * BLOCK on."""
    key: bytes = b""
    """Names the blocks that are full, and what else their content depends on."""


class PagedCache:
    """A pool of `count` blocks for a model of this shape. Its memory is taken at first use and given back by `release`.

    A text begins with what the cache already has of it, reserves blocks for the ids it goes on with, and ends.
    """

    def __init__(self, config: ModelConfig, count: int, dtype: torch.dtype, device: torch.device):
        self.shape = (config.n_layers, count, config.n_kv_heads, BLOCK, config.head_dim)
        self.dtype, self.device = dtype, device
        self.blocks = Blocks(count)
        self._pool: tuple[Tensor, Tensor] | None = None
        self._clean = 0

    @property
    def pool(self) -> tuple[Tensor, Tensor]:
        """Keys and values, (layers, blocks, K, BLOCK, D) each. Memory that was never written to is not touched."""
        if self._pool is None:
            keys, values = (self._empty() for _ in range(2))
            self._pool, self._clean = (keys, values), 0
        return self._pool

    def _empty(self) -> Tensor:
        """On a card the heads of a token lie side by side, as FlexAttention takes them; on a CPU those of a block."""
        layers, blocks, heads, size, dim = self.shape
        if self.device.type == "cuda":
            return torch.empty((layers, blocks, size, heads, dim), dtype=self.dtype, device=self.device).transpose(2, 3)
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)

    def release(self) -> None:
        """Give the memory back. No text may be using it."""
        self._pool, self.blocks = None, Blocks(self.blocks.count)

    def take(self) -> int:
        """A block for one user; there has to be one available. Its slots are numbers, since 0 * NaN is not masked."""
        block = self.blocks.take()
        for x in self.pool:
            x[:, self._clean : block + 1] = 0
        self._clean = max(self._clean, block + 1)
        return block

    def begin(self, text: CachedText, first_key: bytes, reuse: int) -> bool:
        """Take what is cached of the first `reuse` ids. False, with nothing taken: the next step will have more of it.

        Args:
            first_key: of what keys and values depend on besides ids: the state of the weights, an adapter.
        """
        text.key = first_key
        self.take_shared(text, reuse)
        found = self.blocks.beginning(text.key, text.ids[text.stored : min(reuse, text.stored + BLOCK)])
        if found is not None and found.length >= _WORTH_WAITING and not found.ready:
            self.end(text)
            return False
        if found is not None and found.length and found.ready and self.blocks.available:
            block = self.take()
            for x in self.pool:
                x[:, block] = x[:, found.block]
            text.table.append(block)
            self.plan(text, found.length)
        return True

    def take_shared(self, text: CachedText, reuse: int) -> None:
        """Use the full blocks that hold what comes next of the first `reuse` ids."""
        while text.stored % BLOCK == 0 and text.stored + BLOCK <= reuse:
            key = key_of(text.key, text.ids[text.stored : text.stored + BLOCK])
            if (block := self.blocks.find(key)) is None:
                return
            self.blocks.share(block)
            text.table.append(block)
            text.key, text.stored = key, text.stored + BLOCK

    def reserve(self, text: CachedText, count: int, spare: int = 0) -> bool:
        """Blocks for the next `count` ids; False, with none taken, where that leaves fewer than `spare` to others."""
        wanted = -(-(text.stored + count) // BLOCK) - len(text.table)
        if wanted > 0 and wanted + spare > self.blocks.available:
            return False
        text.table += [self.take() for _ in range(wanted)]
        return True

    def plan(self, text: CachedText, count: int) -> None:
        """The next `count` ids are stored by this step, so others may build on them."""
        while count:
            ids = text.ids[text.stored : text.stored + min(count, BLOCK - text.stored % BLOCK)]
            text.key = self.blocks.write(text.table[text.stored // BLOCK], text.key, ids) or text.key
            text.stored, count = text.stored + len(ids), count - len(ids)

    def end(self, text: CachedText) -> None:
        """The text is not computed any further. Its last blocks are the first to be overwritten."""
        for block in reversed(text.table):
            self.blocks.give(block)
        text.table, text.stored = [], 0

    def step(self, pieces: list[Piece]) -> "StepCache":
        """What a forward over these pieces, one after another in a flat row, takes as its cache."""
        return StepCache(*self.pool, Pieces(pieces, self.device))


class StepCache:
    """The pool as one forward sees it (a `Cache`)."""

    def __init__(self, keys: Tensor, values: Tensor, pieces: Pieces):
        self.keys, self.values, self.pieces = keys, values, pieces

    def mask(self, positions: Tensor) -> Mask:
        """None: the pieces know what they see."""
        return None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, mask: Mask) -> Tensor:
        """See `Cache`; q (1, H, N, D)."""
        return paged_attention(q, k, v, self.keys[layer], self.values[layer], self.pieces)
