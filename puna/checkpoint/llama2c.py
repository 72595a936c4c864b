"""llama2.c's `.bin` files: a header of seven ints, then the weights by kind, every layer's one after the other.

Version 0 has no magic, a negative vocabulary for a head of its own, and RoPE tables that nothing reads. Version 1 has a
header of 256 bytes; version 2 holds matrices as int8 with an fp32 scale for each group. The programs that run these
files know one theta (10000) and one epsilon (1e-5), and so do the files. Rows of q and k are in Meta's order.
"""

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from mmap import mmap
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from puna.checkpoint.mapped import mapped
from puna.checkpoint.rope_layout import is_rotated, to_halves, to_neighbours
from puna.checkpoint.stored import Stored, Weight
from puna.errors import CheckpointError, DataError, UsageError
from puna.files import atomic_file, write_json
from puna.lineage import read_lineage_file
from puna.log import log
from puna.model.config import ModelConfig
from puna.tokenizer.formats import llama2c_vocab, tokenizer_from
from puna.tokenizer.tokenizer import Tokenizer

VERSIONS = (0, 1, 2)
_MAGIC = 0x616B3432  # "ak42"
_HEADER = {0: 28, 1: 256, 2: 256}
_THETA, _EPS = 10000.0, 1e-5
_MAX_LAYERS = 1 << 11
_FP32 = 0
_TOKENIZER, _LINEAGE = ".tokenizer.bin", ".puna.json"
_CHUNK = 1 << 20  # weights rounded at once: 4 MB beside a tensor


class _Head(NamedTuple):
    """What a header says."""

    version: int
    config: ModelConfig
    group: int
    """Weights that share a scale; 0: fp32."""


class _Place(NamedTuple):
    """Where a tensor lies, by our name."""

    name: str
    shape: tuple[int, ...]
    offset: int
    group: int

    @property
    def size(self) -> int:
        """Bytes: 4 a weight, or 1 and a scale of 4 for each group."""
        count = math.prod(self.shape)
        return count + count // self.group * 4 if self.group else 4 * count


def open_llama2c(path: Path) -> Stored:
    """A .bin of version 0, 1 or 2; int8 matrices are dequantized to fp32 when they are read.

    The tokenizer is a file beside it: NAME.tokenizer.bin, tok<vocabulary>.bin, tokenizer.bin, or the only tok*.bin.

    Raises:
        CheckpointError: a header that does not describe the file.
    """
    data = mapped(path)
    head = _read_head(data, path)
    places = _places(head)
    end = places[-1].offset + places[-1].size
    if end != len(data):
        raise _wrong(f"its header tells of {end:,} bytes, it has {len(data):,}", path)
    weights = {p.name: _weight(data, p, head.config.head_dim, path) for p in places if p.name}
    storage = {0: "F32 (llama2.c v0)", 1: "F32 (llama2.c v1)", 2: f"int8 by {head.group} (llama2.c v2)"}[head.version]
    read_tokenizer = partial(_tokenizer_beside, path, head.config.vocab_size)
    made_from = read_lineage_file(path.with_suffix(_LINEAGE))
    return Stored(path, "llama2.c", head.config, weights, storage, [path], read_tokenizer, lineage=made_from)


def write_llama2c(stored: Stored, file: Path, version: int, progress: Callable[[str], None]) -> None:
    """Write `stored` as a .bin, which has no place for what `write_beside` writes.

    Raises:
        UsageError: no such version, or a model that llama2.c does not compute.
        CheckpointError: tensors that do not fit the config.
    """
    stored.check()
    _refuse_what_llama2c_does_not_compute(stored, version)
    head = _Head(version, stored.config, group(stored.config) if version == 2 else _FP32)
    with file.open("wb") as out:
        out.write(_header(head))
        for place in _places(head):
            if not place.name:
                out.write(_rope_tables(head.config).tobytes())
                continue
            _write_weight(out, stored.weights[place.name].read(), place, head.config.head_dim)
            progress(place.name)


def write_beside(stored: Stored, file: Path, lineage: Mapping[str, Any]) -> None:
    """The tokenizer (llama2.c's own format) and the lineage of `file`, as files that have its name.

    Raises:
        UsageError: another model's tokenizer has that name already.
    """
    try:
        vocabulary, target = llama2c_vocab(stored.read_tokenizer()), file.with_suffix(_TOKENIZER)
    except DataError as error:
        log.warning("no tokenizer beside %s: %s", file.name, error.what)
    else:
        if not target.exists() or target.read_bytes() != vocabulary:
            with atomic_file(target) as place:
                place.write_bytes(vocabulary)
    write_json(file.with_suffix(_LINEAGE), dict(lineage))


def _read_head(data: mmap, path: Path) -> _Head:
    if len(data) < _HEADER[0]:
        raise _wrong("too short for a header", path)
    if struct.unpack_from("<I", data)[0] != _MAGIC:
        dim, ffn, layers, heads, kv, vocab, length = struct.unpack_from("<7i", data)
        return _Head(0, _config([dim, ffn, layers, heads, kv, abs(vocab), length], vocab > 0, path), _FP32)
    version = struct.unpack_from("<i", data, 4)[0]
    if version not in (1, 2) or len(data) < _HEADER[1]:
        raise _wrong(f"llama2.c version {version}; 0, 1 and 2 are read", path)
    *sizes, tied, group = struct.unpack_from("<7iBi", data, 8)
    config = _config(sizes, tied == 1, path)
    head = _Head(version, config, group if version == 2 else _FP32)
    # Groups may run over the ends of rows: llama2.c's exporter looks only at dim.
    if version == 2 and (group < 1 or any(math.prod(s) % group for _, s in _order(head) if len(s) == 2)):
        raise _wrong(f"groups of {group} in matrices of {config.dim} and {config.ffn_dim}", path)
    return head


def _config(sizes: list[int], tied: bool, path: Path) -> ModelConfig:
    dim, ffn, layers, heads, kv_heads, vocab, length = sizes
    if min(sizes) < 1 or dim % heads or heads % kv_heads or dim // heads % 2 or layers > _MAX_LAYERS:
        raise _wrong(f"sizes {sizes} make no Llama", path)
    return ModelConfig(
        dim=dim, n_layers=layers, n_heads=heads, n_kv_heads=kv_heads, head_dim=dim // heads, ffn_dim=ffn,
        vocab_size=vocab, max_seq_len=length, rope_theta=_THETA, rope_scaling=None, norm_eps=_EPS, tie_embeddings=tied,
    )  # fmt: skip


def _places(head: _Head) -> list[_Place]:
    """Where each tensor lies; version 0's RoPE tables have no name."""
    places, at = [], _HEADER[head.version]
    for name, shape in _order(head):
        group = head.group if len(shape) == 2 else _FP32
        places.append(_Place(name, shape, at, group))
        at += places[-1].size
    return places


def _order(head: _Head) -> Iterator[tuple[str, tuple[int, ...]]]:
    c = head.config
    rows, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    matrices = {
        "self_attn.q_proj": (rows, c.dim), "self_attn.k_proj": (kv, c.dim), "self_attn.v_proj": (kv, c.dim),
        "self_attn.o_proj": (c.dim, rows), "mlp.gate_proj": (c.ffn_dim, c.dim), "mlp.down_proj": (c.dim, c.ffn_dim),
        "mlp.up_proj": (c.ffn_dim, c.dim),
    }  # fmt: skip
    attention, ffn = list(matrices)[:4], list(matrices)[4:]
    embedding, final = ("embed_tokens.weight", (c.vocab_size, c.dim)), ("norm.weight", (c.dim,))

    def every_layer(part: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        shape = matrices.get(part, (c.dim,))
        return ((f"layers.{i}.{part}.weight", shape) for i in range(c.n_layers))

    if head.version == 0:
        yield embedding
        for part in ("input_layernorm", *attention, "post_attention_layernorm", *ffn):
            yield from every_layer(part)
        yield from (final, ("", (c.max_seq_len * c.head_dim,)))
    else:
        yield from every_layer("input_layernorm")
        yield from every_layer("post_attention_layernorm")
        yield from (final, embedding)
        for part in matrices:
            yield from every_layer(part)
    if not c.tie_embeddings:
        yield "lm_head.weight", (c.vocab_size, c.dim)


def _weight(data: mmap, place: _Place, head_dim: int, path: Path) -> Weight:
    def read() -> Tensor:
        raw = np.frombuffer(data, np.uint8, place.size, place.offset)
        weight = torch.from_numpy(_dequantized(raw, place, path)).view(place.shape)
        return to_halves(weight, head_dim) if is_rotated(place.name) else weight

    return Weight(place.shape, torch.float32, read, owned=True, quantized=bool(place.group))


def _dequantized(raw: np.ndarray, place: _Place, path: Path) -> np.ndarray:
    if not place.group:
        return raw.view("<f4").copy()
    count = math.prod(place.shape)
    scales = raw[count:].view("<f4")
    if not np.isfinite(scales).all():
        raise _wrong(f"{place.name}: a scale is not finite", path)
    return (raw[:count].view(np.int8).reshape(-1, place.group) * scales[:, None]).reshape(-1)


def _write_weight(out: BinaryIO, weight: Tensor, place: _Place, head_dim: int) -> None:
    weight = to_neighbours(weight, head_dim) if is_rotated(place.name) else weight
    values = weight.float().contiguous().numpy()
    if not place.group:
        out.write(values.astype("<f4", copy=False).data)
        return
    groups = values.reshape(-1, place.group)
    scales = np.empty((len(groups), 1), "<f4")
    for at in range(0, len(groups), step := max(_CHUNK // place.group, 1)):
        part = groups[at : at + step]
        scale = scales[at : at + step] = np.abs(part).max(axis=1, keepdims=True) / np.float32(127)
        out.write(np.rint(part / np.where(scale == 0, np.float32(1), scale)).astype(np.int8).data)
    out.write(scales.data)


def _header(head: _Head) -> bytes:
    c = head.config
    sizes = [c.dim, c.ffn_dim, c.n_layers, c.n_heads, c.n_kv_heads, c.vocab_size, c.max_seq_len]
    if head.version == 0:
        sizes[5] = c.vocab_size if c.tie_embeddings else -c.vocab_size
        return struct.pack("<7i", *sizes)
    more = struct.pack("<i", head.group) if head.version == 2 else b""
    told = struct.pack("<Ii7iB", _MAGIC, head.version, *sizes, c.tie_embeddings) + more
    return told.ljust(_HEADER[head.version], b"\0")


def _rope_tables(config: ModelConfig) -> np.ndarray:
    """cos, then sin, of every position: no reader uses them, every reader skips them."""
    frequencies = _THETA ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    angles = np.outer(np.arange(config.max_seq_len), frequencies)
    return np.stack((np.cos(angles), np.sin(angles))).astype("<f4")


def group(config: ModelConfig) -> int:
    """The largest of 64, 32, ... that divides all rows: a product over a row works group by group."""
    return math.gcd(config.dim, config.ffn_dim, 64)


def _refuse_what_llama2c_does_not_compute(stored: Stored, version: int) -> None:
    c = stored.config
    if version not in VERSIONS:
        raise UsageError(f"llama2.c has versions 0, 1 and 2, not {version}")
    fixed = {
        "rope_theta": (c.rope_theta, _THETA), "norm_eps": (c.norm_eps, _EPS), "rope_scaling": (c.rope_scaling, None),
        "head_dim": (c.head_dim, c.dim // c.n_heads),
    }  # fmt: skip
    odd = [f"{key} {value} (it computes {known})" for key, (value, known) in fixed.items() if value != known]
    if odd:
        raise UsageError(f"llama2.c cannot run this model: {'; '.join(odd)}", where=stored.path, fix="another format")


def _tokenizer_beside(path: Path, vocab_size: int) -> Tokenizer:
    names = (path.with_suffix(_TOKENIZER).name, f"tok{vocab_size}.bin", "tokenizer.bin")
    exact = [path.with_name(name) for name in names]
    found = [p for p in exact if p.is_file()] or [p for p in path.parent.glob("tok*.bin") if p != path]
    if len(found) == 1 or (found and found[0] in exact):
        return tokenizer_from(found[0])
    raise DataError(
        "a llama2.c model has its tokenizer in a file beside it, and there is none" if not found else
        f"several files could be its tokenizer: {', '.join(sorted(p.name for p in found))}",
        where=path, fix=f"put tok{vocab_size}.bin or tokenizer.bin into {path.parent}",
    )  # fmt: skip


def _wrong(what: str, path: Path) -> CheckpointError:
    return CheckpointError(what, where=path, cause="a damaged or hostile file, or not a llama2.c model")
