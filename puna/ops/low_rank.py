"""A frozen linear map plus a low-rank one (LoRA): an eager oracle, and a path that adds into one output."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def low_rank_linear_eager(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The oracle: x W^T + scale (x A^T) B^T.

    Args:
        x: (..., in).
        weight: (out, in), frozen.
        a, b: (r, in) and (out, r), all in x's dtype.

    Returns:
        (..., out).
    """
    return F.linear(x, weight) + scale * F.linear(F.linear(x, a), b)


def low_rank_linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`low_rank_linear_eager` without its three passes over outputs of full width, forward and backward.

    Raises:
        RuntimeError: `weight` is trained; its gradient is not made here.
    """
    if weight.requires_grad:
        raise RuntimeError("low_rank_linear is for frozen weights")
    return _LowRank.apply(x, weight, a, b, scale)  # type: ignore[no-any-return]


class _LowRank(torch.autograd.Function):
    """With z = x A^T:  dB = s dy^T z,  dz = s dy B,  dA = dz^T x,  dx = dy W + dz A."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        rows = x.flatten(0, -2)
        inner = rows @ a.T
        out = (rows @ weight.T).addmm_(inner, b.T, alpha=scale)
        ctx.save_for_backward(x, weight, a, b, inner)
        ctx.scale = scale
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight, a, b, inner = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_inner = (rows @ b).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (rows @ weight).addmm_(grad_inner, a).view_as(x)
        return grad_x, None, grad_inner.T @ x.flatten(0, -2), (rows.T @ inner).mul_(ctx.scale), None
