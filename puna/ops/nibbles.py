"""Two 4-bit codes a byte, in the order of GGUF's blocks."""

import torch
from torch import Tensor

_RUN = 32  # weights whose codes are interleaved: byte j has weight j in its low half, weight j + 16 in its high half


def pack_nibbles(codes: Tensor) -> Tensor:
    """(out, in) of 0..15 -> (out, in / 2) uint8; in is whole runs of 32."""
    low, high = codes.to(torch.uint8).view(len(codes), -1, 2, _RUN // 2).unbind(2)
    return (low | high << 4).flatten(1)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`: (out, in / 2) uint8 -> (out, in) uint8."""
    runs = packed.view(len(packed), -1, _RUN // 2)
    return torch.stack((runs & 15, runs >> 4), 2).flatten(1)
