"""A Llama out of a GGUF file: config, weights with their names and head order, and the tokenizer inside."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from puna.checkpoint.gguf.blocks import Ggml
from puna.checkpoint.gguf.file import Gguf, open_gguf
from puna.checkpoint.gguf.packed import PACKED, unpacked_blocks
from puna.checkpoint.gguf.rope import TENSOR as ROPE
from puna.checkpoint.gguf.rope import refuse_other_scaling, rope_scaling
from puna.checkpoint.rope_layout import is_rotated, to_halves
from puna.checkpoint.stored import Stored, Weight
from puna.errors import CheckpointError
from puna.lineage import parse_lineage
from puna.model.config import ModelConfig, RopeScaling
from puna.ops.packed import Packed
from puna.tokenizer.gguf_vocab import vocab_files
from puna.tokenizer.tokenizer import Tokenizer

_BLOCK = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
_TOP = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
_DTYPES = {
    Ggml.F32: torch.float32, Ggml.F16: torch.float16, Ggml.BF16: torch.bfloat16, Ggml.F64: torch.float64
}  # fmt: skip
LINEAGE = "puna.lineage"
"""The metadata key that holds what puna.json holds elsewhere."""
ENDS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
"""The metadata keys that every runtime stops at."""
STOP_IDS = "puna.stop_ids"
"""The metadata key that holds all stop ids, where there are more of them."""


def open_gguf_model(path: Path) -> Stored:
    """A GGUF file as a model; plain floats are read as they are, quantized tensors are dequantized to fp32.

    Raises:
        CheckpointError: damaged, another architecture, or something this Llama does not compute.
    """
    file = open_gguf(path)
    config = gguf_config(file)
    weights = {our_name(name): _weight(file, name, config) for name in file.names() if name != ROPE}
    return Stored(
        path, "gguf", config, weights, file.kinds(), [path], partial(gguf_tokenizer, file), _stop_ids(file),
        parse_lineage(file.metadata.get(LINEAGE, "{}")),
    )  # fmt: skip


def gguf_config(file: Gguf) -> ModelConfig:
    """The architecture a GGUF's metadata describes, held against its tensors.

    Raises:
        CheckpointError: see `open_gguf_model`.
    """
    if (kind := file.metadata.get("general.architecture")) != "llama":
        raise CheckpointError(f"the architecture is {kind!r}, puna reads llama", where=file.path)
    dim, heads = _count(file, "embedding_length"), _count(file, "attention.head_count")
    head_dim = _count(file, "attention.key_length", dim // heads)
    theta = _real(file, "rope.freq_base", 10000.0)
    _refuse_what_is_not_computed(file, head_dim)
    config = ModelConfig(
        dim=dim,
        n_layers=_count(file, "block_count"),
        n_heads=heads,
        n_kv_heads=_count(file, "attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn_dim=_count(file, "feed_forward_length"),
        vocab_size=file.shape("token_embd.weight")[0] if "token_embd.weight" in file.names() else 0,
        max_seq_len=_count(file, "context_length"),
        rope_theta=theta,
        rope_scaling=_scaling(file, head_dim, theta),
        # Stored as fp32: 9.9999997e-06 is meant as 1e-5.
        norm_eps=float(f"{_real(file, 'attention.layer_norm_rms_epsilon'):.6g}"),
        tie_embeddings="output.weight" not in file.names(),
    )
    _hold_against_tensors(config, file)
    return config


def gguf_tokenizer(file: Gguf) -> Tokenizer:
    """The tokenizer inside."""
    return Tokenizer(vocab_files(file.metadata))


def our_name(name: str) -> str:
    """`blk.0.attn_q.weight` -> `layers.0.self_attn.q_proj.weight`; what is not in the table stays as it is."""
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in _BLOCK:
        return f"layers.{parts[1]}.{_BLOCK[parts[2]]}.{parts[3]}"
    if parts[0] in _TOP and len(parts) == 2:
        return f"{_TOP[parts[0]]}.{parts[1]}"
    return name


def gguf_name(name: str) -> str:
    """The inverse of `our_name`."""
    parts = name.split(".")
    if parts[0] == "layers":
        block = next(theirs for theirs, ours in _BLOCK.items() if ours == ".".join(parts[2:-1]))
        return f"blk.{parts[1]}.{block}.{parts[-1]}"
    top = next(theirs for theirs, ours in _TOP.items() if ours == parts[0])
    return f"{top}.{parts[-1]}"


def _weight(file: Gguf, name: str, config: ModelConfig) -> Weight:
    kind, rotated = file.kind(name), is_rotated(our_name(name))
    dtype = _DTYPES.get(kind)

    def packed() -> Packed:
        weight = unpacked_blocks(file.raw(name), kind, file.shape(name))
        rows = to_halves(torch.arange(len(weight.codes)), config.head_dim) if rotated else None
        return weight if rows is None else weight.rows(rows)

    def read() -> torch.Tensor:
        if dtype is None:
            weight = torch.from_numpy(file.read(name))
        else:
            weight = torch.from_numpy(file.raw(name).copy()).view(dtype).view(file.shape(name))
        return to_halves(weight, config.head_dim) if rotated else weight

    # RoPE's rows lie in another order, but are never the largest matrix
    by_rows = dtype is None and len(file.shape(name)) == 2 and not rotated
    return Weight(
        file.shape(name), dtype or torch.float32, read, owned=True, quantized=dtype is None,
        packed=packed if kind in PACKED and len(file.shape(name)) == 2 else None,
        read_parts=(lambda: map(torch.from_numpy, file.read_rows(name))) if by_rows else None,
    )  # fmt: skip


def _count(file: Gguf, key: str, default: int | None = None) -> int:
    value = file.metadata.get(f"llama.{key}", default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
        raise CheckpointError(f"llama.{key} is {_shown(value)}", where=file.path)
    return value


def _real(file: Gguf, key: str, default: float | None = None) -> float:
    value = file.metadata.get(f"llama.{key}", default)
    if not isinstance(value, float | int) or not math.isfinite(value) or value <= 0:
        raise CheckpointError(f"llama.{key} is {_shown(value)}", where=file.path)
    return float(value)


def _shown(value: Any) -> str:
    return f"{value!r:.80}" if value is None or isinstance(value, int | float | str) else "an array"


def _refuse_what_is_not_computed(file: Gguf, head_dim: int) -> None:
    plain = {
        "rope.dimension_count": head_dim, "attention.value_length": head_dim, "expert_count": 0,
        "expert_used_count": 0, "attention.scale": 0.0, "attention.causal": True,
    }  # fmt: skip
    for key, usual in plain.items():
        value = file.metadata.get(f"llama.{key}", usual)
        if not isinstance(value, int | float) or value != usual:
            raise CheckpointError(f"llama.{key} is {_shown(value)}; puna computes {usual}", where=file.path)
    if head_dim % 2:
        raise CheckpointError(f"heads of {head_dim}: RoPE turns pairs", where=file.path)
    refuse_other_scaling(file.metadata, file.path)


def _scaling(file: Gguf, head_dim: int, theta: float) -> RopeScaling | None:
    if ROPE not in file.names():
        return None
    return rope_scaling(file.read(ROPE), file.metadata, head_dim, theta, file.path)


def _hold_against_tensors(config: ModelConfig, file: Gguf) -> None:
    """Sizes that no tensor has would be allocated before anything notices."""
    names = set(file.names())
    blocks = {name.split(".")[1] for name in names if name.startswith("blk.")}
    told = {
        "token_embd.weight": (config.vocab_size, config.dim),
        "blk.0.attn_q.weight": (config.n_heads * config.head_dim, config.dim),
        "blk.0.attn_k.weight": (config.n_kv_heads * config.head_dim, config.dim),
        "blk.0.ffn_gate.weight": (config.ffn_dim, config.dim),
    }
    if missing := [name for name in told if name not in names]:
        raise CheckpointError(f"no {missing[0]}", where=file.path, cause="an incomplete or vocabulary-only file")
    if len(blocks) != config.n_layers:
        raise CheckpointError(f"llama.block_count is {config.n_layers}, blk.* are {len(blocks)}", where=file.path)
    for name, shape in told.items():
        if file.shape(name) != shape:
            raise CheckpointError(f"{name} is {file.shape(name)}, the metadata says {shape}", where=file.path)
    tokens = file.metadata.get("tokenizer.ggml.tokens", ())
    if not isinstance(tokens, list | tuple) or len(tokens) > config.vocab_size:
        raise CheckpointError(f"more tokens than the {config.vocab_size} rows of the embedding", where=file.path)
    if config.n_heads % config.n_kv_heads:
        raise CheckpointError(f"{config.n_heads} heads cannot share {config.n_kv_heads}", where=file.path)


def _stop_ids(file: Gguf) -> list[int]:
    listed = file.metadata.get(STOP_IDS)
    found = [*map(file.metadata.get, ENDS), *(listed.tolist() if isinstance(listed, np.ndarray) else ())]
    rows = file.shape("token_embd.weight")[0]
    return list(dict.fromkeys(id for id in found if isinstance(id, int) and 0 <= id < rows))
