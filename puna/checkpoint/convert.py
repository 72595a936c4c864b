"""From any format to any other: a reader, a writer, and what can be wrong found before the first byte."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import get_args

import torch

from puna.checkpoint.gguf.blocks import LAYOUTS
from puna.checkpoint.gguf.model import gguf_name
from puna.checkpoint.gguf.types import file_type, storage
from puna.checkpoint.gguf.write import write_gguf
from puna.checkpoint.llama2c import group, write_beside, write_llama2c
from puna.checkpoint.meta.write import check_shards, write_meta
from puna.checkpoint.model_directory import check_folder_name
from puna.checkpoint.names import DTYPES
from puna.checkpoint.registry import open_model
from puna.checkpoint.stored import Format, Stored, Weight, expected_shapes, rows_missing
from puna.checkpoint.stored_directory import write_model_directory
from puna.config import nearest
from puna.errors import CheckpointError, UsageError
from puna.files import as_path, atomic_file, atomic_folder, require_space
from puna.lineage import lineage
from puna.log import Progress, clock, log

_OPTIONS = {"hf": {"dtype"}, "meta": {"dtype", "shards"}, "gguf": {"kind"}, "llama2.c": {"kind"}}
_LLAMA2C = {"v0": 4.0, "v1": 4.0, "v2": 1.0}  # bytes of a weight; v2 has a scale for each group besides


def convert(
    source: str | Path, target: str | Path, to: str | None = None, *, dtype: str | None = None,
    kind: str | None = None, shards: int | None = None,
) -> Path:  # fmt: skip
    """Write the model `source`, of any format, as `target`: whole, or not at all. Returns `target`.

    Args:
        to: hf, meta, gguf or llama2.c; by default what `target` is called: *.gguf, *.bin, or hf, a folder.
        dtype: fp32, bf16, fp16 or fp64, of hf and meta; default: as stored, or bf16 for a quantized model.
        kind: of gguf: F32, F16, BF16, Q8_0, Q4_0 or Q4_K_M, default F16; of llama2.c: v0, v1 or v2, default v0, the
            one that run.c reads.
        shards: how many files Meta's layout has; default: 1.

    Raises:
        UsageError: `target` exists or has a name of another format, or something is asked for that `to` does not have.
        CheckpointError: no model, a damaged one, or an adapter, which is to be merged first.
        ResourceError: the disk has no room for it.
    """
    if not str(target).strip():
        raise UsageError("no name to write to", where="DST", fix="a folder, or a file called *.gguf or *.bin")
    target = as_path(target)
    format = _format(to, target)
    _check_options(format, {"dtype": dtype, "kind": kind, "shards": shards})
    if target.exists():
        raise UsageError("exists already", where=target, fix="another name, or remove that one first")
    stored = open_model(source)
    stored.check()
    if format != "llama2.c":  # which holds weights alone
        stored = _with_tokenizer(stored)
    kind = _kind(format, kind)
    if stored.quantized:
        log.info("weights: %s, dequantized to be written anew", stored.storage)
    if format == "meta":
        check_shards(stored.config, shards or 1)
    require_space(_existing(target), _size(stored, format, dtype, kind))
    made_from = lineage("convert", [stored.path], source=stored.format, target=format)
    atomic, started = atomic_folder if format in ("hf", "meta") else atomic_file, time.monotonic()
    with atomic(target) as place, _telling(stored) as progress:
        if format == "hf":
            write_model_directory(stored, place, dtype, made_from, progress)
        elif format == "meta":
            write_meta(stored, place, shards or 1, dtype, made_from, progress)
        elif format == "gguf":
            write_gguf(stored, place, kind, made_from, progress)
        else:
            write_llama2c(stored, place, int(kind[1:]), progress)
            write_beside(stored, target, made_from)
    log.info("wrote %s in %s: %s", target, clock(time.monotonic() - started), _change(stored, open_model(target)))
    return target


def _change(source: Stored, target: Stored) -> str:
    """`Q8_0 x 15, F32 x 5, 145.0 MB, from BF16; 15 tensors rounded`, by what can be read back."""
    size = sum(file.stat().st_size for file in target.files) / 1e6
    both = source.weights.keys() & target.weights.keys()
    narrower = sum(_narrower(target.weights[name], source.weights[name]) for name in both)
    rounded = f"; {narrower} tensors rounded" if narrower else ""
    return f"{target.storage}, {size:,.1f} MB, from {source.storage}{rounded}"


def _narrower(target: Weight, source: Weight) -> bool:
    """Whether `target`'s type does not hold all that `source`'s does."""
    return target.quantized or torch.promote_types(target.dtype, source.dtype) != target.dtype


def _format(to: str | None, target: Path) -> Format:
    named: dict[str, Format] = {".gguf": "gguf", ".bin": "llama2.c"}
    meant = named.get(target.suffix)  # files are told apart by their names
    if to is None and meant:
        return meant
    known = get_args(Format)
    to = to or "hf"
    if to not in known:
        raise UsageError(f"no format `{to}`{nearest(to, list(known))}", where="--to", fix=", ".join(known))
    if meant is None and to in ("hf", "meta"):
        check_folder_name(target)
    if (meant and meant != to) or (to == "llama2.c" and meant is None):
        fix = f"--to {meant}, or another name" if meant else f"{target.name}.bin"
        raise UsageError(f"{target.name} is no name for {to}: it could not be opened again", where=target, fix=fix)
    return next(name for name in known if name == to)


def _check_options(format: Format, given: dict[str, str | int | None]) -> None:
    for name, value in given.items():
        if value is not None and name not in _OPTIONS[format]:
            theirs = " and ".join(f"--{option}" for option in sorted(_OPTIONS[format]))
            others = " and ".join(other for other, options in _OPTIONS.items() if name in options)
            fix = f"without it: {format} has {theirs}; --{name} is of {others}"
            raise UsageError(f"--{name} means nothing for {format}", where=f"--{name} {value}", fix=fix)
    if (dtype := given["dtype"]) is not None and dtype not in DTYPES:
        raise UsageError(f"`{dtype}` is not a dtype", where="--dtype", fix=", ".join(DTYPES))


def _kind(format: Format, kind: str | None) -> str:
    if format == "gguf":
        return file_type(kind or "F16")
    if format == "llama2.c" and kind is not None and kind not in _LLAMA2C:
        raise UsageError(f"`{kind}` is no version of llama2.c", where="--kind", fix=", ".join(_LLAMA2C))
    return kind or "v0"


def _with_tokenizer(stored: Stored) -> Stored:
    """The model with its tokenizer read, once, and seen to fit."""
    tokenizer = stored.read_tokenizer()
    if wrong := rows_missing(tokenizer, stored.config):
        raise CheckpointError(
            wrong[0], where=stored.path, cause="tokens were added and the embedding was not resized",
            fix="the tokenizer it was trained with, or transformers' resize_token_embeddings",
        )  # fmt: skip
    return replace(stored, read_tokenizer=lambda: tokenizer)


def _size(stored: Stored, format: Format, dtype: str | None, kind: str) -> int:
    """Bytes of the weights as they will be written."""
    total = 0.0
    for name, shape in expected_shapes(stored.config).items():
        if format == "gguf":
            layout = LAYOUTS[storage(gguf_name(name), shape, kind, stored.config)]
            total += prod(shape) / layout.weights * layout.size
        elif format == "llama2.c":
            total += prod(shape) * (_LLAMA2C[kind] + (4 / group(stored.config) if kind == "v2" else 0))
        else:
            width = DTYPES[dtype].itemsize if dtype else 2 if stored.quantized else stored.weights[name].dtype.itemsize
            total += prod(shape) * width
    return int(total)


def _existing(target: Path) -> Path:
    """The nearest folder above `target` that is there."""
    return next(folder for folder in target.absolute().parents if folder.is_dir())


@contextmanager
def _telling(stored: Stored) -> Iterator[Callable[[str], None]]:
    """Something to call with the name of each tensor that is done."""
    total = len(expected_shapes(stored.config))
    with Progress("converting", total) as bar:
        yield lambda name: bar.update(min(bar.done + 1, total), name)
