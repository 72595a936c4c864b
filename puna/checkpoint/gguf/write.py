"""A model as a GGUF file that llama.cpp runs: header first, then one tensor after the other."""

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from puna.checkpoint.gguf.blocks import LAYOUTS, Ggml
from puna.checkpoint.gguf.model import ENDS, LINEAGE, STOP_IDS, gguf_name
from puna.checkpoint.gguf.quantize import quantize
from puna.checkpoint.gguf.rope import TENSOR as ROPE
from puna.checkpoint.gguf.rope import rope_divisors, scaling_metadata
from puna.checkpoint.gguf.types import FILE_TYPES, file_type, storage
from puna.checkpoint.rope_layout import is_rotated, to_neighbours
from puna.checkpoint.stored import Stored, expected_shapes
from puna.errors import CheckpointError, NumericError
from puna.log import log
from puna.model.config import ModelConfig
from puna.tokenizer.gguf_vocab import gguf_fields

_ALIGNMENT = 32
_CHUNK = 1 << 20  # weights turned into fp32 at once: 4 MB beside a tensor


class _Entry(NamedTuple):
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    kind: Ggml
    write: Callable[[BinaryIO], None]

    @property
    def size(self) -> int:
        layout = LAYOUTS[self.kind]
        return int(np.prod(self.shape)) // layout.weights * layout.size


def write_gguf(
    stored: Stored, file: Path, kind: str, lineage: Mapping[str, Any], progress: Callable[[str], None]
) -> None:
    """Write `stored` with its tokenizer, chat template and lineage inside.

    Args:
        kind: F32, F16, BF16, Q8_0, Q4_0 or Q4_K_M: what the matrices are stored in (see `gguf_types`).
        lineage: what puna.json holds elsewhere, as the metadata key puna.lineage.
        progress: called with our name of every tensor that is written.

    Raises:
        UsageError: another kind. CheckpointError: tensors that do not fit the config, or a tokenizer with more ids
        than the model has. NumericError: a weight that is not finite or does not fit the type.
    """
    kind = file_type(kind)
    stored.check()
    entries = _entries(stored, kind, progress)
    metadata = {**_metadata(stored, kind), LINEAGE: json.dumps(dict(lineage))}
    with file.open("wb") as out:
        out.write(_header(metadata, entries))
        for entry in entries:
            _pad(out)
            entry.write(out)
        _pad(out)


def _entries(stored: Stored, kind: str, progress: Callable[[str], None]) -> list[_Entry]:
    config = stored.config
    entries = []
    if config.rope_scaling is not None:
        divisors = rope_divisors(config.rope_scaling, config.head_dim, config.rope_theta)
        entries.append(_Entry(ROPE, divisors.shape, Ggml.F32, lambda out: _write(out, divisors, Ggml.F32)))
    for name, shape in expected_shapes(config).items():
        inside = gguf_name(name)
        stored_as = storage(inside, shape, kind, config)

        def write(out: BinaryIO, name: str = name, kind: Ggml = stored_as) -> None:
            try:
                _write_weight(out, stored.weights[name].read(), kind, config.head_dim if is_rotated(name) else 1)
            except NumericError as error:
                raise NumericError(
                    f"{name}: {error.what}", where=stored.path, cause=error.cause, fix=error.fix
                ) from None
            progress(name)

        entries.append(_Entry(inside, shape, stored_as, write))
    return entries


def _write_weight(out: BinaryIO, weight: torch.Tensor, kind: Ggml, head_dim: int) -> None:
    """Some rows at a time; whole heads where RoPE turns them, for their rows are put in Meta's order."""
    matrix = weight if weight.dim() == 2 else weight[None]
    rows = max(_CHUNK // matrix.shape[1] // head_dim, 1) * head_dim
    for part in matrix.split(rows):
        ordered = to_neighbours(part, head_dim) if head_dim > 1 else part
        _write(out, ordered.float().numpy(), kind)


def _write(out: BinaryIO, weights: np.ndarray, kind: Ggml) -> None:
    out.write(quantize(weights, kind).data)


def _metadata(stored: Stored, kind: str) -> dict[str, Any]:
    config = stored.config
    return {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": stored.path.stem,
        "general.quantization_version": 2,
        "general.file_type": FILE_TYPES[kind].number,
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_seq_len,
        "llama.embedding_length": config.dim,
        "llama.block_count": config.n_layers,
        "llama.feed_forward_length": config.ffn_dim,
        "llama.attention.head_count": config.n_heads,
        "llama.attention.head_count_kv": config.n_kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": config.rope_theta,
        **(scaling_metadata(config.rope_scaling) if config.rope_scaling else {}),
        **_vocabulary(stored, config),
    }


def _vocabulary(stored: Stored, config: ModelConfig) -> dict[str, Any]:
    """The tokenizer's fields with a token for every row of the embedding (llama.cpp counts rows by tokens), and the
    stop ids that only generation_config.json has."""
    fields = gguf_fields(stored.read_tokenizer(), config.vocab_size)
    if (tokens := len(fields["tokenizer.ggml.tokens"])) != config.vocab_size:
        raise CheckpointError(f"{tokens} tokens and {config.vocab_size} rows of embedding", where=stored.path)
    for key in ENDS:
        if left := _untold(stored, fields):
            fields.setdefault(key, left[0])
    if left := _untold(stored, fields):
        log.warning("stop ids %s: GGUF has names for three, others than puna will not stop at these", left)
        fields[STOP_IDS] = list(stored.stop_ids)
    return fields


def _untold(stored: Stored, fields: Mapping[str, Any]) -> list[int]:
    """The stop ids that have no name of GGUF's yet."""
    told = {fields.get(key) for key in ENDS}
    return [id for id in stored.stop_ids if id not in told]


def _header(metadata: Mapping[str, Any], entries: Sequence[_Entry]) -> bytes:
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(entries), len(metadata))]
    parts += [_string(key) + _value(value) for key, value in metadata.items()]
    offset = 0
    for entry in entries:
        dims = struct.pack(f"<I{len(entry.shape)}Q", len(entry.shape), *reversed(entry.shape))
        parts.append(_string(entry.name) + dims + struct.pack("<IQ", entry.kind, offset))
        offset += -(-entry.size // _ALIGNMENT) * _ALIGNMENT
    return b"".join(parts)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """A value with its type in front: bool 7, u32 4, i64 11, f32 6, string 8, array 9 of strings, f32 or i32."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value) if 0 <= value < 1 << 32 else struct.pack("<Iq", 11, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if not value or isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
    kind, dtype = (6, "<f4") if isinstance(value[0], float) else (5, "<i4")
    return struct.pack("<IIQ", 9, kind, len(value)) + np.asarray(value, dtype).tobytes()


def _pad(out: BinaryIO) -> None:
    out.write(b"\0" * (-out.tell() % _ALIGNMENT))
