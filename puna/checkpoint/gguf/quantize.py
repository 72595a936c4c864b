"""fp32 weights into ggml's storage types: the simple ones as llama.cpp rounds them, Q4_K, Q5_K and Q6_K by search.

Every function takes (blocks, weights of a block) fp32 and gives (blocks, bytes of a block) uint8.
"""

from collections.abc import Callable

import numpy as np

from puna.checkpoint.gguf.bit_fields import half, half_bytes, pack_fields
from puna.checkpoint.gguf.blocks import LAYOUTS, Ggml
from puna.checkpoint.gguf.superblocks import pack_scales
from puna.errors import NumericError

_CHUNK = 1 << 16  # weights quantized at once; the search keeps some ten arrays of that size


def quantize(weights: np.ndarray, kind: Ggml) -> np.ndarray:
    """(..., columns) fp32 -> (bytes,) uint8 of its blocks; columns are whole blocks.

    Raises:
        NumericError: weights that are not finite: their block would become noise.
    """
    if not np.isfinite(weights).all():
        raise NumericError("weights that are not finite cannot be quantized", cause="training had diverged")
    layout, encode = LAYOUTS[kind], _ENCODERS[kind]
    blocks = np.ascontiguousarray(weights, np.float32).reshape(-1, layout.weights)
    packed = np.empty((len(blocks), layout.size), np.uint8)
    step = _CHUNK // layout.weights
    for at in range(0, len(blocks), step):
        packed[at : at + step] = encode(blocks[at : at + step])
    return packed.reshape(-1)


def _f32(blocks: np.ndarray) -> np.ndarray:
    return blocks.astype("<f4").view(np.uint8)


def _f16(blocks: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        halves = blocks.astype("<f2")
    if not np.isfinite(halves).all():
        raise NumericError("a weight above 65504 does not fit fp16", fix="another type: BF16 or Q8_0")
    return halves.view(np.uint8)


def _bf16(blocks: np.ndarray) -> np.ndarray:
    """Rounded to nearest, ties to even, on the bits."""
    bits = blocks.view(np.uint32)
    return ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype("<u2").view(np.uint8)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    """q = round(x / d), halves away from zero, d = max |x| / 127."""
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    q = _round_away(blocks * _inverse(scale)).astype(np.int8)
    return np.concatenate((half_bytes(scale), q.view(np.uint8)), axis=1)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    scale, q = _signed_extreme(blocks, 8)
    return np.concatenate((half_bytes(scale), pack_fields(q, 4, 16)), axis=1)


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    scale, q = _signed_extreme(blocks, 16)
    return np.concatenate((half_bytes(scale), pack_fields(q >> 4, 1, 1), pack_fields(q & 15, 4, 16)), axis=1)


def _signed_extreme(blocks: np.ndarray, middle: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale and q in 0 .. 2 * middle - 1: the weight of largest magnitude, with its sign, becomes q = 0 exactly."""
    at = np.abs(blocks).argmax(axis=1)[:, None]
    scale = np.take_along_axis(blocks, at, axis=1) / np.float32(-middle)
    q = (blocks * _inverse(scale) + np.float32(middle + 0.5)).astype(np.int8)
    return scale, np.minimum(q, 2 * middle - 1).astype(np.uint8)


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    header, q = _affine_superblocks(blocks, 15, range(-10, 11))
    return np.concatenate((header, pack_fields(q, 4, 32)), axis=1)


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    header, q = _affine_superblocks(blocks, 31, range(-5, 11))
    return np.concatenate((header, pack_fields(q >> 4, 1, 32), pack_fields(q & 15, 4, 32)), axis=1)


def _affine_superblocks(blocks: np.ndarray, top: int, tenths: range) -> tuple[np.ndarray, np.ndarray]:
    """Eight groups of 32, each x = scale * q - minimum; scales and minima as six-bit integers: 16 bytes, and the q."""
    groups = blocks.reshape(-1, 8, 32)
    weights = np.sqrt((groups**2).mean(axis=2, keepdims=True)) + np.abs(groups)
    scales, minima = _search_affine(groups, weights, top, tenths)
    d, ls = _six_bits(scales)
    dmin, lm = _six_bits(minima)
    step, least = (half(half_bytes(d), 0) * ls)[:, :, None], (half(half_bytes(dmin), 0) * lm)[:, :, None]
    q = _rounded(groups, -least, step, top).astype(np.uint8).reshape(-1, 256)
    return np.concatenate(
        (half_bytes(d), half_bytes(dmin), pack_scales(ls.astype(np.uint8), lm.astype(np.uint8))), 1
    ), q


def _six_bits(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(blocks, 8) of at least 0 -> a real scale of each block and integers of 0..63."""
    unit = values.max(axis=1, keepdims=True) / np.float32(63)
    return unit, np.minimum(np.rint(values * _inverse(unit)), 63)


def _search_affine(groups: np.ndarray, weights: np.ndarray, top: int, tenths: range) -> tuple[np.ndarray, np.ndarray]:
    """Scale and minimum (both at least 0) of each group with the least weighted squared error.

    Stretching the range by a little and rounding gives candidate integers; for each the best scale and offset are a
    weighted linear regression. A better offset is where the next range starts. Weighting by |x| spares the large
    weights, which move an output most.
    """
    high, low = groups.max(axis=2, keepdims=True), np.minimum(groups.min(axis=2, keepdims=True), 0)
    scale = (high - low) / top
    error = _error(groups, weights, _rounded(groups, low, scale, top), scale, low)
    total, mean = weights.sum(2, keepdims=True), (weights * groups).sum(2, keepdims=True)
    for stretch in np.array(tenths, np.float32) / 10:
        q = _rounded(groups, low, (high - low) / (top + stretch), top)
        slope, offset = _regression(groups, weights, q, total, mean)
        tried = _error(groups, weights, q, slope, offset)
        better = (tried < error) & (slope > 0)
        scale, low, error = (np.where(better, new, old) for new, old in ((slope, scale), (offset, low), (tried, error)))
    return scale[:, :, 0], -low[:, :, 0]


def _rounded(x: np.ndarray, low: np.ndarray, step: np.ndarray, top: int) -> np.ndarray:
    return np.clip(np.rint((x - low) * _inverse(step)), 0, top)


def _regression(
    x: np.ndarray, weights: np.ndarray, q: np.ndarray, total: np.ndarray, mean: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The slope and offset (at most 0) of x over q."""
    weighted = weights * q
    first, second, cross = (part.sum(2, keepdims=True) for part in (weighted, weighted * q, weighted * x))
    below = _inverse(np.maximum(total * second - first * first, 0))
    slope, offset = (total * cross - mean * first) * below, (second * mean - first * cross) * below
    positive = offset > 0
    return np.where(positive, cross * _inverse(second), slope), np.where(positive, np.float32(0), offset)


def _error(x: np.ndarray, weights: np.ndarray, q: np.ndarray, scale: np.ndarray, least: np.ndarray) -> np.ndarray:
    return (weights * (scale * q + least - x) ** 2).sum(2, keepdims=True)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    """Sixteen groups of 16, each x = scale * (q - 32); scales as signed bytes."""
    groups = blocks.reshape(-1, 16, 16)
    scales = _search_scale(groups)
    at = np.abs(scales).argmax(axis=1)[:, None]
    d = np.take_along_axis(scales, at, axis=1) / np.float32(-128)
    ls = np.clip(np.rint(scales * _inverse(d)), -128, 127)
    step = (half(half_bytes(d), 0) * ls)[:, :, None]
    q = (np.clip(np.rint(groups * _inverse(step)), -32, 31) + 32).astype(np.uint8).reshape(-1, 256)
    parts = pack_fields(q & 15, 4, 64), pack_fields(q >> 4, 2, 32), ls.astype(np.int8).view(np.uint8), half_bytes(d)
    return np.concatenate(parts, axis=1)


def _search_scale(groups: np.ndarray) -> np.ndarray:
    """(blocks, groups) scale of each group: of 19 stretched ranges the one with the least error weighted by x^2."""
    at = np.abs(groups).argmax(axis=2)[:, :, None]
    extreme = np.take_along_axis(groups, at, axis=2)
    weights = groups**2
    scale, best = np.zeros_like(extreme), np.full_like(extreme, -1)
    for stretch in sorted(np.arange(-9, 10, dtype=np.float32) / 10, key=abs):  # of equals the plain range is best
        q = np.clip(np.rint(groups * -(32 + stretch) * _inverse(extreme)), -32, 31)
        weighted = weights * q
        cross, second = (weighted * groups).sum(2, keepdims=True), (weighted * q).sum(2, keepdims=True)
        slope = cross * _inverse(second)
        better = slope * cross > best
        scale, best = np.where(better, slope, scale), np.where(better, slope * cross, best)
    return scale[:, :, 0]


def _inverse(values: np.ndarray) -> np.ndarray:
    """1 / x; 0 of 0, whose block is all zero, and of numbers so small that fp32 has no inverse."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / values
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _round_away(values: np.ndarray) -> np.ndarray:
    return np.trunc(values + np.copysign(np.float32(0.5), values))


_ENCODERS: dict[Ggml, Callable[[np.ndarray], np.ndarray]] = {
    Ggml.F32: _f32, Ggml.F16: _f16, Ggml.BF16: _bf16, Ggml.Q4_0: _q4_0, Ggml.Q5_0: _q5_0, Ggml.Q8_0: _q8_0,
    Ggml.Q4_K: _q4_k, Ggml.Q5_K: _q5_k, Ggml.Q6_K: _q6_k,
}  # fmt: skip
