"""Paged attention by FlexAttention (Dong et al. 2024): one fused kernel that reads the pool where it lies.

Without it a step copies every key and value it looks at. The kernel reads the blocks that a block mask lists, and the
mask function says what is seen of them. Uncompiled, FlexAttention computes the scores of all the pool: a test's oracle.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from puna.log import log
from puna.ops.attention import attention_eager

_QUERIES = 128  # of one row of a block mask: FlexAttention's own size, which its kernels' tiles divide
_NOWHERE = 2**20  # the place in a text's table of blocks that are not in it
_KERNELS = 64  # of one shape of model: a kernel for each size of batch that is captured; torch gives up after 8

Kernel = Callable[[Tensor, Tensor, Tensor, BlockMask], Tensor]


def flex_paged_attention(q: Tensor, keys: Tensor, values: Tensor, mask: BlockMask, kernel: Kernel) -> Tensor:
    """What `flex_mask` lets B texts see of a pool.

    The query heads of a key head are rows of one product, so a key is read once for all of them, however many they are.

    Args:
        q: (B, H, T, D).
        keys, values: (blocks, K, BLOCK, D); laid out as (blocks, BLOCK, K, D), or the pool is copied.

    Returns:
        (B, H, T, D).
    """
    length, kv_heads = q.shape[2], keys.shape[1]
    rows = q.unflatten(1, (kv_heads, -1)).transpose(2, 3).flatten(2, 3)  # (B, K, T*G, D): a row t*G + g
    k, v = (x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for x in (keys, values))  # (1, K, blocks*BLOCK, D)
    return kernel(rows, k, v, mask).unflatten(2, (length, -1)).transpose(2, 3).flatten(1, 2)


def flex_mask(tables: Tensor, positions: Tensor, keys: Tensor, heads: int) -> BlockMask:
    """What B texts see of a pool; made once a step, used by every layer. Nothing in it waits for the device.

    Args:
        tables: (B, M) the blocks of each text; those past the last position do not count.
        positions: (B, T) of the queries, rising.
        keys: (blocks, K, BLOCK, D).
        heads: H.
    """
    (batch, width), (blocks, kv_heads, size, _), device = tables.shape, keys.shape, tables.device
    limits = positions.int().repeat_interleave(heads // kv_heads, 1)  # (B, T*G)
    queries = limits.shape[1]
    place = torch.arange(width, dtype=torch.int32, device=device)
    used = place * size <= limits[:, -1:]
    places = torch.full((batch, blocks + 1), _NOWHERE, dtype=torch.int32, device=device)  # the last: of no block
    places.scatter_(1, torch.where(used, tables, blocks).long(), place.expand(batch, width))
    listed = torch.zeros((batch, blocks), dtype=torch.int32, device=device)
    listed[:, :width] = tables

    def sees(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return places[b, kv // size] * size + kv % size <= limits[b, q]

    # No block is told to be seen in full: where some are, the kernel splits long texts by the size of the pool.
    last = torch.arange(1, -(-queries // _QUERIES) + 1, device=device) * _QUERIES - 1
    counts = (limits[:, last.clamp(max=queries - 1)] // size + 1)[:, None]  # (B, 1, rows)
    rows = listed[:, None, None].expand(-1, 1, counts.shape[2], -1)
    return BlockMask.from_kv_blocks(counts, rows, BLOCK_SIZE=(_QUERIES, size), mask_mod=sees,
                                    seq_lengths=(queries, blocks * size), compute_q_blocks=False)  # fmt: skip


def uncompiled(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """The kernel's oracle."""
    out = flex_attention(q, k, v, block_mask=mask)
    assert isinstance(out, Tensor)
    return out


# Two functions, because compiled code is kept with its function. A kernel for any batch does not split long texts among
# the card's processors; one for a batch of one size does, but would be made again for most steps that read prompts.


def _for_any_batch(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    return uncompiled(q, k, v, mask)


def _for_one_batch(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    return uncompiled(q, k, v, mask)


@cache
def compiled(fixed: bool) -> Kernel:
    """The fused kernel; `fixed`: for batches whose size comes again and again."""
    function = _for_one_batch if fixed else _for_any_batch
    fused = torch.compile(function, dynamic=False if fixed else None, fullgraph=True)

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=_KERNELS):
            return fused(q, k, v, mask)

    return kernel


def usable(q: Tensor, keys: Tensor) -> bool:
    """Whether the fused kernel is to be used for such queries and such a pool: on a card, once it was right there."""
    return q.device.type == "cuda" and _right(q.device, q.dtype, q.shape[1] // keys.shape[1], *keys.shape[2:])


@cache
def _right(device: torch.device, dtype: torch.dtype, shared: int, size: int, dim: int) -> bool:
    """Compile it and hold it against the oracle; a warning says why it is not used."""
    problem = flex_problem(device, dtype, shared, size, dim)
    if problem:
        log.warning("attention: keys and values are copied at each step, FlexAttention does not work here: %s", problem)
    else:
        log.info("attention: FlexAttention over the paged cache")
    return not problem


def flex_problem(device: torch.device, dtype: torch.dtype, shared: int, size: int, dim: int) -> str:
    """What is wrong with the compiled kernel here; empty when nothing is.

    Args:
        shared: query heads of a key head.
        size: positions of a block.
    """
    made = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 8, size, 1, dim, generator=made).to(device, dtype).transpose(2, 3)
    q = torch.randn(1, shared, 40, dim, generator=made).to(device, dtype)
    table = torch.tensor([[5, 2, 7, 1]], dtype=torch.int32, device=device)
    positions = torch.arange(3 * size - 41, 3 * size - 1, device=device)[None]
    k, v = (x[table[0].long()].transpose(0, 1).flatten(1, 2)[None] for x in (keys, values))
    try:
        for fixed, first in ((False, 0), (True, 39)):
            some, at = q[:, :, first:], positions[:, first:]
            found = flex_paged_attention(some, keys, values, flex_mask(table, at, keys, shared), compiled(fixed))
            seen = torch.arange(k.shape[2], device=device) <= at[:, None, :, None]
            far = float((found - attention_eager(some, k, v, seen)).abs().max())
            if not far <= max(1e-5, 8 * torch.finfo(dtype).eps) * float(v.abs().max()):
                return f"it is {far:.2g} from the oracle"
    except Exception as error:  # no compiler, no Triton, a shape it does not take: each raises something else
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return ""
