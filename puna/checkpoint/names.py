"""The border between names on disk and ours: Hugging Face's config keys and tensor prefix."""

from collections.abc import Iterable, Mapping
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
# What transformers takes where a config.json says nothing; None: derived from the other sizes.
_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None, "head_dim": None, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
}  # fmt: skip
# Keys that change what is computed, with the values that do not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,), "mlp_bias": (False,), "hidden_act": ("silu", "swish"), "partial_rotary_factor": (1.0,),
    "sliding_window": (), "num_experts": (0, 1), "num_local_experts": (0, 1), "n_routed_experts": (0,),
    "attn_logit_softcapping": (), "final_logit_softcapping": (), "logit_scale": (1.0,), "logits_scaling": (1.0,),
    "embedding_multiplier": (1.0,), "residual_multiplier": (1.0,), "attention_multiplier": (),
    "use_qk_norm": (False,), "qk_norm": (False,), "clip_qkv": (), "no_rope_layers": ([],), "alibi": (False,),
    "is_encoder_decoder": (False,), "add_cross_attention": (False,), "auto_map": ({},),
}  # fmt: skip
_LIMITS = {"n_layers": 2000, "head_dim": 2**14, "rope_theta": 1e15}
QUANTIZED = ("compressed-tensors", "bitsandbytes")
"""The layouts of quantized weights that are read (see `quantized`)."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def to_disk_name(name: str) -> str:
    """`layers.0...` -> `model.layers.0...`; `lm_head.weight` has no prefix."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def from_disk_name(name: str) -> str:
    return name.removeprefix("model.")


def to_hf_config(config: ModelConfig, dtype: torch.dtype, bos_id: int | None, eos_id: int) -> dict[str, Any]:
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
    _refuse_others(values, where)
    missing = [k for k in _KEYS.values() if k not in values and k not in _DEFAULTS]
    if missing:
        raise CheckpointError(f"missing: {', '.join(missing)}", where=where)
    theta, scaling = _rope(values, where)
    try:
        heads = values["num_attention_heads"]
        given = {ours: values[disk] for ours, disk in _KEYS.items() if values.get(disk) is not None}
        defaults = {ours: _DEFAULTS[disk] for ours, disk in _KEYS.items() if _DEFAULTS.get(disk) is not None}
        defaults |= {"n_kv_heads": heads, "head_dim": values["hidden_size"] // heads}
        config = ModelConfig(**{**defaults, **given, "rope_theta": theta}, rope_scaling=scaling)
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", where=where) from None
    except (TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"its sizes are not numbers: {error}", where=where) from None
    check_sizes(config, where, _KEYS)
    return config


def _refuse_others(values: Mapping[str, Any], where: object) -> None:
    """What a config.json can ask for that would be computed otherwise, by name."""
    if (kind := values.get("model_type")) != "llama":
        raise CheckpointError(
            f"model_type is {kind!r}, puna reads llama", where=where, cause="another architecture: LLaMA 1, Llama 2 "
            "and Llama 3.x text models are read, and whatever has their config.json",
        )  # fmt: skip
    if quantization_of(values, where).get("quant_method") not in (None, *QUANTIZED):
        raise CheckpointError(
            "quantization_config is not supported", where=where, cause="weights of GPTQ, AWQ or the like",
            fix="the model it was quantized from, or its GGUF",
        )  # fmt: skip
    classes = values.get("architectures") or ["LlamaForCausalLM"]
    if not isinstance(classes, list) or "LlamaForCausalLM" not in classes:
        raise CheckpointError(f"not supported: architectures {classes}", where=where, cause="not a language model")
    odd = {k: values[k] for k, usual in _PLAIN.items() if values.get(k) not in (None, *usual)}
    if odd.keys() == {"sliding_window"} and values.get("use_sliding_window") is False:
        odd = {}
    if odd:
        raise CheckpointError(
            f"not supported: {str(odd)[:200]}", where=where, cause="this Llama would compute something else"
        )


def quantization_of(values: Mapping[str, Any], where: object) -> dict[str, Any]:
    """What a config.json says of quantized weights; nothing where they are plain."""
    section = values.get("quantization_config")
    if section is not None and (not isinstance(section, dict) or "quant_method" not in section):
        raise CheckpointError("quantization_config is not supported: it does not say its quant_method", where=where)
    return section or {}


def _rope(values: Mapping[str, Any], where: object) -> tuple[Any, RopeScaling | None]:
    """theta and scaling: `rope_parameters` of new files, `rope_theta` and `rope_scaling` of old ones, or both alike."""
    given = [values.get(k) or {} for k in ("rope_scaling", "rope_parameters")]
    if not all(isinstance(d, dict) for d in given):
        raise CheckpointError("rope_scaling and rope_parameters are not mappings", where=where)
    said = [{**d, "rope_type": d.get("rope_type", d.get("type", "default"))} for d in given if d]
    thetas = {theta for d in (*said, values) if (theta := rope_theta(d, where)) is not None}
    wanted = ("rope_type", *_ROPE.values())
    if len(thetas) > 1 or any(d.get(k) != said[0].get(k) for d in said for k in wanted):
        raise CheckpointError("rope_theta, rope_scaling and rope_parameters contradict each other", where=where)
    theta = thetas.pop() if thetas else _DEFAULTS["rope_theta"]
    rope: dict[str, Any] = said[0] if said else {"rope_type": "default"}
    kind = rope["rope_type"]
    if kind not in ("default", "llama3"):
        raise CheckpointError(f"RoPE scaling of type {kind!r} is not supported", where=where, cause="not a Llama's")
    odd = {
        k: v for k, v in rope.items() if isinstance(v, dict) or (k == "partial_rotary_factor" and v not in (None, 1))
    }
    if odd:  # a mapping: other RoPE in some layers than in others
        raise CheckpointError(f"not supported in RoPE: {str(odd)[:200]}", where=where)
    if kind == "default":
        return theta, None
    if missing := [k for k in _ROPE.values() if not isinstance(rope.get(k), int | float)]:
        raise CheckpointError(f"RoPE scaling without {', '.join(missing)}", where=where)
    try:
        return theta, RopeScaling(**{ours: rope[disk] for ours, disk in _ROPE.items()})
    except ValidationError as error:
        raise CheckpointError(f"RoPE scaling: {error.errors()[0]['msg']}", where=where) from None


def rope_theta(values: Mapping[str, Any], where: object) -> float | None:
    """RoPE's base as a file's mapping says it; None where it says nothing.

    Raises:
        CheckpointError: it says something that is no base: passed over, the model would run with another one.
    """
    theta = values.get("rope_theta")
    if theta is not None and (type(theta) not in (int, float) or not 0 < theta < _LIMITS["rope_theta"]):
        raise CheckpointError(f"rope_theta is {theta!r:.80}, no positive number", where=where)
    return theta


def check_sizes(config: ModelConfig, where: object, names: Mapping[str, str]) -> None:
    """Nothing is built of sizes that no Llama has: a config of ten bytes could ask for all the memory there is.

    Args:
        names: what the file calls our fields, where it has other names.

    Raises:
        CheckpointError: sizes, eps or scaling that cannot be.
    """
    sizes = config.model_dump(exclude={"norm_eps", "tie_embeddings", "rope_scaling"})
    wrong = [f"{names.get(k, k)} is {n}" for k, n in sizes.items() if not 0 < n < _LIMITS.get(k, 2**31)]  # nor NaN
    if not 0 <= config.norm_eps < 1:
        wrong.append(f"{names.get('norm_eps', 'norm_eps')} is {config.norm_eps}")
    if not wrong and config.n_heads % config.n_kv_heads:
        wrong.append(f"{config.n_heads} heads do not share {config.n_kv_heads} key/value heads evenly")
    if not wrong and config.head_dim % 2:
        wrong.append(f"head_dim {config.head_dim} is odd")
    if (r := config.rope_scaling) and not (
        0 < r.low_freq_factor < r.high_freq_factor < 1e6 and 0 < r.factor < 1e6 and 0 < r.original_max_seq_len < 2**31
    ):
        wrong.append(f"RoPE scaling is {r.model_dump()}")
    if wrong:
        raise CheckpointError("; ".join(wrong), where=where, cause="damaged, or not a Llama's")


def name_problems(wanted: Iterable[str], found: Iterable[str]) -> list[str]:
    """What is missing and what is too much, as text; buffers that old files carry are ignored."""
    wanted, found = set(wanted), {n for n in found if not n.endswith("rotary_emb.inv_freq")}
    problems = [f"missing {name}" for name in sorted(wanted - found)]
    return problems + [f"unexpected {name}" for name in sorted(found - wanted)]
