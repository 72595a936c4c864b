"""Packed weights as compressed-tensors lays them: what transformers and llm-compressor read and write.

transformers was tried; vLLM names the same layouts, and was not.
`pack-quantized`: int32 words of consecutive codes from the low bits up, each code with half of its range added;
`int-quantized`: int8. Scales are (out, groups), of whole rows (out, 1).
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from puna.checkpoint.compressed_config import INTEGERS, Group, group_of
from puna.checkpoint.stored import Weight
from puna.errors import CheckpointError, UsageError
from puna.ops.nibbles import unpack_nibbles
from puna.ops.packed import Packed
from puna.quant.rounding import packed_from
from puna.quant.schemes import Kind

_SCALES = (torch.float32, torch.float16, torch.bfloat16)


def tensors_of(name: str, packed: Packed) -> dict[str, Tensor]:
    """The tensors of one layer by their disk names; `name` is that of the layer.

    Raises:
        UsageError: minima, which this layout has no place for.
    """
    if packed.mins is not None or packed.table is not None:
        raise UsageError(
            f"{name}: blocks with a minimum (Q4_1) have no place in this layout", fix="puna convert, which dequantizes"
        )
    codes = packed.codes if packed.bits == 8 else unpack_nibbles(packed.codes).to(torch.int8) - 8
    scale = {f"{name}.weight_scale": packed.scales.bfloat16() if _short(packed.scales) else packed.scales.float()}
    if group_of(packed).form == INTEGERS:
        return {f"{name}.weight": codes, **scale}
    words = {f"{name}.weight_packed": pack_words(codes, packed.bits)}
    return {**words, **scale, f"{name}.weight_shape": torch.tensor(packed.shape)}


def opened(parts: Mapping[str, Weight], group: Group, shape: tuple[int, int], where: object) -> Callable[[], Packed]:
    """What reads a layer of `shape` that lies as `tensors_of` writes it; `parts` by their names within the layer.

    Raises:
        CheckpointError: parts that are missing, too many, or of another shape.
    """
    rows, columns = shape
    if problem := Kind(group.bits, group.size).problem(columns):
        raise CheckpointError(problem, where=where, cause="damage, or a scheme that puna does not compute")
    scales = ((rows, columns // group.size if group.size else 1), None)
    wanted: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {"weight_scale": scales}
    if "weight_packed" in parts:
        wanted |= {
            "weight_packed": ((rows, columns * group.bits // 32), torch.int32),
            "weight_shape": ((2,), torch.int64),
        }
    else:
        wanted |= {"weight": (shape, torch.int8)}
    fits = {
        n: n in parts and parts[n].shape == s and dtype in (None, parts[n].dtype) for n, (s, dtype) in wanted.items()
    }
    fits["weight_scale"] &= "weight_scale" in parts and parts["weight_scale"].dtype in _SCALES
    if wrong := [n for n in fits if not fits[n]] + sorted(parts.keys() - wanted.keys()):
        raise CheckpointError(
            f"{wrong[0]} is missing, of another kind, or not known", where=where,
            cause=f"not a layer of {group.bits} bits and {shape}: damage, or a scheme that puna does not compute",
        )  # fmt: skip

    def read() -> Packed:
        if "weight" in parts:
            codes = parts["weight"].read()
        elif (told := parts["weight_shape"].read().tolist()) == list(shape):
            codes = unpack_words(parts["weight_packed"].read(), group.bits)
        else:
            raise CheckpointError(f"weight_shape says {told}, the config {list(shape)}", where=where, cause="damage")
        return packed_from(
            codes, _finite(parts["weight_scale"].read(), where), group.bits, group.size or columns, group.activations
        )

    return read


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """(out, in) signed codes -> (out, in * bits / 32) int32, the first code in the lowest bits."""
    places = torch.arange(0, 32, bits)
    words = (codes.to(torch.int64) + (1 << bits - 1)).unflatten(1, (-1, len(places))) << places
    words = words.sum(2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_words`, int8."""
    places = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = (words[:, :, None] >> places) & (1 << bits) - 1
    return (codes - (1 << bits - 1)).to(torch.int8).flatten(1)


def _finite(scales: Tensor, where: object) -> Tensor:
    if not scales.isfinite().all():
        raise CheckpointError("a scale is not finite", where=where, cause="damage, or a model that had diverged")
    return scales


def _short(scales: Tensor) -> bool:
    """Whether bf16 holds them exactly."""
    return torch.equal(scales.bfloat16().float(), scales.float())
