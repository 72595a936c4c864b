"""ggml's storage types as fp32. Weights lie in blocks that share a scale, and in some types a minimum.

Here: the table of types, plain floats, and blocks of 32 weights. `superblocks` has the blocks of 256; types made
of code books are left to the `gguf` package.
"""

import importlib
import importlib.util
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from puna.checkpoint.gguf import superblocks
from puna.checkpoint.gguf.bit_fields import bit_fields, half
from puna.errors import CheckpointError

_CHUNK = 1 << 18  # weights dequantized at once: intermediate arrays stay in cache and far below the tensor's size


class Ggml(IntEnum):
    """Types by ggml's number; missing numbers were withdrawn from the format."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40


class Layout(NamedTuple):
    """How a type's weights lie: `weights` of them in a block of `size` bytes."""

    weights: int
    size: int


LAYOUTS = {
    Ggml.F32: Layout(1, 4), Ggml.F16: Layout(1, 2), Ggml.BF16: Layout(1, 2), Ggml.F64: Layout(1, 8),
    Ggml.I8: Layout(1, 1), Ggml.I16: Layout(1, 2), Ggml.I32: Layout(1, 4), Ggml.I64: Layout(1, 8),
    Ggml.Q4_0: Layout(32, 18), Ggml.Q4_1: Layout(32, 20), Ggml.Q5_0: Layout(32, 22), Ggml.Q5_1: Layout(32, 24),
    Ggml.Q8_0: Layout(32, 34), Ggml.Q8_1: Layout(32, 40), Ggml.IQ4_NL: Layout(32, 18), Ggml.MXFP4: Layout(32, 17),
    Ggml.NVFP4: Layout(64, 36), Ggml.Q2_K: Layout(256, 84), Ggml.Q3_K: Layout(256, 110), Ggml.Q4_K: Layout(256, 144),
    Ggml.Q5_K: Layout(256, 176), Ggml.Q6_K: Layout(256, 210), Ggml.Q8_K: Layout(256, 292),
    Ggml.IQ1_S: Layout(256, 50), Ggml.IQ1_M: Layout(256, 56), Ggml.IQ2_XXS: Layout(256, 66),
    Ggml.IQ2_XS: Layout(256, 74), Ggml.IQ2_S: Layout(256, 82), Ggml.IQ3_XXS: Layout(256, 98),
    Ggml.IQ3_S: Layout(256, 110), Ggml.IQ4_XS: Layout(256, 136), Ggml.TQ1_0: Layout(256, 54),
    Ggml.TQ2_0: Layout(256, 66),
}  # fmt: skip


def dequantize(raw: np.ndarray, kind: Ggml) -> np.ndarray:
    """(bytes,) uint8 -> (weights,) fp32, chunk by chunk.

    Raises:
        CheckpointError: a type that is not read without the `gguf` package, or scales that are not finite.
    """
    layout, decode = LAYOUTS[kind], _DECODERS.get(kind) or _by_package(kind)
    blocks = raw.reshape(-1, layout.size)
    weights = np.empty((len(blocks), layout.weights), np.float32)
    step = _CHUNK // layout.weights
    with np.errstate(all="ignore"):  # a hostile scale may overflow; it is told below
        for at in range(0, len(blocks), step):
            weights[at : at + step] = decode(blocks[at : at + step])
            if kind not in PLAIN and not np.isfinite(weights[at : at + step]).all():
                raise CheckpointError("a scale is not finite", cause="damage, or a model that had diverged")
    return weights.reshape(-1)


def _by_package(kind: Ggml) -> Callable[[np.ndarray], np.ndarray]:
    """The `gguf` package's dequantizer of a rare type: an option, so it is imported only when such a tensor is read."""
    if kind in (Ggml.I8, Ggml.I16, Ggml.I32, Ggml.I64, Ggml.Q8_1):
        raise CheckpointError(f"{kind.name} is no storage of weights")
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(f"{kind.name} is read by the gguf package, which is missing", fix="pip install gguf")
    package = importlib.import_module("gguf")
    try:
        number = package.GGMLQuantizationType(int(kind))
        package.dequantize(np.zeros((1, LAYOUTS[kind].size), np.uint8), number)
    except (ValueError, NotImplementedError):
        raise CheckpointError(
            f"the installed gguf package does not read {kind.name}", fix="pip install -U gguf"
        ) from None
    return lambda blocks: package.dequantize(blocks, number)


def _f32(blocks: np.ndarray) -> np.ndarray:
    return blocks.view("<f4")


def _f16(blocks: np.ndarray) -> np.ndarray:
    return blocks.view("<f2")


def _f64(blocks: np.ndarray) -> np.ndarray:
    return blocks.view("<f8")


def _bf16(blocks: np.ndarray) -> np.ndarray:
    return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    """Scale, 16 bytes: byte j holds weight j in its low half and weight j + 16 in its high half."""
    return half(blocks, 0) * (bit_fields(blocks[:, 2:], 4, 16).astype(np.float32) - 8)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    return half(blocks, 0) * bit_fields(blocks[:, 4:], 4, 16).astype(np.float32) + half(blocks, 2)


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    return half(blocks, 0) * (_five_bits(blocks[:, 2:]) - 16)


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    return half(blocks, 0) * _five_bits(blocks[:, 4:]) + half(blocks, 2)


def _five_bits(packed: np.ndarray) -> np.ndarray:
    """The fifth bits of all 32 weights in four bytes, then the others as in Q4_0."""
    return (bit_fields(packed[:, 4:], 4, 16) | bit_fields(packed[:, :4], 1, 1) << 4).astype(np.float32)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _iq4_nl(blocks: np.ndarray) -> np.ndarray:
    return half(blocks, 0) * superblocks.IQ4_VALUES[bit_fields(blocks[:, 2:], 4, 16)]


PLAIN = (Ggml.F32, Ggml.F16, Ggml.BF16, Ggml.F64)
_DECODERS: dict[Ggml, Callable[[np.ndarray], np.ndarray]] = {
    Ggml.F32: _f32, Ggml.F16: _f16, Ggml.BF16: _bf16, Ggml.F64: _f64, Ggml.Q4_0: _q4_0, Ggml.Q4_1: _q4_1,
    Ggml.Q5_0: _q5_0, Ggml.Q5_1: _q5_1, Ggml.Q8_0: _q8_0, Ggml.IQ4_NL: _iq4_nl, Ggml.Q2_K: superblocks.q2_k,
    Ggml.Q3_K: superblocks.q3_k, Ggml.Q4_K: superblocks.q4_k, Ggml.Q5_K: superblocks.q5_k,
    Ggml.Q6_K: superblocks.q6_k, Ggml.Q8_K: superblocks.q8_k, Ggml.IQ4_XS: superblocks.iq4_xs,
}  # fmt: skip
