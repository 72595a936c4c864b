"""Adapter directories in PEFT's layout: PEFT and vLLM open ours, we open theirs."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from puna.checkpoint.model_directory import read_json
from puna.checkpoint.names import from_disk_name, name_problems, to_disk_name
from puna.dist.fsdp import gathered
from puna.errors import CheckpointError
from puna.files import write_json
from puna.lora import LoraConfig, add_lora, lora_parameters
from puna.model.transformer import Transformer
from puna.ranks import rank
from puna.tokenizer.tokenizer import Tokenizer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def save_adapter(
    folder: Path, model: Transformer, config: LoraConfig, tokenizer: Tokenizer, base: str, lineage: dict[str, Any]
) -> None:
    """Write the adapters of `model` (fp32) into an existing folder; `base` says what they belong to. Rank 0 writes."""
    tensors = gathered({f"{_PREFIX}{to_disk_name(n)}": p for n, p in lora_parameters(model).items()})
    if rank():
        return
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": config.targets,
        "bias": "none",
        "inference_mode": True,
    }
    write_json(folder / CONFIG, values)
    tokenizer.save(folder)
    write_json(folder / "puna.json", {**lineage, "tokenizer": tokenizer.fingerprint})


def load_adapter(model: Transformer, folder: Path, dtype: torch.dtype = torch.float32) -> LoraConfig:
    """Put the adapters of `folder` onto `model`, in place.

    Raises:
        CheckpointError: a kind of adapter puna does not compute, or tensors that do not fit (all are listed).
    """
    config = adapter_config(folder)
    add_lora(model, config, dtype=dtype)
    try:
        found = {_our_name(n): t for n, t in load_file(folder / WEIGHTS).items()}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read: {error}", where=folder / WEIGHTS) from None
    targets = lora_parameters(model)
    problems = name_problems(targets, found)
    problems += [
        f"{n} is {tuple(found[n].shape)}, the base needs {tuple(p.shape)}"
        for n, p in targets.items()
        if n in found and found[n].shape != p.shape
    ]
    if problems:
        raise CheckpointError("does not fit its base: " + "; ".join(problems[:20]), where=folder)
    with torch.no_grad():
        for name, parameter in targets.items():
            parameter.copy_(found[name])
    return config


def adapter_config(folder: Path) -> LoraConfig:
    """Our config of an adapter_config.json.

    Raises:
        CheckpointError: DoRA, rsLoRA, per-layer ranks and other things that would compute something else.
    """
    values = read_json(folder / CONFIG)
    plain: dict[str, Any] = {"peft_type": "LORA", "bias": "none", "use_dora": False, "use_rslora": False}
    plain |= dict.fromkeys(("rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform"))
    odd = {k: values[k] for k, usual in plain.items() if values.get(k) not in (None, usual, {}, [])}
    targets = values.get("target_modules")
    if odd or not isinstance(targets, list):
        raise CheckpointError(f"not supported: {odd or {'target_modules': targets}}", where=folder / CONFIG)
    given = {"rank": values["r"], "alpha": values["lora_alpha"], "dropout": values.get("lora_dropout", 0.0)}
    return LoraConfig(**given, targets=sorted(targets))


def base_of(folder: Path) -> str:
    """The model an adapter belongs to, as its config names it."""
    base = read_json(folder / CONFIG).get("base_model_name_or_path")
    if not base:
        raise CheckpointError("the adapter does not say its base model", where=folder / CONFIG)
    return str(base)


def _our_name(name: str) -> str:
    return from_disk_name(name.removeprefix(_PREFIX))
