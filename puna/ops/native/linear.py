"""Tensors to the native linear kernels and back."""

import ctypes

import torch
from torch import Tensor

from puna.ops.native.library import KINDS, Call, Native, Weight

_KINDS = {torch.float32: KINDS["float32"], torch.bfloat16: KINDS["bfloat16"]}


def plain_weight(weight: Tensor) -> Weight:
    """A contiguous (out, in) fp32 or bf16 tensor, which has to outlive what is returned."""
    out, in_ = weight.shape
    return Weight(weight.data_ptr(), None, None, None, out, in_, in_, _KINDS[weight.dtype], 0, 0)


def takes(x: Tensor) -> bool:
    """Whether activations are such that the kernels compute with them; gradients are torch's."""
    return x.dtype in _KINDS and x.device.type == "cpu" and not (torch.is_grad_enabled() and x.requires_grad)


def linear(native: Native, x: Tensor, weight: Weight) -> Tensor:
    """x (..., in) -> (..., out) in x's dtype."""
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], weight.out)
    if y.numel():
        call = _call(native, x, x.numel() // weight.in_)
        native.library.puna_linear(ctypes.byref(call), ctypes.byref(weight), x.data_ptr(), y.data_ptr())
    return y


def expand(native: Native, weight: Weight, start: int, stop: int, out: Tensor) -> None:
    """Rows start .. stop - 1 of the weight into `out` (stop - start, in), fp32 or bf16."""
    call = _call(native, out, 0)
    native.library.puna_expand(ctypes.byref(call), ctypes.byref(weight), start, stop, out.data_ptr())


def _call(native: Native, x: Tensor, rows: int) -> Call:
    return Call(native.level, torch.get_num_threads(), x.dtype == torch.bfloat16, rows)
