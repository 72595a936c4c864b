"""SwiGLU's gate (Shazeer 2020): an eager oracle, and a path that keeps its two inputs alone."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def swiglu_eager(gate: Tensor, up: Tensor) -> Tensor:
    """The oracle: silu(gate) * up, (..., ffn_dim) each."""
    return F.silu(gate) * up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu_eager`; silu(gate) is made again in the backward instead of being kept, a third of what an MLP holds."""
    if not torch.is_grad_enabled():
        return F.silu(gate).mul_(up)
    return _SwiGLU.apply(gate, up)  # type: ignore[no-any-return]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        grad_up = F.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), grad_up
