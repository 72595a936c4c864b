"""ggml's blocks of 32 as packed weights: the numbers of Q8_0, Q4_0 and Q4_1 taken apart, none of them changed."""

import numpy as np
import torch
from torch import Tensor

from puna.checkpoint.gguf.blocks import LAYOUTS, Ggml
from puna.errors import CheckpointError
from puna.ops.packed import Packed

GROUP = 32
PACKED = (Ggml.Q8_0, Ggml.Q4_0, Ggml.Q4_1)
"""The types that are computed in; others are dequantized."""


def unpacked_blocks(raw: np.ndarray, kind: Ggml, shape: tuple[int, ...]) -> Packed:
    """(bytes,) uint8 of a weight of `shape` -> its codes, scales and minima, which stand together in each block.

    Raises:
        CheckpointError: scales that are not finite.
    """
    blocks = torch.from_numpy(raw.copy()).view(shape[0], -1, LAYOUTS[kind].size)
    halves = 2 if kind == Ggml.Q4_1 else 1  # of two bytes: the scale, and a minimum
    codes = blocks[:, :, 2 * halves :].flatten(1).contiguous()
    scales, mins = _half(blocks, 0), _half(blocks, 2) if halves == 2 else None
    if not (scales.isfinite().all() and (mins is None or mins.isfinite().all())):
        raise CheckpointError("a scale is not finite", cause="damage, or a model that had diverged")
    bits = 8 if kind == Ggml.Q8_0 else 4
    return Packed(codes.view(torch.int8) if bits == 8 else codes, scales, mins, bits=bits, group=GROUP)


def _half(blocks: Tensor, at: int) -> Tensor:
    return blocks[:, :, at : at + 2].contiguous().view(torch.float16).squeeze(2)
