"""Meta's layout written: what its reference code, llama.cpp and others read as a download of Meta's."""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from puna.checkpoint.meta.layout import EMBEDDING, HEAD, cut, cut_axis, is_key_or_value, to_meta_name
from puna.checkpoint.meta.model import PARAMS
from puna.checkpoint.meta.params import write_params
from puna.checkpoint.names import DTYPES
from puna.checkpoint.rope_layout import is_rotated, to_neighbours
from puna.checkpoint.stored import Stored, expected_shapes
from puna.checkpoint.torch_file import TorchFile
from puna.device import cast
from puna.errors import UsageError
from puna.files import write_json, write_text
from puna.lineage import write_lineage
from puna.log import log
from puna.model.config import ModelConfig
from puna.tokenizer.formats import sentencepiece_model, tiktoken_ranks
from puna.tokenizer.tokenizer import Tokenizer

TOKENIZER = "tokenizer.model"
_MOST_SHARDS = 100  # their files are numbered 00 to 99


def check_shards(config: ModelConfig, shards: int) -> None:
    """
    Raises:
        UsageError: the model cannot be cut into so many shards, or has something that Meta's format cannot say.
    """
    if not 1 <= shards <= _MOST_SHARDS:
        raise UsageError(f"{shards} shards: their files are numbered 00 to 99", where="--shards")
    if wrong := _not_divided(config, shards):
        whole = [str(n) for n in range(1, _MOST_SHARDS + 1) if not _not_divided(config, n)]
        raise UsageError(
            f"cannot be cut into {shards} shards: {', '.join(wrong)}", where="--shards",
            fix=f"--shards {' or '.join(whole)}",
        )  # fmt: skip
    write_params(config, max(config.n_kv_heads, shards))


def _not_divided(config: ModelConfig, shards: int) -> list[str]:
    """The sizes that so many shards do not divide."""
    sizes = {"n_heads": config.n_heads, "ffn_dim": config.ffn_dim, "vocab_size": config.vocab_size, "dim": config.dim}
    if shards % config.n_kv_heads:  # else neighbours hold the same head
        sizes["n_kv_heads"] = config.n_kv_heads
    return [f"{name} = {size}" for name, size in sizes.items() if size % shards]


def write_meta(
    stored: Stored, folder: Path, shards: int, dtype: str | None, lineage: Mapping[str, Any],
    progress: Callable[[str], None],
) -> None:  # fmt: skip
    """Write params.json, consolidated.0x.pth, checklist.chk and the tokenizer into an existing folder.

    A tensor is read, cut and written to all shards before the next is touched.

    Args:
        dtype: fp32, bf16, fp16 or fp64; None keeps what is stored, or takes bf16 for a quantized model.

    Raises:
        UsageError: see `check_shards`. NumericError: a weight that `dtype` cannot hold.
    """
    config, tokenizer = stored.config, stored.read_tokenizer()
    check_shards(config, shards)
    sentencepiece = sentencepiece_model(tokenizer)
    _write_shards(stored, folder, shards, dtype, by_rows=sentencepiece is None, progress=progress)
    write_json(folder / PARAMS, write_params(config, max(config.n_kv_heads, shards)))
    _write_tokenizer(folder, tokenizer, sentencepiece or tiktoken_ranks(tokenizer))
    _write_checklist(folder)
    if unseen := [id for id in stored.stop_ids if id not in tokenizer.stop_ids]:
        log.warning("stop ids %s: Meta's format has no place for them, others than puna will not stop there", unseen)
    write_lineage(folder, {**lineage, "max_seq_len": config.max_seq_len, "stop_ids": list(stored.stop_ids)})


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, model: bytes | None) -> None:
    tokenizer.save(folder)  # tokenizer.json too: control tokens and the template have no place in a tokenizer.model
    if model is not None:
        (folder / TOKENIZER).write_bytes(model)
    elif (folder / TOKENIZER).exists():
        log.warning("%s is a copy of the source's: whether it gives the ids of tokenizer.json is not known", TOKENIZER)
    else:
        log.warning("no %s: this tokenizer is neither Llama 1/2's kind nor Llama 3's, Meta's code has none", TOKENIZER)


def _write_shards(
    stored: Stored, folder: Path, shards: int, dtype: str | None, by_rows: bool, progress: Callable[[str], None]
) -> None:
    config, repeat = stored.config, max(1, shards // stored.config.n_kv_heads)
    shapes = expected_shapes(config)
    target = DTYPES[dtype] if dtype else torch.bfloat16 if stored.quantized else None
    dtypes = {name: target or stored.weights[name].dtype for name in shapes}
    axes = {name: cut_axis(name) if by_rows or name != EMBEDDING else 1 for name in shapes}
    copies = {name: repeat if is_key_or_value(name) else 1 for name in shapes}
    if config.tie_embeddings and not by_rows:  # the head is cut by rows, so it is not the same bytes
        shapes[HEAD], dtypes[HEAD], axes[HEAD], copies[HEAD] = shapes[EMBEDDING], dtypes[EMBEDDING], 0, 1
    same = {to_meta_name(HEAD): to_meta_name(EMBEDDING)} if config.tie_embeddings and by_rows else {}
    parts = {
        to_meta_name(name): (_part(shape, axes[name], shards // copies[name]), dtypes[name])
        for name, shape in shapes.items()
    }
    with ExitStack() as stack:
        files = [
            stack.enter_context(TorchFile(folder / f"consolidated.{i:02}.pth", parts, same)) for i in range(shards)
        ]
        for name in shapes:
            tensor = stored.weights[EMBEDDING if name == HEAD and config.tie_embeddings else name].read()
            tensor = cast(tensor, dtypes[name], name)
            if is_rotated(name):
                tensor = to_neighbours(tensor, config.head_dim)
            for shard, file in enumerate(files):
                file.write(to_meta_name(name), cut(tensor, axes[name], shards, shard, copies[name]))
            if name in stored.weights:
                progress(name)


def _part(shape: tuple[int, ...], axis: int | None, parts: int) -> tuple[int, ...]:
    return tuple(size // parts if i == axis else size for i, size in enumerate(shape))


def _write_checklist(folder: Path) -> None:
    """checklist.chk: what `md5sum -c` checks."""
    lines = []
    for file in sorted([*folder.glob("consolidated.*.pth"), *folder.glob(TOKENIZER), folder / PARAMS]):
        with file.open("rb") as content:
            lines.append(f"{hashlib.file_digest(content, 'md5').hexdigest()}  {file.name}\n")
    write_text(folder / "checklist.chk", "".join(lines))
