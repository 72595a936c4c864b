"""NF4 (Dettmers et al. 2023, QLoRA): 16 values at the quantiles of a normal distribution, scaled by a block's largest.

Codes, scales and values are those of bitsandbytes' CPU backend, bit for bit, also those of its double quantization.
"""

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from puna.ops.nibbles import pack_nibbles
from puna.ops.packed import Packed
from puna.quant.dynamic import dynamic_table, in_blocks, table_on
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
_HALF = 32767.5  # of 65,535, the steps from -1 to 1
_LEAST = 1e-38  # a block of zeros is divided by it


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


def with_nested_scales(packed: Packed) -> Packed:
    """Double quantization (section 3): scales less their mean in 8 bits, 4.13 bits a weight instead of 4.5."""
    scales = packed.scales.float().flatten()
    offset = scales.mean()
    blocks, most = in_blocks(scales - offset)
    scaled = (blocks * (1 / most.clamp(min=_LEAST))[:, None]).clamp(-1, 1)
    codes = _code_of_each_place().to(scales.device)[((scaled + 1) * _HALF + 0.5).int()]
    laid = torch.where(most[:, None] > 0, codes, 0).flatten()[: len(scales)].view_as(packed.scales).contiguous()
    return replace(packed, scales=laid, scale_table=table_on(True, scales.device), scale_max=most, scale_offset=offset)


@cache
def _code_of_each_place() -> Tensor:
    """(65536,) uint8. bitsandbytes puts a value at the nearest of so many places from -1 to 1 and takes its code.

    The steps of the table are finer about zero than the places are: there it is a step off, and so are we.
    """
    table = dynamic_table()
    places = torch.arange(2**16) / _HALF - 1
    return torch.bucketize(places, (table[:-1] + table[1:]) / 2).to(torch.uint8)
