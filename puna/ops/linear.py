"""A linear map of few rows: `F.linear` is the oracle, the native kernels read the weight at the memory's speed."""

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.ops.native import linear as by_native
from puna.ops.native.library import native

FEW_ROWS = 32
"""Up to here reading the weights takes the time; beyond, arithmetic does, and torch's matmul is made for that. With
24 rows a head of 49,152 ids takes four fifths of torch's time, with 32 a block's layers take as long as torch's."""


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., in), weight (out, in) in any dtype -> (..., out) in x's dtype.

    A weight of another dtype is not converted as a whole for a few rows, and fp32 by fp32 is left to torch: it is the
    oracle's, and the one product that torch does well.
    """
    if not x.dtype == weight.dtype == torch.float32 and x.numel() <= FEW_ROWS * x.shape[-1]:
        library = native() if by_native.takes(x) and not torch.is_grad_enabled() else None
        known = by_native.plain_weight(weight) if library is not None else None
        if library is not None and known is not None:
            return by_native.linear(library, x, known)
    return F.linear(x, weight.to(x.dtype))
