"""Tensors to the native attention and decoder blocks, and back."""

import ctypes
from typing import NamedTuple

from torch import Tensor

from puna.ops.native.library import Block, Native, Pool


class Tokens(NamedTuple):
    """N tokens of a step in a cache of blocks: any number of each text, all int64."""

    blocks: Tensor
    """(N,) the block that a token's own key and value go to, and"""
    slots: Tensor
    """(N,) where in it."""
    tables: Tensor
    """(N, M) the blocks of its text."""
    lengths: Tensor
    """(N,) tokens of its text that it sees: up to itself."""


def attend(native: Native, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, tokens: Tokens) -> Tensor:
    """Each token over the keys and values of its text, after those of the step are stored.

    Args:
        q: (N, H, D) with D a multiple of 16; k, v: (N, K, D), fp32 or bf16 as the pool.
        keys, values: the pool of one layer, (blocks, K, BLOCK, D), contiguous, changed in place.

    Returns:
        (N, H, D).
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = q.new_empty(q.shape)
    call, pool = native.call(q.dtype, q.shape[0]), _pool(keys, values, tokens, q.shape[1])
    tensors = (tensor.data_ptr() for tensor in (q, k, v, out))
    native.attend(ctypes.byref(call), ctypes.byref(pool), *tensors)
    return out


def forward(
    native: Native, blocks: "ctypes.Array[Block]", x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor,
    tokens: Tokens,
) -> None:  # fmt: skip
    """x (N, dim) through all decoder blocks, in place.

    Args:
        cos, sin: RoPE's tables, (N, D/2) fp32.
        keys, values: the pool of all layers, (layers, blocks, K, BLOCK, D), contiguous, changed in place.
    """
    heads = blocks[0].q.out // keys.shape[4]
    call, pool = native.call(x.dtype, x.shape[0]), _pool(keys[0], values[0], tokens, heads)
    tensors = (tensor.data_ptr() for tensor in (x, cos, sin))
    native.forward(ctypes.byref(call), blocks, len(blocks), ctypes.byref(pool), *tensors)


def _pool(keys: Tensor, values: Tensor, tokens: Tokens, heads: int) -> Pool:
    count, kv_heads, block, head_dim = keys.shape
    pointers = (tensor.data_ptr() for tensor in (keys, values, *tokens))
    return Pool(*pointers, tokens.tables.shape[1], count, block, heads, kv_heads, head_dim)
