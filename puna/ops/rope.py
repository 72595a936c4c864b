"""Rotary position embedding in the half-split layout (element i is paired with i + D/2), as on Hugging Face.

Meta's checkpoints pair neighbours instead; the permutation between the two belongs to the checkpoint border.
"""

import math

import torch
from torch import Tensor


def rope_frequencies(head_dim: int, theta: float) -> Tensor:
    """theta^(-2i/D) for i in 0 .. D/2-1: (D/2,) fp32, radians a position."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)


def scale_frequencies(
    frequencies: Tensor, factor: float, low_freq_factor: float, high_freq_factor: float, original_max_seq_len: int
) -> Tensor:
    """Llama 3.1's context extension: long wavelengths are stretched by `factor`, short ones kept, a ramp between.

    Wavelengths below original/high stay; above original/low they are divided; in between the two are blended.
    """
    wavelength = 2 * math.pi / frequencies
    ramp = (original_max_seq_len / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
    blended = (1 - ramp) * frequencies / factor + ramp * frequencies
    scaled = torch.where(wavelength > original_max_seq_len / low_freq_factor, frequencies / factor, blended)
    return torch.where(wavelength < original_max_seq_len / high_freq_factor, frequencies, scaled)


def rope_tables(frequencies: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin for `positions` (B, T): each (B, 1, T, D/2) fp32. bf16 would lose positions beyond a few thousand."""
    angles = positions[:, None, :, None].float() * frequencies
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, H, T, D) by the tables; computed in the tables' dtype, returned in x's."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
