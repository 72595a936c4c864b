"""Llama 3.1's RoPE scaling as GGUF has it: what each frequency is divided by, in a tensor called `rope_freqs.weight`.

The tensor does not say which factor and lengths made it, so they are looked for among those that Llamas have and those
that the metadata names, and whichever reproduces every value is it.
"""

from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np

from puna.errors import CheckpointError
from puna.model.config import RopeScaling
from puna.ops.rope import rope_frequencies, scale_frequencies

TENSOR = "rope_freqs.weight"
ORIGINAL_LENGTH = "llama.rope.scaling.original_context_length"
LOW_FACTOR = "llama.rope.scaling.low_freq_factor"
HIGH_FACTOR = "llama.rope.scaling.high_freq_factor"
FACTOR = "puna.rope_scaling_factor"
"""Ours: where theta is small no wave is long enough to be divided by all of the factor, so no divisor tells it."""
_TOLERANCE = 1e-4
"""Relative: writers compute the blended ones in fp32 or fp64 and in different orders."""


def rope_divisors(scaling: RopeScaling, head_dim: int, theta: float) -> np.ndarray:
    """What a runtime divides each frequency by: (head_dim / 2,) fp32; 1, the factor, or between."""
    frequencies = rope_frequencies(head_dim, theta)
    scaled = scale_frequencies(
        frequencies.double(), scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor,
        scaling.original_max_seq_len,
    )  # fmt: skip
    return (frequencies / scaled).float().numpy()


def scaling_metadata(scaling: RopeScaling) -> dict[str, Any]:
    """The keys that let the scaling be read back whatever its lengths are; runtimes use the tensor."""
    return {
        FACTOR: float(scaling.factor),
        ORIGINAL_LENGTH: scaling.original_max_seq_len,
        LOW_FACTOR: float(scaling.low_freq_factor),
        HIGH_FACTOR: float(scaling.high_freq_factor),
    }


def rope_scaling(
    divisors: np.ndarray, metadata: Mapping[str, Any], head_dim: int, theta: float, where: object
) -> RopeScaling | None:
    """The scaling that made `divisors`; None where all are 1.

    Raises:
        CheckpointError: no scaling of type llama3 explains them.
    """
    if divisors.shape == (head_dim // 2,) and np.isfinite(divisors).all():
        if np.allclose(divisors, 1, rtol=_TOLERANCE, atol=0):
            return None
        # The largest divisor is it, if any wave is that long.
        factors = dict.fromkeys([*_told(metadata, FACTOR), 8.0, 32.0, float(divisors.max())])
        for factor, *rest in product(factors, *(_candidates(metadata, key) for key in _USUAL)):
            scaling = _scaling(factor, *rest)
            if scaling and np.allclose(rope_divisors(scaling, head_dim, theta), divisors, rtol=_TOLERANCE, atol=0):
                return scaling
    raise CheckpointError(
        f"{TENSOR} is not Llama 3.1's RoPE scaling", where=where,
        cause="another kind of scaling, which puna does not compute",
    )  # fmt: skip


_USUAL = {LOW_FACTOR: 1.0, HIGH_FACTOR: 4.0, ORIGINAL_LENGTH: 8192}


def _candidates(metadata: Mapping[str, Any], key: str) -> list[float]:
    return [*_told(metadata, key), _USUAL[key]]


def _told(metadata: Mapping[str, Any], key: str) -> list[float]:
    told = metadata.get(key)
    return [told] if isinstance(told, int | float) and 0 < told < 1 << 31 else []


def _scaling(factor: float, low: float, high: float, length: float) -> RopeScaling | None:
    if low >= high:
        return None
    return RopeScaling(factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_seq_len=int(length))


def refuse_other_scaling(metadata: Mapping[str, Any], where: object) -> None:
    """
    Raises:
        CheckpointError: linear or YaRN scaling, by name.
    """
    kind = metadata.get("llama.rope.scaling.type", "none")
    linear = [metadata.get(key, 1.0) for key in ("llama.rope.scale_linear", "llama.rope.scaling.factor")]
    if kind != "none" or any(factor not in (0, 1) for factor in linear):
        raise CheckpointError(
            f"RoPE scaling of type {kind if kind != 'none' else 'linear'!r} is not supported", where=where
        )
