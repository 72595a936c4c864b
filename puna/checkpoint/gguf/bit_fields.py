"""Small integers packed into bytes, the way ggml's blocks hold them."""

import numpy as np


def bit_fields(packed: np.ndarray, bits: int, run: int) -> np.ndarray:
    """Unpack (blocks, bytes) into (blocks, bytes * 8 / bits) uint8.

    Within each run of `run` bytes the lowest field of every byte comes first, then the next field of every byte. A
    run of 1 is the plain little-endian order.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = packed.reshape(len(packed), -1, 1, run) >> shifts
    return (runs & np.uint8((1 << bits) - 1)).reshape(len(packed), -1)


def pack_fields(values: np.ndarray, bits: int, run: int) -> np.ndarray:
    """The inverse of `bit_fields`: (blocks, fields) uint8 -> (blocks, fields * bits / 8)."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = values.reshape(len(values), -1, len(shifts), run) << shifts
    return np.bitwise_or.reduce(runs, axis=2).reshape(len(values), -1)


def half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The fp16 number at byte `at` of every block: (blocks, 1) fp32."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def half_bytes(values: np.ndarray) -> np.ndarray:
    """(blocks, 1) fp32 -> (blocks, 2): the bytes of the fp16 number."""
    return np.ascontiguousarray(values.astype("<f2")).view(np.uint8)
