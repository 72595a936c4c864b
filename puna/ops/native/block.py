"""Tensors to the native decoder block and back."""

import ctypes

from torch import Tensor

from puna.ops.native.library import Block, Native, Pool


def before(native: Native, block: Block, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What attention takes: x (B, T, dim), tables (B, 1, T, D/2) -> (B, H, T, D), (B, K, T, D), (B, K, T, D)."""
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    q = x.new_empty(*x.shape[:-1], block.heads, block.head_dim)
    k, v = (x.new_empty(*x.shape[:-1], block.kv_heads, block.head_dim) for _ in range(2))
    call = native.call(x.dtype, x.shape[0] * x.shape[1])
    pointers = (tensor.data_ptr() for tensor in (x, cos, sin, q, k, v))
    native.before(ctypes.byref(call), ctypes.byref(block), *pointers)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def after(native: Native, block: Block, x: Tensor, heads: Tensor) -> Tensor:
    """What is made of the heads (B, H, T, D) and the residual stream x (B, T, dim): (B, T, dim)."""
    x, heads = x.contiguous(), heads.transpose(1, 2).contiguous()
    out = x.new_empty(x.shape)
    call = native.call(x.dtype, x.shape[0] * x.shape[1])
    native.after(ctypes.byref(call), ctypes.byref(block), x.data_ptr(), heads.data_ptr(), out.data_ptr())
    return out


def attend(
    native: Native, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, slots: Tensor,
    tables: Tensor, lengths: Tensor,
) -> Tensor:  # fmt: skip
    """One token of each of N texts over keys and values in blocks, its own stored first.

    Args:
        q: (N, H, D) with D a multiple of 16; k, v: (N, K, D), fp32 or bf16 as the pool.
        keys, values: the pool of one layer, (blocks, K, BLOCK, D), changed in place.
        blocks, slots: (N,) int64: where a token's own key and value go.
        tables: (N, M) int64, the blocks of its text; lengths: (N,) int64, the tokens it sees, itself among them.

    Returns:
        (N, H, D).
    """
    q, k, v, tables = q.contiguous(), k.contiguous(), v.contiguous(), tables.contiguous()
    out = q.new_empty(q.shape)
    pointers = (tensor.data_ptr() for tensor in (keys, values, blocks, slots, tables, lengths))
    pool = Pool(*pointers, tables.shape[1], keys.shape[2], q.shape[1], keys.shape[1], keys.shape[3])
    call = native.call(q.dtype, q.shape[0])
    tensors = (tensor.data_ptr() for tensor in (q, k, v, out))
    native.attend(ctypes.byref(call), ctypes.byref(pool), *tensors)
    return out
