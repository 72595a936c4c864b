"""A Llama out of a GGUF file: config, weights with their names and head order, and the tokenizer inside."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from puna.checkpoint.gguf import Gguf, open_gguf
from puna.checkpoint.rope_layout import to_halves
from puna.checkpoint.stored import Stored, Weight
from puna.errors import CheckpointError
from puna.model.config import ModelConfig
from puna.tokenizer.gguf_vocab import vocab_files
from puna.tokenizer.tokenizer import Tokenizer

_BLOCK = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
_TOP = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}


def open_gguf_model(path: Path) -> Stored:
    """A GGUF file as a model; its tensors are dequantized to fp32 when they are read.

    Raises:
        CheckpointError: damaged, or another architecture.
    """
    file = open_gguf(path)
    config = gguf_config(file)
    weights = {_our_name(name): _weight(file, name, config) for name in file.names()}
    return Stored(path, "gguf", config, weights, file.kinds(), [path], partial(gguf_tokenizer, file))


def _weight(file: Gguf, name: str, config: ModelConfig) -> Weight:
    def read() -> torch.Tensor:
        weight = torch.from_numpy(file.read(name))
        return to_halves(weight, config.head_dim) if name.endswith(("attn_q.weight", "attn_k.weight")) else weight

    return Weight(file.shape(name), torch.float32, read)


def gguf_config(file: Gguf) -> ModelConfig:
    """The architecture a GGUF's metadata describes."""
    if (kind := file.metadata.get("general.architecture")) != "llama":
        raise CheckpointError(f"the architecture is {kind!r}, puna reads llama", where=file.path)
    if "rope_freqs.weight" in file.names():
        raise CheckpointError("RoPE scaling inside a GGUF is not read yet", where=file.path)

    def get(key: str, default: Any = None) -> Any:
        value = file.metadata.get(f"llama.{key}", default)
        if not isinstance(value, int | float):
            raise CheckpointError(f"llama.{key} is {value!r}", where=file.path)
        return value

    heads = get("attention.head_count")
    if not heads or "token_embd.weight" not in file.names():
        raise CheckpointError("no attention heads or no token_embd.weight", where=file.path)
    return ModelConfig(
        dim=get("embedding_length"),
        n_layers=get("block_count"),
        n_heads=heads,
        n_kv_heads=get("attention.head_count_kv", heads),
        head_dim=get("attention.key_length", get("embedding_length") // heads),
        ffn_dim=get("feed_forward_length"),
        vocab_size=file.shape("token_embd.weight")[0],
        max_seq_len=get("context_length"),
        rope_theta=get("rope.freq_base", 10000.0),
        rope_scaling=None,
        # Stored as fp32: 9.9999997e-06 is meant as 1e-5.
        norm_eps=float(f"{get('attention.layer_norm_rms_epsilon'):.6g}"),
        tie_embeddings="output.weight" not in file.names(),
    )


def gguf_tokenizer(file: Gguf) -> Tokenizer:
    """The tokenizer inside."""
    return Tokenizer(vocab_files(file.metadata))


def _our_name(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in _BLOCK:
        return f"layers.{parts[1]}.{_BLOCK[parts[2]]}.{parts[3]}"
    if parts[0] in _TOP and len(parts) == 2:
        return f"{_TOP[parts[0]]}.{parts[1]}"
    return name
