"""ggml's storage types as fp32: plain floats, and blocks of 32 weights that share a scale (and a minimum)."""

import numpy as np

F32, F16, Q4_0, Q4_1, Q8_0, BF16 = 0, 1, 2, 3, 8, 30
BLOCKS = {F32: (1, 4), F16: (1, 2), Q4_0: (32, 18), Q4_1: (32, 20), Q8_0: (32, 34), BF16: (1, 2)}
"""ggml type: (weights in a block, bytes of a block)."""
NAMES = {F32: "F32", F16: "F16", Q4_0: "Q4_0", Q4_1: "Q4_1", Q8_0: "Q8_0", BF16: "BF16"}


def dequantize(raw: np.ndarray, kind: int) -> np.ndarray:
    """(bytes,) uint8 -> (weights,) fp32. Weight = scale * q (+ minimum); 4-bit q of -8..7 in Q4_0, 0..15 in Q4_1."""
    if kind == F32:
        return raw.view("<f4").astype(np.float32)
    if kind == F16:
        return raw.view("<f2").astype(np.float32)
    if kind == BF16:
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    blocks = raw.reshape(-1, BLOCKS[kind][1])
    scale = _half(blocks, 0)
    if kind == Q8_0:
        return (scale * blocks[:, 2:].view(np.int8).astype(np.float32)).reshape(-1)
    if kind == Q4_0:
        return (scale * (_nibbles(blocks[:, 2:]) - 8)).reshape(-1)
    return (scale * _nibbles(blocks[:, 4:]) + _half(blocks, 2)).reshape(-1)


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Byte j holds element j in its low half and element j + 16 in its high half."""
    return np.concatenate((packed & 15, packed >> 4), axis=1).astype(np.float32)
