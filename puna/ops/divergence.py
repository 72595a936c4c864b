"""Cross-entropy and divergence from a teacher in one: an eager oracle, and chunks that never hold all logits.

p are the teacher's probabilities and q the student's, z its logits, both over a temperature t:

    forward    KL(p || q) = sum_i p_i (log p_i - log q_i)     dKL/dz_j = (q_j - p_j) / t
    reverse    KL(q || p) = sum_i q_i (log q_i - log p_i)     dKL/dz_j = q_j (log q_j - log p_j - KL(q || p)) / t
    symmetric  the mean of both, and of their gradients

The divergence is taken times t^2, so that a temperature does not shrink its gradient (Hinton et al. 2015, section 2).
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from puna.ops.cross_entropy import CHUNK_FROZEN, IGNORE, add_rows

Divergence = Literal["forward", "reverse", "symmetric"]
Head = Callable[[Tensor], Tensor]


class Mix(NamedTuple):
    """loss = (1 - ratio) * cross-entropy + ratio * divergence."""

    ids: int
    """How many ids both know. Rows of a head beyond are padding of its own size: they take no part in the divergence,
    each distribution being that over the ids."""
    ratio: float = 0.5
    divergence: Divergence = "forward"
    temperature: float = 1.0


def linear_distillation_eager(
    hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_head: Head, labels: Tensor, mix: Mix
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the trained positions; the oracle, whose gradients are autograd's.

    Args:
        hidden: (N, D) of the student, in the compute dtype.
        weight: (V, D) output projection of the student.
        teacher: (N, D') hidden states.
        teacher_head: (n, D') -> (n, V') logits.
        labels: (N,) int64; IGNORE where nothing is trained.

    Returns:
        loss, cross-entropy, divergence: scalars, at least fp32.
    """
    trained = labels != IGNORE
    logits = F.linear(hidden[trained], weight.to(hidden.dtype))
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits, theirs = logits.to(wide), teacher_head(teacher[trained]).to(wide).detach()
    cross_entropy = F.cross_entropy(logits, labels[trained], reduction="sum")
    log_p, log_q = ((each[:, : mix.ids] / mix.temperature).log_softmax(-1) for each in (theirs, logits))
    forward = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    reverse = F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    divergence = {"forward": forward, "reverse": reverse, "symmetric": (forward + reverse) / 2}[mix.divergence]
    divergence = mix.temperature**2 * divergence
    return (1 - mix.ratio) * cross_entropy + mix.ratio * divergence, cross_entropy.detach(), divergence.detach()


def linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    teacher: Tensor,
    teacher_head: Head,
    labels: Tensor,
    mix: Mix,
    chunk: int = CHUNK_FROZEN,
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_distillation_eager` with memory for `chunk` rows of both logits instead of N, as a cross-entropy."""
    trained = labels != IGNORE
    if not trained.all():
        hidden, teacher, labels = hidden[trained], teacher[trained], labels[trained]
    return _Chunked.apply(hidden, weight, teacher, teacher_head, labels, mix, chunk)  # type: ignore[no-any-return]


def forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """(n, V) each -> KL(p || q) of each row (n,), and its gradient by the logits of q (n, V)."""
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(-1), log_q.exp() - p


def reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """(n, V) each -> KL(q || p) of each row (n,), and its gradient by the logits of q (n, V)."""
    q, apart = log_q.exp(), log_q - log_p
    kl = (q * apart).sum(-1)
    return kl, q * (apart - kl[:, None])


def symmetric_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of both, and of their gradients."""
    both = zip(forward_kl(log_p, log_q), reverse_kl(log_p, log_q), strict=True)
    kl, slope = ((one + other) / 2 for one, other in both)
    return kl, slope


_KINDS = {"forward": forward_kl, "reverse": reverse_kl, "symmetric": symmetric_kl}


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, teacher, teacher_head, labels, mix, chunk):  # type: ignore[no-untyped-def]
        compute, (ids, ratio, kind, t) = weight.to(hidden.dtype), mix
        wide = torch.promote_types(hidden.dtype, torch.float32)
        cross_entropy, divergence = hidden.new_zeros((), dtype=wide), hidden.new_zeros((), dtype=wide)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=wide) if weight.requires_grad else None
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            h, index = hidden[rows], labels[rows, None]
            logits = (h @ compute.T).to(wide)
            log_p = (teacher_head(teacher[rows])[:, :ids].to(wide) / t).log_softmax(dim=-1)
            kl, slope = _KINDS[kind](log_p, (logits[:, :ids] / t).log_softmax(dim=-1))
            divergence += t**2 * kl.sum()
            log_probs = logits.log_softmax(dim=-1)
            cross_entropy -= log_probs.gather(1, index).sum()
            grad = log_probs.exp_()
            grad.scatter_add_(1, index, -torch.ones_like(index, dtype=wide))
            grad.mul_(1 - ratio)[:, :ids].add_(slope, alpha=ratio * t)
            grad = grad.to(h.dtype)
            grad_hidden[rows] = grad @ compute
            if grad_weight is not None:
                add_rows(grad_weight, grad.T @ h)
            del logits, log_p, log_probs, slope, grad  # or they would be there beside those of the next chunk
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(cross_entropy, divergence)
        return (1 - ratio) * cross_entropy + ratio * divergence, cross_entropy, divergence

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total: Tensor, *_: Tensor):  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
        return grad_hidden * grad_total.to(grad_hidden.dtype), grad_weight, None, None, None, None, None
