"""Output projection and cross-entropy in one: an eager oracle, and chunks that never hold all logits."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100
"""The label of a position that is not trained."""


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
    chunk = chunk or (512 if weight.requires_grad else 256)  # each chunk of a trained weight passes over its gradient
    trained = labels != IGNORE
    if not trained.all():  # prompts of chat rows, padding: their logits would be thrown away
        hidden, labels = hidden[trained], labels[trained]
    if not torch.is_grad_enabled():
        parts = zip(hidden.split(chunk), labels.split(chunk), strict=True)
        return sum((linear_cross_entropy_eager(h, weight, t) for h, t in parts), hidden.new_zeros(()).float())
    return _Chunked.apply(hidden, weight, labels, chunk)  # type: ignore[no-any-return]


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
            h, index = hidden[rows], labels[rows, None]
            log_probs = (h @ compute.T).to(wide).log_softmax(dim=-1)
            total -= log_probs.gather(1, index).sum()
            grad = log_probs.exp_()
            grad.scatter_add_(1, index, -torch.ones_like(index, dtype=wide))
            grad = grad.to(h.dtype)
            grad_hidden[rows] = grad @ compute
            if grad_weight is not None:
                grad_weight += grad.T @ h
            del log_probs, grad  # or they would be there beside those of the next chunk
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
