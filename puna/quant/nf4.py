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
from puna.quant.rounding import check_finite

BLOCK = 64
NESTED_BLOCK = 256
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
    centred = (scales - offset).flatten()
    blocks = torch.nn.functional.pad(centred, (0, -len(centred) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    absmax = blocks.abs().amax(1)
    table = dynamic_table()
    codes = torch.bucketize(blocks / absmax.clamp(min=_LEAST)[:, None], (table[:-1] + table[1:]) / 2)
    return Nested(codes.to(torch.uint8).flatten()[: len(centred)], absmax, offset)


def unnest(nested: Nested, table: Tensor) -> Tensor:
    """The scales, (scales,) fp32; `table` (256,) says what the codes mean."""
    values = table[nested.codes.long()]
    return values * nested.absmax.repeat_interleave(NESTED_BLOCK)[: len(values)] + nested.offset


def with_nested_scales(packed: Packed) -> Packed:
    """NF4 whose scales are what 8 bits hold of them: 4.13 bits a weight instead of 4.5."""
    return replace(packed, scales=unnest(nest(packed.scales), dynamic_table()).view_as(packed.scales))


def dynamic_table() -> Tensor:
    """The 256 values of a dynamic 8-bit float (Dettmers 2015): seven decades, each with twice the steps of the last."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        means = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values))
