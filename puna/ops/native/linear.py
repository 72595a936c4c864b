"""Tensors to the native linear kernels and back."""

import ctypes

import torch
from torch import Tensor

from puna.ops.native.library import KINDS, Native, Weight

DTYPES = {torch.float32: KINDS["float32"], torch.bfloat16: KINDS["bfloat16"]}


def plain_weight(weight: Tensor) -> Weight | None:
    """An (out, in) tensor, which has to outlive what is returned; None where the kernels cannot read it."""
    if weight.dtype not in DTYPES or weight.device.type != "cpu" or not weight.is_contiguous():
        return None
    out, in_ = weight.shape
    return Weight(weight.data_ptr(), out=out, in_=in_, group=in_, kind=DTYPES[weight.dtype])


def takes(x: Tensor) -> bool:
    """Whether activations are such that the kernels compute with them; gradients are torch's."""
    return x.dtype in DTYPES and x.device.type == "cpu" and not (torch.is_grad_enabled() and x.requires_grad)


def linear(native: Native, x: Tensor, weight: Weight) -> Tensor:
    """x (..., in) -> (..., out) in x's dtype."""
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], weight.out)
    if y.numel():
        call = native.call(x.dtype, x.numel() // weight.in_)
        native.linear(ctypes.byref(call), ctypes.byref(weight), x.data_ptr(), y.data_ptr())
    return y


def expand(native: Native, weight: Weight, start: int, stop: int, out: Tensor) -> None:
    """Rows start .. stop - 1 of the weight into `out` (stop - start, in), fp32 or bf16."""
    native.expand(ctypes.byref(native.call(out.dtype, 0)), ctypes.byref(weight), start, stop, out.data_ptr())
