"""Scaled dot-product attention for grouped-query heads: an eager oracle and the fast path, one signature.

What a query may see is said by `mask`: None is causal (T == S), a boolean tensor (B or 1, 1, T, S) is taken as it is,
and `Documents` is causal inside each of the texts packed into a row and blind between them (Llama 3 section 3.2).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.ops.blocked_attention import causal_attention


@dataclass(frozen=True)
class Documents:
    """Texts packed into rows: (row, start, end) of each. What none of them covers is padding."""

    spans: tuple[tuple[int, int, int], ...]

    def dense(self, q: Tensor) -> Tensor:
        """The same as a boolean tensor (B, 1, T, T); padding sees itself, since a softmax over nothing is NaN.

        Made once a batch: every layer of the model asks for the same.
        """
        rows, length = q.shape[0], q.shape[-2]
        key = (rows, length, q.device)
        if key not in self._dense:
            text = torch.full((rows, length), -1, device=q.device)
            for number, (row, start, end) in enumerate(self.spans):
                text[row, start:end] = number
            same = (text[:, :, None] == text[:, None, :]) & (text >= 0)[:, :, None]
            causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
            itself = torch.eye(length, dtype=torch.bool, device=q.device)
            self._dense[key] = (same & causal | itself)[:, None]
        return self._dense[key]

    def rows(self, start: int, stop: int) -> "Documents":
        """The texts of these rows, which are counted from 0 again."""
        return Documents(tuple((r - start, begin, end) for r, begin, end in self.spans if start <= r < stop))

    @cached_property
    def _dense(self) -> dict[tuple[int, int, torch.device], Tensor]:
        return {}

    @cached_property
    def groups(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Texts of about one length together: (rows, positions) of their tokens, each (N, L), and which are real.

        A shorter text of a group is padded with its own last token: causal attention never looks at what comes later.
        """
        by_length: dict[int, list[tuple[int, int, int]]] = {}
        for row, start, end in self.spans:
            step = max(8, 1 << max(0, (end - start - 1).bit_length() - 2))  # at most a quarter of a group is padding
            by_length.setdefault(-(-(end - start) // step) * step, []).append((row, start, end))
        groups = []
        for length, spans in by_length.items():
            rows, start, end = torch.tensor(spans).unbind(1)
            places = start[:, None] + torch.arange(length)
            groups.append((rows[:, None].expand_as(places), places.clamp(max=end[:, None] - 1), places < end[:, None]))
        return groups


Mask = Tensor | Documents | None


def attention_eager(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """Attention as the papers write it; the oracle of every faster path.

    Args:
        q: (B, H, T, D).
        k, v: (B, K, S, D) with H a multiple of K; key head j serves the query heads j*H/K .. (j+1)*H/K - 1.
        mask: what a query may see, see above.

    Returns:
        (B, H, T, D) in q's dtype; the softmax is at least fp32.
    """
    k, v = _repeat_heads(k, q), _repeat_heads(v, q)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if isinstance(mask, Documents):
        mask = mask.dense(q)
    elif mask is None:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.to(wide).masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return weights.to(v.dtype) @ v


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """`attention_eager` by the fastest way of the device."""
    if q.device.type == "cpu":
        if mask is None:
            return causal_attention(q, k, v)
        return _masked(q, k, v, mask) if isinstance(mask, Tensor) else _by_document(q, k, v, mask)
    k, v = _repeat_heads(k, q), _repeat_heads(v, q)
    if isinstance(mask, Documents):
        mask = mask.dense(q)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Generation's: the query heads of a key head are rows of one product, so what is cached is read as it lies."""
    batch, heads, length, dim = q.shape
    kv_heads = k.shape[1]
    rows = q.reshape(batch, kv_heads, -1, dim)  # (B, K, G*T, D): a row g*T + t
    scores = (rows * dim**-0.5) @ k.mT
    scores.view(batch, heads, length, -1).masked_fill_(~mask, float("-inf"))
    return (scores.softmax(-1) @ v).view(q.shape)


def _by_document(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Each group of texts as a batch of its own: nothing is computed that a mask would throw away."""
    out = torch.zeros_like(q).transpose(1, 2)  # (B, T, H, D)
    for rows, places, real in documents.groups:
        parts = (x[rows, :, places].transpose(1, 2) for x in (q, k, v))  # (N, H, L, D)
        out = out.index_put((rows[real], places[real]), causal_attention(*parts).transpose(1, 2)[real])
    return out.transpose(1, 2)


def _repeat_heads(x: Tensor, q: Tensor) -> Tensor:
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)
