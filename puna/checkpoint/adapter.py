"""Adapter directories in PEFT's layout: PEFT and vLLM open ours, we open theirs, and torchtune's own."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from puna.checkpoint.names import from_disk_name, name_problems, to_disk_name
from puna.checkpoint.safetensors_file import open_safetensors, write_safetensors
from puna.checkpoint.stored import Stored, Weight
from puna.checkpoint.torchtune import from_torchtune, is_torchtune
from puna.checkpoint.weight_files import inside, read_json
from puna.dist.fsdp import gathered
from puna.errors import CheckpointError, UsageError
from puna.files import write_json
from puna.lineage import read_lineage, write_lineage
from puna.lora import LoraConfig, adapted_layers, add_lora, lora_layers, lora_parameters, whole_parameters
from puna.model.transformer import Transformer
from puna.ranks import rank
from puna.tokenizer.tokenizer import Tokenizer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_OURS = {
    "rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules",
    "rslora": "use_rslora", "dora": "use_dora", "rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern",
    "modules_to_save": "modules_to_save",
}  # fmt: skip
_ENDS = ("embed_tokens", "lm_head")
# What may stand in an adapter_config.json and changes nothing that is computed; other settings have to be off.
_IDLE = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "inference_mode", "loftq_config",
    "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
_USUAL = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, "gaussian", "eva", "orthogonal")}
_UNPICKLE = (
    "python -c \"import torch, safetensors.torch as s; s.save_file(torch.load('adapter_model.bin', "
    "weights_only=True), 'adapter_model.safetensors')\" in that folder"
)


def save_adapter(
    folder: Path, model: Transformer, config: LoraConfig, tokenizer: Tokenizer, base: str, lineage: dict[str, Any],
    quantize: str | None = None,
) -> None:  # fmt: skip
    """Write the adapters of `model` (fp32) and what was trained whole beside them into an existing folder.

    Rank 0 writes. A tied matrix is written under both of its names, since PEFT reads one for each.

    Args:
        base: what they belong to.
        quantize: what the base's linear layers were rounded to while they were trained (see `rounded`).
    """
    whole = whole_parameters(model, config)
    tied = model.config.tie_embeddings and "embed_tokens.weight" in whole
    trained = {**lora_parameters(model), **whole}
    tensors = gathered({f"{_PREFIX}{to_disk_name(n)}": p for n, p in trained.items()})
    if rank():
        return
    if tied:
        tensors[f"{_PREFIX}lm_head.weight"] = tensors[f"{_PREFIX}model.embed_tokens.weight"]
    weights = {n: Weight(tuple(t.shape), t.dtype, partial(tensors.pop, n)) for n, t in tensors.items()}
    write_safetensors(folder / WEIGHTS, weights, lambda name: None)
    values = {disk: getattr(config, ours) for ours, disk in _OURS.items()}
    if isinstance(config.targets, str):  # spelled out: readers differ in what a pattern is held against
        values["target_modules"] = [to_disk_name(name) for name in lora_layers(model)]
    others = [name for name in config.modules_to_save if name not in _ENDS]
    values["modules_to_save"] = ([*_ENDS, *others] if tied else config.modules_to_save) or None
    values |= {"ensure_weight_tying": True} if tied else {}
    plain = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True}
    write_json(folder / CONFIG, {**plain, "base_model_name_or_path": base, **values})
    tokenizer.save(folder)
    write_lineage(folder, {**lineage, "quantize": quantize} if quantize else lineage)


def load_adapter(model: Transformer, folder: Path, dtype: torch.dtype = torch.float32) -> LoraConfig:
    """Put the adapters of `folder` onto `model`, in place, and what was trained whole in the place of what it has.

    The latter takes the model's dtype, in which it was computed with while it was trained in fp32.

    Raises:
        CheckpointError: see `read_adapter`.
    """
    config, found = read_adapter(model, folder)
    kept = {name: p.dtype for name, p in whole_parameters(model, config).items()}
    add_lora(model, config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            parameter.copy_(found[name])
        for name, parameter in whole_parameters(model, config).items():
            parameter.data = found[name].to(parameter.device, kept[name])
    return config


def read_adapter(model: Transformer, folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """An adapter of `model`, which is left as it is: its tensors by our names (`...q_proj.lora_A.weight`).

    Raises:
        CheckpointError: a kind of adapter puna does not compute, or tensors that do not fit (all are listed).
    """
    config, found = adapter_config(folder), _tensors(folder, model.config.head_dim)
    # What PEFT saves of an embedding that was given rows is in the file, and not in the config.
    more = [name for name in _ENDS if f"{name}.weight" in found and name not in config.modules_to_save]
    config = config.model_copy(update={"modules_to_save": [*config.modules_to_save, *more]})
    if model.config.tie_embeddings:
        found = _one_matrix(found, folder)
    try:
        wanted = _expected_shapes(model, config)
    except UsageError as error:
        raise CheckpointError(error.what, where=folder / CONFIG) from None
    problems = name_problems(wanted, found)
    problems += [
        f"{n} is {tuple(found[n].shape)}, the base needs {shape}"
        for n, shape in wanted.items()
        if n in found and tuple(found[n].shape) != shape
    ]
    if problems:
        raise CheckpointError("does not fit its base: " + "; ".join(problems[:20]), where=folder)
    return config, found


def adapter_config(folder: Path) -> LoraConfig:
    """Our config of an adapter_config.json.

    Raises:
        CheckpointError: settings that would compute something else than puna does, or no such values.
    """
    values, where = read_json(folder / CONFIG), folder / CONFIG
    if not isinstance(values, dict):
        raise CheckpointError("is no mapping", where=where)
    known = {*_IDLE, *_USUAL, *_OURS.values()}
    odd = {k: v for k, v in values.items() if k not in known and v}
    odd |= {k: values[k] for k, usual in _USUAL.items() if values.get(k, usual[0]) not in (None, False, *usual)}
    if odd:
        raise CheckpointError(f"not supported: {odd}", where=where, fix="merge it with PEFT: merge_and_unload()")
    given = {ours: values[disk] for ours, disk in _OURS.items() if values.get(disk) is not None}
    try:
        if missing := [disk for disk in ("r", "lora_alpha", "target_modules") if values.get(disk) is None]:
            raise CheckpointError(f"missing: {', '.join(missing)}", where=where)
        if isinstance(given["targets"], list):
            given["targets"] = sorted(given["targets"])
        return LoraConfig(**given)
    except (ValidationError, TypeError) as error:
        raise CheckpointError(f"values that cannot be: {error}", where=where) from None


def quantized_base_of(folder: Path) -> str | None:
    """What the base's linear layers were rounded to while an adapter was trained; None: they were as they are.

    Raises:
        CheckpointError: no word for it.
    """
    told = read_lineage(folder).get("quantize")
    if told is not None and not isinstance(told, str):
        raise CheckpointError(f"quantize is {str(told)[:60]!r}", where=folder / "puna.json", cause="damage")
    return told


def embedding_rows(folder: Path) -> int | None:
    """How many rows the embedding has that was trained with an adapter, if one was."""
    found = open_safetensors(inside(folder, WEIGHTS)) if (folder / WEIGHTS).exists() else {}
    weight = found.get(f"{_PREFIX}model.embed_tokens.weight")
    return weight.shape[0] if weight is not None and len(weight.shape) == 2 else None


def base_of(folder: Path) -> str:
    """The model an adapter belongs to, as its config names it."""
    base = read_json(folder / CONFIG).get("base_model_name_or_path")
    if not base:
        raise CheckpointError("the adapter does not say its base model", where=folder / CONFIG)
    return str(base)


def tokenizer_of(folder: Path, base: Stored) -> Tokenizer:
    """An adapter's own tokenizer; its base's where it brings none, as PEFT writes it."""
    own = folder.is_dir() and (folder / CONFIG).exists() and (folder / "tokenizer.json").exists()
    return Tokenizer(folder) if own else base.read_tokenizer()


def _tensors(folder: Path, head_dim: int) -> dict[str, Tensor]:
    """By our names, in our row order."""
    path = folder / WEIGHTS
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise CheckpointError("adapter_model.bin is a pickle, which can run code", where=folder, fix=_UNPICKLE)
    found = {name: weight.read() for name, weight in open_safetensors(inside(folder, WEIGHTS)).items()}
    if is_torchtune(found):
        ours = from_torchtune(found, head_dim)
    else:
        ours = {from_disk_name(name.removeprefix(_PREFIX)): tensor for name, tensor in found.items()}
    if len(ours) < len(found):
        raise CheckpointError("the same tensors under two names each", where=path, cause="parts of two adapters")
    return ours


def _one_matrix(found: dict[str, Tensor], where: Path) -> dict[str, Tensor]:
    """The tensors of an adapter of a tied model, with what was trained of embedding and head once, as the embedding."""
    one, two = (found.get(f"{name}.weight") for name in _ENDS)
    if one is None and two is None:
        return found
    if one is None or two is None or not torch.equal(one, two):
        raise CheckpointError(
            "embedding and head are two matrices, its base ties them", where=where, cause="trained without "
            "ensure_weight_tying", fix='merge it with PEFT, and save with "tie_word_embeddings": false',
        )  # fmt: skip
    return {name: tensor for name, tensor in found.items() if name != "lm_head.weight"}


def _expected_shapes(model: Transformer, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Of every adapter tensor by our names, before anything of a size that a file claims is made."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in adapted_layers(model, config).items():
        rank, _ = config.of(name)
        shapes[f"{name}.lora_A.weight"] = (rank, layer.in_features)
        shapes[f"{name}.lora_B.weight"] = (layer.out_features, rank)
        if config.dora:
            shapes[f"{name}.lora_magnitude_vector"] = (layer.out_features,)
    return shapes | {name: tuple(p.shape) for name, p in whole_parameters(model, config).items()}
