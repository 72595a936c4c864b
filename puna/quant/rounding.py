"""Weights rounded to whole multiples of a scale, symmetric about zero."""

from collections.abc import Callable

import torch
from torch import Tensor

from puna.errors import NumericError
from puna.ops.nibbles import pack_nibbles
from puna.ops.packed import Activations, Packed

_CHUNK = 1 << 22  # weights searched at a time: a tensor's errors are never all in memory
# Largest magnitude over scale. A clipped extreme is often cheaper than coarse steps for all others; a negative scale
# puts the extreme at -8, which has no counterpart on the other side.
_TRIED = {4: [sign * quarters / 4 for sign in (1, -1) for quarters in range(24, 37)], 8: [127.0]}
_ENDS = {4: -8.0, 8: 127.0}  # the code that has no fellow on the other side, or of 8 bits none that is worth it
_LEAST = torch.finfo(torch.bfloat16).tiny  # its smallest normal number: below it a scale would lose bits, or be zero


def round_symmetric(
    weight: Tensor,
    bits: int,
    group: int,
    activations: Activations = "float",
    scale_of: "Callable[[Tensor, int], Tensor] | None" = None,
) -> Packed:
    """(out, in) as whole numbers of 4 or 8 bits times a scale for each `group` weights of a row.

    Args:
        scale_of: (groups, bits) -> their scales; by default those of least error.

    Raises:
        NumericError: weights that are not finite.
    """
    check_finite(weight)
    scales, codes = [], []
    for part in weight.split(max(1, _CHUNK // weight.shape[1])):
        groups = part.float().unflatten(1, (-1, group))
        scales.append(scale := (scale_of or searched_scale)(groups, bits))
        codes.append(whole_numbers(groups, scale, bits).to(torch.int8).flatten(1))
    return packed_from(torch.cat(codes), torch.cat(scales).squeeze(2), bits, group, activations)


def check_finite(weight: Tensor) -> None:
    """
    Raises:
        NumericError: weights that are not finite.
    """
    if not weight.isfinite().all():
        raise NumericError("weights that are not finite cannot be quantized", cause="training had diverged")


def packed_from(codes: Tensor, scales: Tensor, bits: int, group: int, activations: Activations = "float") -> Packed:
    """Whole numbers (out, in) and scales (out, in / group) as they lie in memory; fp16 scales if that loses nothing."""
    halves = scales.half()
    kept = halves if torch.equal(halves.float(), scales.float()) else scales.float()
    laid = codes.to(torch.int8) if bits == 8 else pack_nibbles(codes + 8)
    return Packed(laid, kept, bits=bits, group=group, activations=activations)


def whole_numbers(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The nearest codes: (..., group) over (..., 1)."""
    top = 1 << (bits - 1)
    return (weight / scale).round().clamp(-top, top - 1)


def searched_scale(groups: Tensor, bits: int) -> Tensor:
    """(..., group) fp32 -> the scales (..., 1) that leave the least squared error, of those tried."""
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    unit = torch.exp2((torch.frexp(extreme).exponent - 1).float())  # or squares would overflow or vanish
    best, least = _short(extreme / _TRIED[bits][0]), torch.full_like(extreme, torch.inf)
    for steps in _TRIED[bits]:
        scale = _short(extreme / steps)
        error = ((groups - whole_numbers(groups, scale, bits) * scale) / unit).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def extreme_scale(groups: Tensor, bits: int) -> Tensor:
    """(..., group) fp32 -> the scales (..., 1) that put each group's extreme at the end of the codes, as in Q4_0."""
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    return _short(extreme / _ENDS[bits])


def _short(scale: Tensor) -> Tensor:
    """Scales that bf16 holds exactly, so that every reader computes with the same weights. Of zeros any will do."""
    held = torch.where(scale.abs() < _LEAST, _LEAST, scale).bfloat16().float()
    return torch.where(scale == 0, 1.0, held)
