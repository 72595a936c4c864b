"""Scaled dot-product attention for grouped-query heads: an eager oracle and the fast path, one signature."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention as the papers write it; the oracle of every faster path.

    Args:
        q: (B, H, T, D).
        k, v: (B, K, S, D) with H a multiple of K; key head j serves the query heads j*H/K .. (j+1)*H/K - 1.
        mask: (B or 1, 1, T, S) boolean, True where a query may look. None: causal, which needs T == S.

    Returns:
        (B, H, T, D) in q's dtype; the softmax is at least fp32.
    """
    k, v = _repeat_heads(k, q), _repeat_heads(v, q)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is None:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.to(wide).masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return weights.to(v.dtype) @ v


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`attention_eager` through torch's fused kernels: no (T, S) matrix is kept for the backward."""
    # Repeating the key heads beats enable_gqa=True on CPU, where that flag falls back to the unfused kernel.
    k, v = _repeat_heads(k, q), _repeat_heads(v, q)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def _repeat_heads(x: Tensor, q: Tensor) -> Tensor:
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)
