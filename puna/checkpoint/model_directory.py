"""The model directory: Hugging Face's layout plus lineage, opened by transformers, vLLM and llama.cpp as it is."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from puna.checkpoint.names import DTYPES, from_disk_name, from_hf_config, name_problems, to_disk_name, to_hf_config
from puna.dist.fsdp import gathered
from puna.errors import CheckpointError
from puna.files import write_json
from puna.model.init import build_model, materialize
from puna.model.transformer import Transformer
from puna.ranks import rank
from puna.tokenizer.tokenizer import Tokenizer

_SHARD_BYTES = 5_000_000_000
_FLOATS = {"F64", "F32", "F16", "BF16"}
_INDEX = "model.safetensors.index.json"


def save_model(
    folder: Path, model: Transformer, tokenizer: Tokenizer, save_dtype: str, lineage: dict[str, Any],
    stop_ids: Sequence[int] = (),
) -> None:  # fmt: skip
    """Write weights, configs, tokenizer and lineage into an existing (temporary) folder; rank 0 of all ranks writes.

    Args:
        save_dtype: fp32, bf16, fp16 or fp64: what the weights are stored in.
        lineage: what this model was made from: recipe, parents, data fingerprint, metrics.
        stop_ids: beyond the tokenizer's own, what the directory it came from listed.
    """
    dtype = DTYPES[save_dtype]
    tied = model.config.tie_embeddings
    stored = {n: p for n, p in model.named_parameters() if not (tied and n.startswith("lm_head."))}
    tensors = gathered({to_disk_name(name): p for name, p in stored.items()}, dtype)
    if rank():
        return
    _save_tensors(folder, tensors)
    config = to_hf_config(model.config, dtype, tokenizer.bos_id, tokenizer.eos_id)
    write_json(folder / "config.json", config)
    stops = list(dict.fromkeys([*tokenizer.stop_ids, *stop_ids]))
    generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops, "do_sample": True}
    write_json(folder / "generation_config.json", generation)
    tokenizer.save(folder)
    write_json(folder / "puna.json", {**lineage, "tokenizer": tokenizer.fingerprint})


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> Transformer:
    """The model with its weights and activations in `dtype` on `device`.

    Raises:
        CheckpointError: no such model, damaged files, or names and shapes that do not fit (all are listed).
    """
    config = from_hf_config(read_json(folder / "config.json"), folder / "config.json")
    model = build_model(config, dtype)
    materialize(model, device, dtype)
    targets = {n: p for n, p in model.named_parameters() if not (config.tie_embeddings and n.startswith("lm_head."))}
    files = weight_files(folder)
    found = {from_disk_name(n): (n, file) for file in files for n in _tensor_names(file)}
    if config.tie_embeddings:
        found.pop("lm_head.weight", None)  # some writers store the tied head a second time
    problems = name_problems(targets, found)
    handles = {file: safe_open(file, framework="pt") for file in files}
    for name, target in targets.items():
        if name not in found:
            continue
        disk_name, file = found[name]
        stored = handles[file].get_slice(disk_name)
        shape = tuple(stored.get_shape())
        if stored.get_dtype() not in _FLOATS:
            problems.append(f"{name} is stored as {stored.get_dtype()}")
        elif shape != tuple(target.shape):
            problems.append(f"{name} is {shape}, the config says {tuple(target.shape)}")
        elif not problems:
            with torch.no_grad():
                target.copy_(handles[file].get_tensor(disk_name))
    if problems:
        raise CheckpointError("does not fit its config: " + "; ".join(problems), where=folder)
    return model.eval()


def read_stop_ids(folder: Path) -> list[int]:
    """The stop ids of a generation_config.json, if there is one: instruct models list more than EOS."""
    path = folder / "generation_config.json"
    listed = read_json(path).get("eos_token_id") if path.exists() else None
    return listed if isinstance(listed, list) else [] if listed is None else [listed]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model directory; an index may name files inside the directory only."""
    if (folder / _INDEX).exists():
        names = sorted(set(read_json(folder / _INDEX)["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise CheckpointError("names files outside the folder", where=folder / _INDEX)
        return [folder / name for name in names]
    return [folder / "model.safetensors"]


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"no {path.name} here", where=path.parent, cause="not a model directory") from None
    except ValueError as error:
        raise CheckpointError(f"damaged: {error}", where=path) from None


def checkpoints(run: Path) -> list[Path]:
    """A run folder's checkpoints, oldest first."""
    steps = [p for p in (run / "checkpoints").glob("step-*") if p.name[5:].isdigit()]
    return sorted(steps, key=lambda p: int(p.name[5:]))


def _save_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    metadata = {"format": "pt"}
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata)
        return
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata)
    total = sum(t.nbytes for t in tensors.values())
    where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def stored_dtype(file: Path) -> str:
    """The dtype of a safetensors file's first tensor."""
    with safe_open(file, framework="numpy") as handle:
        return handle.get_slice(next(iter(handle.keys()))).get_dtype()


def _tensor_names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as handle:
            return list(handle.keys())
    except FileNotFoundError:
        raise CheckpointError(f"no {file.name} here", where=file.parent, cause="an incomplete copy") from None
    except SafetensorError as error:
        raise CheckpointError(f"damaged: {error}", where=file, cause="an incomplete copy") from None
