"""The model directory: Hugging Face's layout plus lineage, opened by transformers, vLLM and llama.cpp as it is."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from puna.checkpoint.names import DTYPES, from_disk_name, from_hf_config, to_disk_name, to_hf_config
from puna.checkpoint.stored import Stored, Weight
from puna.dist.fsdp import gathered
from puna.errors import CheckpointError
from puna.files import write_json
from puna.lineage import read_lineage, write_lineage
from puna.model.transformer import Transformer
from puna.ranks import rank
from puna.tokenizer.tokenizer import Tokenizer

_SHARD_BYTES = 5_000_000_000
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
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
    write_lineage(folder, lineage)


def open_model_directory(folder: Path) -> Stored:
    """A model directory as puna, transformers and others write it.

    Raises:
        CheckpointError: no such model, damaged files, or an architecture that puna does not compute.
    """
    config = from_hf_config(read_json(folder / "config.json"), folder / "config.json")
    files = weight_files(folder)
    weights = {from_disk_name(name): weight for file in files for name, weight in _weights(file).items()}
    if config.tie_embeddings:
        weights.pop("lm_head.weight", None)  # some writers store the tied head a second time
    return Stored(
        folder, "hf", config, weights, stored_dtype(files[0]), files, lambda: Tokenizer(folder),
        read_stop_ids(folder), read_lineage(folder),
    )  # fmt: skip


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


def _weights(file: Path) -> dict[str, Weight]:
    """The tensors of a safetensors file by their disk names."""
    try:
        handle = safe_open(file, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"no {file.name} here", where=file.parent, cause="an incomplete copy") from None
    except SafetensorError as error:
        raise CheckpointError(f"damaged: {error}", where=file, cause="an incomplete copy") from None
    weights = {}
    for name in handle.keys():  # noqa: SIM118
        part = handle.get_slice(name)
        if part.get_dtype() not in _FLOATS:
            raise CheckpointError(f"{name} is stored as {part.get_dtype()}", where=file, cause="a quantized model")
        weights[name] = Weight(tuple(part.get_shape()), _FLOATS[part.get_dtype()], partial(handle.get_tensor, name))
    return weights
