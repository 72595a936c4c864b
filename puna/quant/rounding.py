"""Weights rounded to whole multiples of a scale, symmetric about zero."""

from typing import Literal

import torch
from torch import Tensor

from puna.errors import NumericError
from puna.ops.nibbles import pack_nibbles
from puna.ops.packed import Packed

Activations = Literal["float", "int8"]
"""Whether the input of a product is rounded to 8 bits first, each row by a scale of its own."""

_CHUNK = 1 << 22  # weights searched at a time: a tensor's errors are never all in memory
# Largest magnitude over scale. A clipped extreme is often cheaper than coarse steps for all others; a negative scale
# puts the extreme at -8, which has no counterpart on the other side.
_TRIED = {4: (-8.0, -7.5, -7.0, 6.5, 7.0, 7.5, 8.0), 8: (127.0,)}
_LEAST = 2.0**-14  # the smallest normal number of fp16


def round_symmetric(
    weight: Tensor, bits: int, group: int, activations: Activations = "float", importance: Tensor | None = None
) -> Packed:
    """(out, in) as whole numbers of 4 or 8 bits times a scale for each `group` weights of a row.

    Args:
        importance: (in,), what an error of each column costs; the same for all by default.

    Raises:
        NumericError: weights that are not finite.
    """
    if not weight.isfinite().all():
        raise NumericError("weights that are not finite cannot be quantized", cause="training had diverged")
    cost = torch.ones(weight.shape[1], device=weight.device) if importance is None else importance.float()
    rows = max(1, _CHUNK // weight.shape[1])
    parts = [
        _rounded(part.float().unflatten(1, (-1, group)), cost.view(-1, group), bits) for part in weight.split(rows)
    ]
    scales, codes = (torch.cat(both) for both in zip(*parts, strict=True))
    return packed_from(codes.flatten(1), scales, bits, group, activations)


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


def short_scale(scale: Tensor) -> Tensor:
    """Scales that bf16 and fp16 hold exactly, so that every reader computes with the same weights."""
    return torch.where(scale.abs() < _LEAST, _LEAST, scale).bfloat16().float()


def _rounded(groups: Tensor, cost: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(rows, n, group) -> scales (rows, n) and whole numbers (rows, n, group) of the least squared error by `cost`."""
    place = groups.abs().argmax(2, keepdim=True)
    extreme = groups.gather(2, place)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for steps in _TRIED[bits]:
        scale = short_scale(extreme.abs() / steps if bits == 8 else extreme / steps)
        codes = whole_numbers(groups, scale, bits)
        error = ((groups - codes * scale).square() * cost).sum(2, keepdim=True)
        if best is not None:
            better = error < best[0]
            error, scale, codes = (
                torch.where(better, new, old) for new, old in zip((error, scale, codes), best, strict=True)
            )
        best = error, scale, codes
    assert best is not None
    return best[1].squeeze(2), best[2]
