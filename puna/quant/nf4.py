"""NF4 (Dettmers et al. 2023, QLoRA): 16 values at the quantiles of a normal distribution, scaled by a block's largest.

Codes and values are those of bitsandbytes, bit for bit. Its second quantization, that of the scales, rounds to the
nearest here; bitsandbytes looks a few of them up one step further.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from puna.ops.nibbles import pack_nibbles
from puna.ops.packed import Packed
from puna.quant import dynamic
from puna.quant.rounding import check_finite

BLOCK = 64
VALUES = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip
_BOUNDS = (VALUES[:-1] + VALUES[1:]) / 2
_LEAST = 1e-38  # a block of zeros is divided by it


class Nested(NamedTuple):
    """Scales in 8 bits: value = table[codes] * absmax of its block of 256 + offset."""

    codes: Tensor
    """(scales,) uint8."""
    absmax: Tensor
    """(blocks,) fp32."""
    offset: Tensor
    """() fp32, the mean of all scales."""


def round_nf4(weight: Tensor) -> Packed:
    """(out, in) as NF4 with fp32 scales; in is whole blocks of 64.

    Raises:
        NumericError: weights that are not finite.
    """
    check_finite(weight)
    blocks = weight.float().view(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True)
    scaled = (blocks * (1 / scales.clamp(min=_LEAST))).clamp(-1, 1)
    codes = torch.bucketize(scaled, _BOUNDS.to(weight.device), out_int32=True).view(weight.shape)
    table = VALUES.to(weight.device)
    return Packed(pack_nibbles(codes), scales.view(len(weight), -1), bits=4, group=BLOCK, table=table)


def nest(scales: Tensor) -> Nested:
    """fp32 scales of any shape in 8 bits."""
    offset = scales.mean()
    codes, absmax = dynamic.quantize(scales - offset)
    return Nested(codes, absmax, offset)


def unnest(nested: Nested, table: Tensor) -> Tensor:
    """The scales, (scales,) fp32; `table` (256,) says what the codes mean."""
    return dynamic.dequantize(nested.codes, nested.absmax, table) + nested.offset


def with_nested_scales(packed: Packed) -> Packed:
    """NF4 whose scales are what 8 bits hold of them: 4.13 bits a weight instead of 4.5."""
    table = dynamic.table_on(True, packed.scales.device)
    return replace(packed, scales=unnest(nest(packed.scales), table).view_as(packed.scales))
