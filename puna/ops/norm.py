"""RMSNorm (Zhang & Sennrich 2019), as Llama computes it: an eager oracle, and a path that keeps x alone."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.Module):
    """x / rms(x) * weight. The mean square is taken in fp32 and the result cast down *before* the weight is applied."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim), same dtype."""
        return rms_norm(x, self.weight, self.eps)


def rms_norm_eager(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The oracle: x (..., dim), weight (dim,) -> (..., dim) in x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return scaled.to(x.dtype) * weight.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm_eager` without its fp32 copies of x, which autograd would keep for every layer."""
    if not torch.is_grad_enabled():  # a token of generation is hundreds of small calls; `apply` costs as much as two
        return _normalized(x, weight, eps)[0]
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return]


def _normalized(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The result and 1 / rms(x), (..., 1) in fp32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square()
    scale = torch.rsqrt(square / x.shape[-1] + eps)
    return (x * scale).to(x.dtype) * weight.to(x.dtype), scale


class _RMSNorm(torch.autograd.Function):
    """With r = 1 / rms(x), y = x r and g = dL/dy:  dL/dx = r (g - y mean(g y))."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        out, scale = _normalized(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        scaled = x * scale  # fp32
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * scaled).flatten(0, -2).sum(0).to(weight.dtype)
        inner = (grad * weight.to(grad.dtype)).to(scaled.dtype)
        mean = (inner * scaled).mean(-1, keepdim=True)
        grad_x = inner.addcmul_(scaled, mean, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight, None
