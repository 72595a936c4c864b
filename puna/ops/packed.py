"""Linear maps whose weights lie in 4 or 8 bits, in groups that share a scale: an eager oracle and the fast path.

weight = scale * value(code) + minimum, with a scale (and in some formats a minimum) for each group of a row.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from puna.ops.native import linear as by_native
from puna.ops.native.library import KINDS, Native, Weight, native
from puna.ops.nibbles import unpack_nibbles

SCALE_BLOCK = 256
"""Scales, row after row, that share a scale of their own where they are quantized, too (QLoRA's section 3)."""
FEW_ROWS = {torch.bfloat16: 64, torch.float32: 16}
"""Up to here the native kernels are faster than dequantizing for torch's matmul: by three times for 24 rows of bf16."""
_TILE = 2**20  # weights dequantized at once for many rows: 2 MB of bf16 stay in the cache
Activations = Literal["float", "int8"]


@dataclass(frozen=True)
class Packed:
    """An (out, in) weight.

    Args:
        codes: of 8 bits int8 (out, in); of 4 bits uint8 (out, in / 2): within each 32 weights byte j (0..15) has weight
            j in its low half and weight j + 16 in its high half.
        scales: (out, in / group) fp16 or fp32; or uint8 where they are quantized, too, see `plain_scales`.
        mins: (out, in / group), added to each weight of the group; a 4-bit code is then 0..15 instead of -8..7.
        group: weights along the input that share a scale; all of them are one scale a row.
        table: what the 4-bit codes mean, (16,) fp32, where they are not integers.
        scale_table: what the codes of quantized scales mean, (256,) fp32.
        scale_max: (scales / 256,) fp32, the scale of each 256 of them.
        scale_offset: () fp32, added to each of them.
        activations: "int8" rounds each row of the input to 8 bits of its own scale before the product.
    """

    codes: Tensor
    scales: Tensor
    mins: Tensor | None = None
    bits: int = 4
    group: int = 32
    table: Tensor | None = None
    activations: Activations = "float"
    scale_table: Tensor | None = None
    scale_max: Tensor | None = None
    scale_offset: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.codes.shape[1] * 8 // self.bits

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and minima."""
        parts = (self.codes, self.scales, self.mins, self.scale_max, self.scale_offset)
        return sum(part.nbytes for part in parts if part is not None)

    def rows(self, index: Tensor | slice) -> "Packed":
        """Some rows, in another order or repeated."""
        mins, scales = None if self.mins is None else self.mins[index], self.scales
        if self.scale_table is not None:  # their blocks run over the ends of rows
            scales = plain_scales(self)
        plain = dict.fromkeys(("scale_table", "scale_max", "scale_offset"))
        return replace(self, codes=self.codes[index], scales=scales[index], mins=mins, **plain)

    @cached_property
    def native(self) -> Weight | None:
        """What the native kernels read of these tensors, which live as long as this object; None: not theirs."""
        nested = (self.scale_table, self.scale_max, self.scale_offset)
        tensors = (self.codes, self.scales, self.mins, self.table, *nested)
        if any(t.device.type != "cpu" or not t.is_contiguous() for t in tensors if t is not None):
            return None
        if self.scales.dtype not in ((torch.uint8,) if nested[0] is not None else (torch.float16, torch.float32)):
            return None
        if any(t.dtype != torch.float32 for t in nested if t is not None):
            return None
        if self.group % 32 and self.group != self.shape[1]:
            return None
        if self.table is not None and (self.activations == "int8" or self.table.dtype != torch.float32):
            return None
        kind = KINDS["int4" if self.bits == 4 else "int8"]
        half, dynamic = self.scales.dtype == torch.float16, self.activations == "int8"
        pointers = (None if t is None else t.data_ptr() for t in tensors)
        return Weight(*pointers, *self.shape, self.group, kind, half, dynamic)


def dequantize(packed: Packed) -> Tensor:
    """The weight, (out, in) fp32: one product, and a sum where there are minima, each rounded once."""
    if packed.bits == 8:
        values = packed.codes.float()
    elif packed.table is not None:
        values = packed.table[unpack_nibbles(packed.codes).long()]
    else:
        values = unpack_nibbles(packed.codes).float()
        values = values if packed.mins is not None else values - 8
    groups = values.unflatten(1, (-1, packed.group)) * plain_scales(packed)[:, :, None]
    return (groups if packed.mins is None else groups + packed.mins.float()[:, :, None]).flatten(1)


def plain_scales(packed: Packed) -> Tensor:
    """The scales as numbers, (out, in / group) fp32: of quantized ones a product and a sum, each rounded once."""
    table, most, offset = packed.scale_table, packed.scale_max, packed.scale_offset
    if table is None or most is None or offset is None:
        return packed.scales.float()
    values = table[packed.scales.flatten().int()]
    return (values * most.repeat_interleave(SCALE_BLOCK)[: len(values)] + offset).view_as(packed.scales)


def expanded(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The weight, (out, in) in `dtype`; with the native kernels nothing wider is made on the way."""
    library = native() if dtype in by_native.DTYPES else None
    weight = packed.native if library is not None else None
    if library is None or weight is None:
        return dequantize(packed).to(dtype)
    out = torch.empty(packed.shape, dtype=dtype)
    by_native.expand(library, weight, 0, packed.shape[0], out)
    return out


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row (..., in) as whole numbers of -127..127 in its own dtype and the scale (..., 1) that gives it back."""
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (x / scale).round(), scale


def packed_linear_eager(x: Tensor, packed: Packed) -> Tensor:
    """The oracle: x (..., in) -> (..., out) by the dequantized weight, in x's dtype."""
    if packed.activations == "float":
        return F.linear(x, dequantize(packed).to(x.dtype))
    wide = torch.promote_types(x.dtype, torch.float32)
    rounded, scale = quantize_rows(x.to(wide))
    return (F.linear(rounded, dequantize(packed).to(wide)) * scale).to(x.dtype)


def packed_linear(x: Tensor, packed: Packed) -> Tensor:
    """`packed_linear_eager` without the dequantized weight; autograd keeps the packed one, and a gradient flows to x.

    Rounding of activations is passed straight through (Bengio et al. 2013): its own derivative is zero.
    """
    if not (x.requires_grad and torch.is_grad_enabled()):
        return _forward(x, packed)
    return _PackedLinear.apply(x, packed)  # type: ignore[no-any-return]


def _forward(x: Tensor, packed: Packed) -> Tensor:
    """The native kernels for a few rows, and for any number where activations are int8: their sums are exact."""
    library = native() if by_native.takes(x) else None
    weight = packed.native if library is not None else None
    if library is not None and weight is not None:
        if packed.activations == "int8" or x.numel() <= FEW_ROWS[x.dtype] * x.shape[-1]:
            return by_native.linear(library, x, weight)
        return _by_tiles(x, packed, library, weight)
    return packed_linear_eager(x, packed)


def _by_tiles(x: Tensor, packed: Packed, library: Native, weight: Weight) -> Tensor:
    """Some rows of the weight at a time are dequantized, and torch multiplies them."""
    out, in_ = packed.shape
    y, step = x.new_empty(*x.shape[:-1], out), max(1, _TILE // in_)
    tile = x.new_empty(step, in_)
    for start in range(0, out, step):
        stop = min(start + step, out)
        by_native.expand(library, weight, start, stop, tile)
        y[..., start:stop] = F.linear(x, tile[: stop - start])
    return y


class _PackedLinear(torch.autograd.Function):
    """dL/dx = dy W; the weight is dequantized again in the backward, so nothing of its size is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, packed: Packed) -> Tensor:  # type: ignore[override]
        ctx.packed = packed
        return _forward(x, packed)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad @ expanded(ctx.packed, grad.dtype), None
