"""The border between names on disk and ours: Hugging Face's config keys and tensor prefix."""

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import ValidationError

from puna.errors import CheckpointError
from puna.model.config import ModelConfig, RopeScaling

_KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
_ROPE = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_seq_len": "original_max_position_embeddings",
}
_OPTIONAL = ("num_key_value_heads", "head_dim", "rope_theta", "tie_word_embeddings")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def to_disk_name(name: str) -> str:
    """`layers.0...` -> `model.layers.0...`; `lm_head.weight` has no prefix."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def from_disk_name(name: str) -> str:
    return name.removeprefix("model.")


def to_hf_config(config: ModelConfig, dtype: torch.dtype, bos_id: int, eos_id: int) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM, with the keys that old and new readers know."""
    values = {disk: getattr(config, ours) for ours, disk in _KEYS.items()}
    scaling = None
    if config.rope_scaling is not None:
        scaling = {"rope_type": "llama3", **{disk: getattr(config.rope_scaling, ours) for ours, disk in _ROPE.items()}}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **values,
        "rope_scaling": scaling,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }


def from_hf_config(values: dict[str, Any], where: object) -> ModelConfig:
    """Our config of a config.json, with either spelling of the RoPE keys.

    Raises:
        CheckpointError: another architecture, or something this Llama does not compute.
    """
    if values.get("model_type") != "llama":
        raise CheckpointError(f"model_type is {values.get('model_type')!r}, puna reads llama", where=where)
    plain = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "partial_rotary_factor": 1.0}
    plain |= {"quantization_config": None}
    odd = {k: values[k] for k, usual in plain.items() if values.get(k) not in (None, usual)}
    if odd:
        raise CheckpointError(f"not supported: {odd}", where=where)
    missing = [k for k in _KEYS.values() if k not in values and k not in _OPTIONAL]
    if missing:
        raise CheckpointError(f"missing: {', '.join(missing)}", where=where)
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise CheckpointError(f"RoPE scaling of type {kind!r} is not supported", where=where)
    try:
        heads = values["num_attention_heads"]
        given = {ours: values[disk] for ours, disk in _KEYS.items() if values.get(disk) is not None}
        given.setdefault("n_kv_heads", heads)
        given.setdefault("head_dim", values["hidden_size"] // heads)
        given.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
        given.setdefault("tie_embeddings", False)
        scaling = RopeScaling(**{o: rope[d] for o, d in _ROPE.items() if d in rope}) if kind == "llama3" else None
        return ModelConfig(**given, rope_scaling=scaling)
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", where=where) from None
    except (TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"its sizes are not numbers: {error}", where=where) from None


def name_problems(wanted: Iterable[str], found: Iterable[str]) -> list[str]:
    """What is missing and what is too much, as text; buffers that old files carry are ignored."""
    wanted, found = set(wanted), {n for n in found if not n.endswith("rotary_emb.inv_freq")}
    problems = [f"missing {name}" for name in sorted(wanted - found)]
    return problems + [f"unexpected {name}" for name in sorted(found - wanted)]
