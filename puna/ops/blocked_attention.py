"""Causal attention on a CPU as blocks of matrix products, where torch's fused kernel runs at a third of their speed.

Each block of queries meets the keys up to its last one: what lies above the diagonal is not computed, except inside
the block. The query heads of one key head are rows of one product, so keys and values are never repeated.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 128  # queries at a time; 64 to 256 measured: smaller are slow products, larger compute more that is masked
KEEP = 512  # up to this length the weights are kept for the backward (T^2 / 2 a head), beyond they are made again


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (N, H, T, D), k and v (N, K, T, D) -> (N, H, T, D); the softmax is computed in fp32 at least."""
    return _Causal.apply(q, k, v)  # type: ignore[no-any-return]


class _Causal(torch.autograd.Function):
    """With P = softmax(Q K^T) and O = P V:  dV = P^T dO,  dS = P * (dP - rowsum(dP * P)),  dQ = dS K,  dK = dS^T Q."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        (n, heads, length, dim), kv_heads = q.shape, k.shape[1]
        scaled = (q * dim**-0.5).reshape(n * kv_heads, heads // kv_heads, length, dim)  # (N*K, G, T, D)
        k, v = (x.reshape(n * kv_heads, length, dim) for x in (k, v))
        out = torch.empty_like(scaled)
        kept = []
        for start, end in _blocks(length):
            weights = _weights(scaled, k, start, end)
            out[:, :, start:end] = (weights @ v[:, :end]).view_as(out[:, :, start:end])
            if length <= KEEP:
                kept.append(weights)
        ctx.save_for_backward(scaled, k, v, *kept)
        ctx.shapes = q.shape, (n, kv_heads, length, dim)
        return out.view(q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        q, k, v, *kept = ctx.saved_tensors
        length, dim = q.shape[2:]
        grad = grad.reshape(q.shape)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for number, (start, end) in enumerate(_blocks(length)):
            weights = kept[number] if kept else _weights(q, k, start, end)
            rows, grad_rows = q[:, :, start:end].flatten(1, 2), grad[:, :, start:end].flatten(1, 2)
            dv[:, :end] += weights.mT @ grad_rows
            dweights = grad_rows @ v[:, :end].mT
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)  # type: ignore[attr-defined]
            dq[:, :, start:end] = (dscores @ k[:, :end]).view_as(q[:, :, start:end])
            dk[:, :end] += dscores.mT @ rows
        shape, kv_shape = ctx.shapes
        return (dq * dim**-0.5).view(shape), dk.view(kv_shape), dv.view(kv_shape)


def _weights(q: Tensor, k: Tensor, start: int, end: int) -> Tensor:
    """Softmax of the scores of queries start..end: (N*K, G*(end-start), end)."""
    scores = q[:, :, start:end].flatten(1, 2) @ k[:, :end].mT
    size = end - start
    future = torch.full((size, size), float("-inf"), dtype=q.dtype).triu_(1)
    scores.unflatten(1, (-1, size))[..., start:].add_(future)
    return scores.softmax(-1)


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]
