"""ggml's blocks of 256 weights ("K-quants", IQ4_XS) as fp32.

A superblock has groups of 16 or 32 weights. Each group has a small integer scale (and minimum), which one fp16 number
of the superblock turns into a real one: weight = d * scale * q - dmin * minimum.
"""

import numpy as np

from puna.checkpoint.gguf.bit_fields import bit_fields, half

IQ4_VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)  # fmt: skip
"""What the 16 codes of IQ4_NL and IQ4_XS stand for: finer near zero, where most weights are."""


def q2_k(blocks: np.ndarray) -> np.ndarray:
    """16 bytes of scale (low half) and minimum (high half), 64 bytes of two-bit weights, d, dmin."""
    scales, minima = blocks[:, :16] & 15, blocks[:, :16] >> 4
    q = bit_fields(blocks[:, 16:80], 2, 32)
    return _grouped(q, half(blocks, 80) * scales, half(blocks, 82) * minima)


def q3_k(blocks: np.ndarray) -> np.ndarray:
    """32 bytes of third bits, 64 of the lower two, 12 of six-bit scales, d. A third bit that is off subtracts 4."""
    q = bit_fields(blocks[:, 32:96], 2, 32).astype(np.int8) - 4 * (
        1 - bit_fields(blocks[:, :32], 1, 32).astype(np.int8)
    )
    scales = bit_fields(blocks[:, 96:104], 4, 8) | bit_fields(blocks[:, 104:108], 2, 4) << 4
    return _grouped(q, half(blocks, 108) * (scales.astype(np.float32) - 32))


def q4_k(blocks: np.ndarray) -> np.ndarray:
    """d, dmin, 12 bytes of scales and minima, 128 bytes of four-bit weights."""
    scales, minima = unpack_scales(blocks[:, 4:16])
    q = bit_fields(blocks[:, 16:], 4, 32)
    return _grouped(q, half(blocks, 0) * scales, half(blocks, 2) * minima)


def q5_k(blocks: np.ndarray) -> np.ndarray:
    """As Q4_K, with 32 bytes of fifth bits before the others."""
    scales, minima = unpack_scales(blocks[:, 4:16])
    q = bit_fields(blocks[:, 48:], 4, 32) | bit_fields(blocks[:, 16:48], 1, 32) << 4
    return _grouped(q, half(blocks, 0) * scales, half(blocks, 2) * minima)


def q6_k(blocks: np.ndarray) -> np.ndarray:
    """128 bytes of the lower four bits, 64 of the upper two, 16 signed scales, d. Weights are q - 32."""
    q = bit_fields(blocks[:, :128], 4, 64) | bit_fields(blocks[:, 128:192], 2, 32) << 4
    return _grouped(q.astype(np.int8) - 32, half(blocks, 208) * blocks[:, 192:208].view(np.int8))


def q8_k(blocks: np.ndarray) -> np.ndarray:
    """An fp32 scale, 256 signed bytes, and their sums, which only llama.cpp's products need."""
    scale = np.ascontiguousarray(blocks[:, :4]).view("<f4")
    return scale * blocks[:, 4:260].view(np.int8).astype(np.float32)


def iq4_xs(blocks: np.ndarray) -> np.ndarray:
    """d, eight six-bit scales (upper two bits first, then lower four), 128 bytes of codes."""
    scales = bit_fields(blocks[:, 4:8], 4, 1) | bit_fields(blocks[:, 2:4], 2, 1) << 4
    values = IQ4_VALUES[bit_fields(blocks[:, 8:], 4, 16)]
    return _grouped(values, half(blocks, 0) * (scales.astype(np.float32) - 32))


def unpack_scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """12 bytes -> eight six-bit scales and eight six-bit minima.

    The first four bytes hold scales 0..3 and the next four minima 0..3; their two upper bits are those of number
    i + 4, whose lower four bits lie in the last four bytes: the scale's below the minimum's.
    """
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate((first & 63, third & 15 | first >> 6 << 4), axis=1)
    minima = np.concatenate((second & 63, third >> 4 | second >> 6 << 4), axis=1)
    return scales, minima


def pack_scales(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """The inverse of `unpack_scales`: (blocks, 8) uint8 each -> (blocks, 12)."""
    first = scales[:, :4] | scales[:, 4:] >> 4 << 6
    second = minima[:, :4] | minima[:, 4:] >> 4 << 6
    return np.concatenate((first, second, scales[:, 4:] & 15 | minima[:, 4:] << 4), axis=1)


def _grouped(q: np.ndarray, scales: np.ndarray, minima: np.ndarray | None = None) -> np.ndarray:
    """scale * q (- minimum), with one scale and minimum for each group of a superblock."""
    groups = q.reshape(*scales.shape, -1).astype(np.float32) * scales[:, :, None]
    return (groups if minima is None else groups - minima[:, :, None]).reshape(len(q), -1)
