"""A model directory opened as a `Stored`, and a `Stored` of any format written as one, a tensor at a time."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.checkpoint.model_directory import write_beside
from puna.checkpoint.names import DTYPES, from_disk_name, from_hf_config, quantization_of, to_disk_name
from puna.checkpoint.stored import Stored, Weight, expected_shapes
from puna.checkpoint.weight_files import OpenFile, inside, open_weights, read_json, storage, weight_files, write_weights
from puna.device import cast
from puna.errors import CheckpointError
from puna.lineage import read_lineage
from puna.model.config import ModelConfig
from puna.tokenizer.tokenizer import Tokenizer

OpenQuantized = Callable[[Mapping[str, Weight], Mapping[str, Any], ModelConfig, object], dict[str, Weight]]


def write_model_directory(
    stored: Stored, folder: Path, dtype: str | None, lineage: Mapping[str, Any], progress: Callable[[str], None]
) -> None:
    """Write an open model of any format into an existing (temporary) folder, a tensor at a time.

    Args:
        dtype: fp32, bf16, fp16 or fp64; None keeps what is stored, or takes bf16 for a quantized model.
        progress: is told the disk name of each tensor that was written.

    Raises:
        CheckpointError: tensors that do not fit the config, or cannot be read.
        NumericError: a weight that `dtype` cannot hold.
    """
    stored.check()
    tokenizer = stored.read_tokenizer()
    target = DTYPES[dtype] if dtype else torch.bfloat16 if stored.quantized else None
    weights = {to_disk_name(n): _cast(stored.weights[n], target, n) for n in expected_shapes(stored.config)}
    main = max(weights.values(), key=lambda weight: weight.nbytes).dtype
    write_beside(folder, stored.config, main, tokenizer, stored.stop_ids, lineage)
    write_weights(folder, weights, progress)


def open_model_directory(
    folder: Path, open_bin: OpenFile | None = None, read_tokenizer: Callable[[Path], Tokenizer] = Tokenizer,
    open_quantized: OpenQuantized | None = None,
) -> Stored:  # fmt: skip
    """A model directory as puna, transformers and others write it.

    Args:
        open_bin: reads pytorch_model.bin, where there is no safetensors file.
        read_tokenizer: reads what older models have instead of a tokenizer.json, too.
        open_quantized: puts the parts of quantized weights together.

    Raises:
        CheckpointError: no such model, damaged files, or an architecture that puna does not compute.
    """
    file = inside(folder, "config.json")
    values = read_json(file)
    config, section = from_hf_config(values, file), quantization_of(values, file)
    files = weight_files(folder)
    found = open_weights(files, open_bin, integers=bool(section and open_quantized))
    if not found:
        raise CheckpointError("holds no tensors", where=files[0], cause="an incomplete copy")
    if section and open_quantized:
        found = open_quantized(found, section, config, file)
    weights = _by_our_names(found, files[0])
    head = weights.pop("lm_head.weight", None) if config.tie_embeddings else None
    if head is not None and "embed_tokens.weight" in weights:
        weights["embed_tokens.weight"] = _tied(weights["embed_tokens.weight"], head, folder)
    return Stored(
        folder, "hf", config, weights, storage(found), files, partial(read_tokenizer, folder),
        read_stop_ids(folder, config.vocab_size), read_lineage(folder),
    )  # fmt: skip


def read_stop_ids(folder: Path, vocab_size: int) -> list[int]:
    """The stop ids of generation_config.json, or else config.json: instruct models list more than EOS.

    Raises:
        CheckpointError: what is no id of this vocabulary.
    """
    both = [folder / "generation_config.json", folder / "config.json"]
    said = (read_json(path).get("eos_token_id") for path in both if path.exists())
    listed = next((ids for ids in said if ids is not None), [])
    listed = listed if isinstance(listed, list) else [listed]
    if not all(type(i) is int and 0 <= i < vocab_size for i in listed):
        raise CheckpointError(
            f"eos_token_id is {str(listed)[:100]}", where=folder, cause=f"ids are whole numbers below {vocab_size:,}"
        )
    return listed


def _by_our_names(weights: Mapping[str, Weight], where: Path) -> dict[str, Weight]:
    ours = {from_disk_name(name): weight for name, weight in weights.items()}
    if len(ours) < len(weights):
        raise CheckpointError("the same tensors with and without `model.` in their names", where=where)
    return ours


def _tied(embedding: Weight, head: Weight, folder: Path) -> Weight:
    """The embedding of a directory that stores its head a second time, once both are seen to be equal."""

    def read() -> Tensor:
        matrix = embedding.read()
        if not torch.equal(matrix, head.read()):
            raise CheckpointError(
                "tie_word_embeddings is true, but lm_head.weight is another matrix than the embedding", where=folder,
                cause="a tied model that was trained or merged untied", fix='config.json: "tie_word_embeddings": false',
            )  # fmt: skip
        return matrix

    return embedding._replace(read=read, read_parts=None)


def _cast(weight: Weight, dtype: torch.dtype | None, name: str) -> Weight:
    if dtype in (None, weight.dtype):
        return weight

    def parts() -> Iterator[Tensor]:
        return (cast(part, dtype, name) for part in weight.parts())

    return Weight(weight.shape, dtype, lambda: torch.cat(list(parts())), read_parts=parts)
