"""NF4 weights as bitsandbytes lays them, so that transformers and PEFT open them: a column of bytes and its state.

Two codes a byte, the first in the high half; blocks run along the rows. `quant_state` is JSON in a tensor of bytes.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from puna.checkpoint.stored import Weight
from puna.errors import CheckpointError
from puna.ops.nibbles import pack_nibbles, unpack_nibbles
from puna.ops.packed import SCALE_BLOCK, Packed, plain_scales
from puna.quant.nf4 import BLOCK, VALUES

STATE = "quant_state.bitsandbytes__nf4"
_STATE_BYTES = 4096
_OTHER = {"load_in_8bit": False, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "uint8"}


def tensors_of(name: str, packed: Packed, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one weight by their disk names; `name` is that of the weight.

    Args:
        dtype: what bitsandbytes shall dequantize to.
    """
    codes = unpack_nibbles(packed.codes).flatten()
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(packed.shape),
    }
    more = {"absmax": packed.scales.float().flatten()}
    if packed.scale_table is not None and packed.scale_max is not None and packed.scale_offset is not None:
        more = {"absmax": packed.scales.flatten(), "nested_absmax": packed.scale_max}
        more["nested_quant_map"] = packed.scale_table
        offset = packed.scale_offset.item()
        state |= {"nested_blocksize": SCALE_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    told = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors = {"quant_map": VALUES, **more, STATE: told}
    return {name: (codes[::2] << 4 | codes[1::2])[:, None], **{f"{name}.{key}": t for key, t in tensors.items()}}


def quantization_config(nested: bool, dtype: torch.dtype) -> dict[str, Any]:
    """config.json's section."""
    return {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": nested, "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": ["lm_head"],
    }  # fmt: skip


def check_section(section: Mapping[str, Any], where: object) -> None:
    """
    Raises:
        CheckpointError: another kind of bitsandbytes than NF4.
    """
    odd = {key: section.get(key) for key, usual in _OTHER.items() if section.get(key, usual) != usual}
    if odd or section.get("load_in_4bit") is not True:
        raise CheckpointError(
            f"quantization_config: not supported: {odd or 'no load_in_4bit'}", where=where,
            cause="of bitsandbytes puna computes NF4 alone", fix="the model it was quantized from",
        )  # fmt: skip


def opened(parts: Mapping[str, Weight], shape: tuple[int, int], where: object) -> Callable[[], Packed]:
    """What reads a weight of `shape` that lies as `tensors_of` writes it; `parts` by their names within the layer.

    Raises:
        CheckpointError: parts that do not belong to such a weight; what their values say is checked when it is read.
    """
    size = shape[0] * shape[1]
    nested = "weight.nested_absmax" in parts
    wanted = {
        "weight": (size // 2, 1),
        "weight.absmax": (size // BLOCK,),
        "weight.quant_map": VALUES.shape,
        f"weight.{STATE}": None,
    }
    wanted |= (
        {"weight.nested_absmax": (-(-size // BLOCK // SCALE_BLOCK),), "weight.nested_quant_map": (256,)}
        if nested
        else {}
    )
    fits = parts.keys() == wanted.keys() and all(s in (None, parts[name].shape) for name, s in wanted.items())
    kinds = {"weight": torch.uint8, "weight.absmax": torch.uint8 if nested else torch.float32}
    if shape[1] % BLOCK or not fits or any(parts[name].dtype != kind for name, kind in kinds.items()):
        raise CheckpointError(
            f"not NF4 of {shape} in blocks of {BLOCK}", where=where, cause="damage, or blocks of another size",
            fix="the model it was quantized from",
        )  # fmt: skip
    return lambda: _read({name.removeprefix("weight."): part.read() for name, part in parts.items()}, shape, where)


def _read(parts: Mapping[str, Tensor], shape: tuple[int, int], where: object) -> Packed:
    state, table = _state(parts[STATE], where), parts["quant_map"].float()
    scales: dict[str, Any] = {"scales": parts["absmax"].view(shape[0], -1)}
    if "nested_absmax" in parts:
        offset = state.get("nested_offset")
        if not isinstance(offset, float) or state.get("nested_blocksize") != SCALE_BLOCK:
            raise CheckpointError(
                "its nested scales do not fit", where=where, cause="damage, or blocks of another size"
            )
        scales["scale_max"], scales["scale_offset"] = parts["nested_absmax"].float(), torch.tensor(offset)
        scales["scale_table"] = parts["nested_quant_map"].float()
    said = {key: state.get(key) for key in ("quant_type", "blocksize", "shape")}
    if said != {"quant_type": "nf4", "blocksize": BLOCK, "shape": list(shape)}:
        raise CheckpointError(
            f"its state says {str(said)[:200]}", where=where, cause=f"damage, or blocks of not {BLOCK}"
        )
    column = parts["weight"].flatten()
    codes = torch.stack((column >> 4, column & 15), 1).view(shape)
    packed = Packed(pack_nibbles(codes), **scales, bits=4, group=BLOCK, table=table)
    if not (table.isfinite().all() and plain_scales(packed).isfinite().all()):
        raise CheckpointError("a scale is not finite", where=where, cause="damage, or a model that had diverged")
    return packed


def _state(raw: Tensor, where: object) -> dict[str, Any]:
    try:
        tree = json.loads(bytes(raw.tolist())) if raw.dtype == torch.uint8 and raw.numel() <= _STATE_BYTES else None
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        raise CheckpointError("its quant_state is no JSON of bytes", where=where, cause="damage")
    return tree
