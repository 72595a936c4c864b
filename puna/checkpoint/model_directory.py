"""The model directory: Hugging Face's layout plus lineage, opened by transformers, vLLM and llama.cpp as it is."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.checkpoint.names import DTYPES, to_disk_name, to_hf_config
from puna.checkpoint.safetensors_file import Weight
from puna.checkpoint.weight_files import write_weights
from puna.dist.fsdp import gathered
from puna.errors import UsageError
from puna.files import write_json
from puna.lineage import write_lineage
from puna.model.config import ModelConfig
from puna.model.transformer import Transformer
from puna.ranks import rank
from puna.tokenizer.tokenizer import Tokenizer


def save_model(
    folder: Path, model: Transformer, tokenizer: Tokenizer, save_dtype: str, lineage: dict[str, Any],
    stop_ids: Sequence[int] = (), packed: tuple[Mapping[str, Tensor], Mapping[str, Any]] = ({}, {}),
) -> None:  # fmt: skip
    """Write weights, configs, tokenizer and lineage into an existing (temporary) folder; rank 0 of all ranks writes.

    Args:
        save_dtype: fp32, bf16, fp16 or fp64: what the weights are stored in.
        lineage: what this model was made from: recipe, parents, data fingerprint, metrics.
        stop_ids: beyond the tokenizer's own, what the directory it came from listed.
        packed: the tensors of its packed layers by their disk names, and config.json's section about them (see
            `quantized.packed_tensors`).

    Raises:
        NumericError: a weight that `save_dtype` cannot hold. UsageError: packed layers, of which no tensors are given.
    """
    if not packed[0] and any(name.endswith(".codes") for name, _ in model.named_buffers()):
        raise UsageError("quantized weights are saved by Llama.save", fix="puna.load(...).save(FOLDER)")
    dtype = DTYPES[save_dtype]
    tied = model.config.tie_embeddings
    stored = {n: p for n, p in model.named_parameters() if not (tied and n.startswith("lm_head."))}
    tensors = gathered({to_disk_name(name): p for name, p in stored.items()}, dtype)
    if rank():
        return
    tensors |= packed[0]
    weights = {n: Weight(tuple(t.shape), t.dtype, partial(tensors.pop, n)) for n, t in tensors.items()}
    write_beside(folder, model.config, dtype, tokenizer, stop_ids, lineage, packed[1])
    write_weights(folder, weights, lambda name: None)


def check_folder_name(folder: Path) -> None:
    """
    Raises:
        UsageError: a name that says it is a file: nothing would look for a model inside.
    """
    if folder.suffix in (".gguf", ".bin", ".safetensors", ".pth", ".pt"):
        raise UsageError(
            f"a model directory is a folder, and {folder.name} the name of a file", where=folder,
            fix=f"{folder.stem}, and for a .gguf then: puna convert {folder.with_suffix('')} {folder.stem}.gguf",
        )  # fmt: skip


def checkpoints(run: Path) -> list[Path]:
    """A run folder's checkpoints, oldest first."""
    steps = [p for p in (run / "checkpoints").glob("step-*") if p.name[5:].isdigit()]
    return sorted(steps, key=lambda p: int(p.name[5:]))


def write_beside(
    folder: Path, config: ModelConfig, dtype: torch.dtype, tokenizer: Tokenizer, stop_ids: Sequence[int],
    lineage: Mapping[str, Any], quantization: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """What a model directory holds beside its weights; written before them, for it may be refused."""
    bos = tokenizer.named_id("bos_token")
    told = to_hf_config(config, dtype, bos, tokenizer.eos_id)
    write_json(folder / "config.json", {**told, "quantization_config": quantization} if quantization else told)
    stops = list(dict.fromkeys([*tokenizer.stop_ids, *stop_ids]))
    generation = {"bos_token_id": bos, "eos_token_id": stops, "do_sample": True}
    write_json(folder / "generation_config.json", generation)
    tokenizer.save(folder)
    write_lineage(folder, lineage)
