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
from puna.ops.packed import Packed
from puna.quant.dynamic import BLOCK as NESTED_BLOCK
from puna.quant.dynamic import dynamic_table
from puna.quant.nf4 import BLOCK, VALUES, Nested, nest, unnest

STATE = "quant_state.bitsandbytes__nf4"
_STATE_BYTES = 4096
_OTHER = {"load_in_8bit": False, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "uint8"}


def tensors_of(name: str, packed: Packed, nested: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one weight by their disk names; `name` is that of the weight.

    Args:
        nested: store the scales in 8 bits, too.
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
    if nested:
        small = nest(packed.scales.float())
        more = {"absmax": small.codes, "nested_absmax": small.absmax, "nested_quant_map": dynamic_table()}
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": small.offset.item()}
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
        {"weight.nested_absmax": (-(-size // BLOCK // NESTED_BLOCK),), "weight.nested_quant_map": (256,)}
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
    state, table, absmax = _state(parts[STATE], where), parts["quant_map"].float(), parts["absmax"]
    if "nested_absmax" in parts:
        offset = state.get("nested_offset")
        if not isinstance(offset, float) or state.get("nested_blocksize") != NESTED_BLOCK:
            raise CheckpointError(
                "its nested scales do not fit", where=where, cause="damage, or blocks of another size"
            )
        nested = Nested(absmax, parts["nested_absmax"].float(), torch.tensor(offset))
        absmax = unnest(nested, parts["nested_quant_map"].float())
    said = {key: state.get(key) for key in ("quant_type", "blocksize", "shape")}
    if said != {"quant_type": "nf4", "blocksize": BLOCK, "shape": list(shape)}:
        raise CheckpointError(
            f"its state says {str(said)[:200]}", where=where, cause=f"damage, or blocks of not {BLOCK}"
        )
    if not (table.isfinite().all() and absmax.isfinite().all()):
        raise CheckpointError("a scale is not finite", where=where, cause="damage, or a model that had diverged")
    column = parts["weight"].flatten()
    codes = torch.stack((column >> 4, column & 15), 1).view(shape)
    return Packed(pack_nibbles(codes), absmax.view(shape[0], -1), bits=4, group=BLOCK, table=table)


def _state(raw: Tensor, where: object) -> dict[str, Any]:
    try:
        tree = json.loads(bytes(raw.tolist())) if raw.dtype == torch.uint8 and raw.numel() <= _STATE_BYTES else None
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        raise CheckpointError("its quant_state is no JSON of bytes", where=where, cause="damage")
    return tree
