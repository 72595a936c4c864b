"""Quantized weights of a model directory: which layout config.json names, and its tensors as packed weights."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from puna.checkpoint import bitsandbytes, compressed_tensors
from puna.checkpoint.compressed_config import matched, quantization_config, read_groups
from puna.checkpoint.names import to_disk_name
from puna.checkpoint.stored import Weight, expected_shapes
from puna.errors import CheckpointError, UsageError
from puna.model.config import ModelConfig
from puna.model.transformer import Transformer
from puna.ops.packed import Packed, dequantize
from puna.ops.packed_layers import packed_layers


def packed_tensors(model: Transformer, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The packed layers of a model as tensors by their disk names, and config.json's section about them.

    Args:
        dtype: what others dequantize NF4 to.

    Raises:
        UsageError: weights that no layout has a place for.
    """
    found = packed_layers(model)
    if model.config.tie_embeddings and "lm_head" in found:  # stored once: as the head, which may round its input
        found["embed_tokens"] = found.pop("lm_head")
    layers = {to_disk_name(f"{n}.weight").removesuffix(".weight"): layer.packed for n, layer in found.items()}
    tables = {packed.table is not None for packed in layers.values()}
    if tables == {True}:
        parts = [bitsandbytes.tensors_of(f"{n}.weight", packed, dtype) for n, packed in layers.items()]
        nested = any(packed.scale_table is not None for packed in layers.values())
        section = bitsandbytes.quantization_config(nested, dtype)
    elif tables == {False}:
        parts = [compressed_tensors.tensors_of(name, packed) for name, packed in layers.items()]
        section = quantization_config(layers, [] if "lm_head" in layers else ["lm_head"])
    else:
        raise UsageError("NF4 beside other integers: no layout has a place for both", fix="one scheme for all layers")
    return {name: tensor for part in parts for name, tensor in part.items()}, section


def open_quantized(
    found: Mapping[str, Weight], section: Mapping[str, Any], config: ModelConfig, where: object
) -> dict[str, Weight]:
    """The tensors of a quantized directory, by their disk names, with the parts of packed weights put together.

    Args:
        section: config.json's quantization_config.

    Raises:
        CheckpointError: a layout that is not computed, or parts that do not fit the config.
    """
    opener = _opener(section, where)
    shapes = {to_disk_name(name): shape for name, shape in expected_shapes(config).items()}
    weights = {name: weight for name, weight in found.items() if not _is_part(name, found)}
    for layer in dict.fromkeys(name.rpartition(".weight")[0] for name in found.keys() - weights.keys()):
        if len(shape := shapes.get(name := f"{layer}.weight", ())) != 2:
            raise CheckpointError(f"{layer[:100]!r} is quantized, the config has no such matrix", where=where)
        parts = {n.removeprefix(f"{layer}."): found[n] for n in found if n.startswith(name)}
        read, kind = opener(layer, parts, (shape[0], shape[1]), where)
        weights[name] = Weight(shape, torch.float32, partial(_dequantized, read), True, True, read, kind)
    if integers := sorted(name for name, weight in weights.items() if not weight.dtype.is_floating_point):
        raise CheckpointError(f"{integers[0][:100]!r} holds integers without scales", where=where, cause="damage")
    return weights


def kinds(section: Mapping[str, Any], where: object) -> list[str]:
    """What layers were rounded to, as config.json's section says it: a line for each kind, `puna quantize`'s words.

    Raises:
        CheckpointError: a layout that is not computed.
    """
    if section["quant_method"] == "bitsandbytes":
        bitsandbytes.check_section(section, where)
        nested = bool(section.get("bnb_4bit_use_double_quant"))
        return ["nf4-double, a scale of 8 bits for each 64" if nested else "nf4, a scale for each 64"]
    told = []
    for group in read_groups(section, where):
        inputs = group.activations == "int8"
        scheme = "int8-int4" if inputs and group.bits == 4 else f"int{group.bits}" + ", inputs too" * inputs
        scale = f"a scale for each {group.size} of a row" if group.size else "a scale for each row"
        told.append(f"{scheme}, {scale}: {', '.join(group.targets[:3])}{' ...' * (len(group.targets) > 3)}")
    return told


def _opener(section: Mapping[str, Any], where: object) -> Callable[..., tuple[Callable[[], Packed], str]]:
    """What opens a layer from (its disk name, its parts, shape, where): what reads it, and what it is stored in."""
    if section["quant_method"] == "bitsandbytes":
        bitsandbytes.check_section(section, where)
        return lambda layer, *told: (bitsandbytes.opened(*told), "NF4")
    groups = read_groups(section, where)

    def open_layer(
        layer: str, parts: Mapping[str, Weight], shape: tuple[int, int], where: object
    ) -> tuple[Callable[[], Packed], str]:
        if (group := matched(layer, groups)) is None:
            raise CheckpointError(f"{layer} is quantized, but in no group of quantization_config", where=where)
        return compressed_tensors.opened(parts, group, shape, where), f"INT{group.bits}"

    return open_layer


def _is_part(name: str, found: Mapping[str, Weight]) -> bool:
    """Whether a tensor belongs to a quantized layer: it has more than its name, or others that have."""
    _, weight, rest = name.rpartition(".weight")
    return bool(weight) and (bool(rest) or f"{name}_scale" in found or f"{name}.absmax" in found)


def _dequantized(read: Callable[[], Packed]) -> Tensor:
    return dequantize(read())
