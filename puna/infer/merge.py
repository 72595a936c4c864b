"""Adapters made part of the weights: one, or several of one base, each by its weight."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from puna.checkpoint.adapter import CONFIG as ADAPTER
from puna.checkpoint.adapter import base_of, embedding_rows, quantized_base_of, read_adapter, tokenizer_of
from puna.checkpoint.registry import find_model, open_model
from puna.errors import UsageError
from puna.infer.llama import Llama, load_base
from puna.log import log
from puna.lora import LoraConfig, LoraLinear
from puna.quant.quantize import unpack_layers

Onto = Literal["trained", "original"]


@torch.no_grad()
def merge(
    adapters: str | Path | Sequence[str | Path], weights: Sequence[float] | None = None, onto: Onto = "trained"
) -> Llama:
    """A model in fp32 on the CPU with adapters in its weights: W + sum_i weight_i (W_i - W), W_i as adapter i has it.

    Args:
        adapters: adapter directories, or runs that made one; several of one base and one vocabulary.
        weights: what of each adapter's change is taken; all of it by default.
        onto: `trained`: the base as it was computed in while they were trained, of QLoRA the quantized weights,
            dequantized: what is said is what was trained. `original`: the base as it is stored; the rounding that
            the adapter has learned to live with is then missing.

    Raises:
        UsageError: no adapter, adapters of two bases or vocabularies, or a base that no plain weights can replace.
        CheckpointError: what cannot be read.
    """
    listed = [adapters] if isinstance(adapters, str | Path) else adapters
    folders = [_adapter(name) for name in listed]
    shares = [1.0] * len(folders) if weights is None else list(weights)
    if not folders or len(shares) != len(folders) or not all(map(math.isfinite, shares)):
        raise UsageError(f"{len(folders)} adapters and {len(shares)} weights", fix="a number for each adapter")
    trained_on = _common(folders) if onto == "trained" else None
    llama = load_base(folders[0], "fp32", "cpu", quantize=trained_on)
    _check_alike(folders, llama)
    unpack_layers(llama.model)
    read = [read_adapter(llama.model, folder) for folder in folders]
    if trained_on is None and (kinds := {kind for f in folders if (kind := quantized_base_of(f))}):
        log.warning("the adapter was trained on a base in %s, and is merged onto the stored one", ", ".join(kinds))
    for name, parameter in llama.model.named_parameters():
        changed = [(share, _changed(llama.model, name, *one)) for share, one in zip(shares, read, strict=True)]
        parts = [(share, new) for share, new in changed if new is not None]
        if parts:  # one adapter, taken whole: 0 W + 1 W_i, which is W_i to the last bit
            parameter.mul_(1 - sum(share for share, _ in parts))
            for share, new in parts:
                parameter.add_(new, alpha=share)
    llama.model.requires_grad_(True)
    return llama


def _adapter(name: str | Path) -> Path:
    found = find_model(name)
    if not (found / ADAPTER).exists():
        raise UsageError("this is no adapter: there is nothing to merge", where=str(name), fix="use it as it is")
    return found


def _common(folders: Sequence[Path]) -> str | None:
    """What the base of all was rounded to."""
    kinds = {quantized_base_of(folder) for folder in folders}
    if len(kinds) > 1:
        told = " and ".join(str(kind or "not quantized") for kind in sorted(kinds, key=str))
        raise UsageError(f"the adapters were trained on bases that are {told}", fix="--onto original")
    return kinds.pop()


def _check_alike(folders: Sequence[Path], llama: Llama) -> None:
    """Whether adapters belong to one base and to the same ids."""
    first = find_model(base_of(folders[0]))
    for folder in folders[1:]:
        if find_model(base_of(folder)).resolve() != first.resolve():
            raise UsageError(f"two bases: {first} and {base_of(folder)}", where=folder, fix="adapters of one base")
        same = tokenizer_of(folder, open_model(first)).same_ids(llama.tokenizer)
        if not same or embedding_rows(folder) not in (None, llama.model.config.vocab_size):
            raise UsageError("another vocabulary than the first adapter's", where=folder, fix="the same new_tokens")


def _changed(model: nn.Module, name: str, config: LoraConfig, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The parameter `name` as an adapter has it; None where it leaves it."""
    layer = name.removesuffix(".weight")
    if name in tensors or f"{layer}.lora_A.weight" not in tensors:
        return tensors.get(name)
    base = model.get_submodule(layer)
    assert isinstance(base, nn.Linear)
    adapted = LoraLinear(base, *config.of(layer), dora=config.dora)
    own = {key.removeprefix(f"{layer}."): tensor for key, tensor in tensors.items() if key.startswith(f"{layer}.lora_")}
    adapted.load_state_dict(own, strict=False, assign=True)
    return adapted.full_weight()
