"""Output projection and cross-entropy in one: an eager oracle, and chunks that never hold all logits."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100
"""The label of a position that is not trained."""
ROWS = 32
"""Of a chunk, whose logits are in fp32 at a time on a CPU: they stay in the cache, and a chunk is never there whole."""
CHUNK, CHUNK_FROZEN = 512, 256
"""Rows of logits at a time; under a trained weight more, since each chunk passes over its gradient."""
_WORDS = 8192  # rows of a head that are added at a time: some MB, which a cache holds


def linear_cross_entropy_eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum over trained positions of -log softmax(hidden @ weight.T)[label]; the oracle.

    Args:
        hidden: (N, D) in the compute dtype.
        weight: (V, D) output projection.
        labels: (N,) int64; IGNORE where nothing is trained.

    Returns:
        scalar, at least fp32.
    """
    logits = F.linear(hidden, weight.to(hidden.dtype))
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), labels, ignore_index=IGNORE, reduction="sum")


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = None) -> Tensor:
    """`linear_cross_entropy_eager` with memory for `chunk` rows of logits instead of N.

    The gradient of a sum of cross-entropies is known as soon as the logits are (softmax - one-hot), so the forward
    makes it chunk by chunk and the logits are never kept: at 128k ids they are the largest tensor of training.
    """
    chunk = chunk or (CHUNK if weight.requires_grad else CHUNK_FROZEN)
    trained = labels != IGNORE
    if not trained.all():  # prompts of chat rows, padding: their logits would be thrown away
        hidden, labels = hidden[trained], labels[trained]
    if not torch.is_grad_enabled():
        return _summed(hidden, weight.to(hidden.dtype), labels, chunk)
    return _Chunked.apply(hidden, weight, labels, chunk)  # type: ignore[no-any-return]


def _wide_rows(logits: Tensor) -> int:
    """Rows of a chunk whose logits are in fp32 at a time: on a card all of them, where each call has its price."""
    return ROWS if logits.device.type == "cpu" else max(1, len(logits))


def _summed(hidden: Tensor, compute: Tensor, labels: Tensor, chunk: int) -> Tensor:
    """The loss alone, of a head in the compute dtype."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    total = hidden.new_zeros((), dtype=wide)
    for h, index in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        logits = h @ compute.T
        rows = _wide_rows(logits)
        for part, label in zip(logits.split(rows), index.split(rows), strict=True):
            total += F.cross_entropy(part.to(wide), label, reduction="sum")
    return total


def _to_gradient(logits: Tensor, labels: Tensor, wide: torch.dtype) -> Tensor:
    """The loss of logits (n, V) by labels (n, 1); the logits become its gradient by them in place."""
    total, rows = logits.new_zeros((), dtype=wide), _wide_rows(logits)
    for part, index in zip(logits.split(rows), labels.split(rows), strict=True):
        log_probs = part.to(wide).log_softmax(dim=-1)
        total -= log_probs.gather(1, index).sum()
        part.copy_(log_probs.exp_().scatter_add_(1, index, -torch.ones_like(index, dtype=wide)))
    return total


def add_rows(total: Tensor, part: Tensor) -> None:
    """total += part, some rows at a time: of another dtype, torch would convert the whole of it beside the two."""
    for into, rows in zip(total.split(_WORDS), part.split(_WORDS), strict=True):
        into += rows


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:  # type: ignore[override]
        compute = weight.to(hidden.dtype)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=wide)
        grad_hidden = torch.empty_like(hidden)
        # The weight's gradient is summed over chunks in fp32: bf16 would round away the later ones.
        grad_weight = torch.zeros_like(weight, dtype=wide) if weight.requires_grad else None
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            h = hidden[rows]
            grad = h @ compute.T  # logits, that become their own gradient
            total += _to_gradient(grad, labels[rows, None], wide)
            grad_hidden[rows] = grad @ compute
            if grad_weight is not None:
                add_rows(grad_weight, grad.T @ h)
            del grad  # or it would be there beside that of the next chunk
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total: Tensor):  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
        return grad_hidden * grad_total.to(grad_hidden.dtype), grad_weight, None, None
