"""Meta's params.json: how little it says, and what has to be known besides."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from puna.checkpoint.names import check_sizes, rope_theta
from puna.errors import CheckpointError, UsageError
from puna.model.config import ModelConfig, RopeScaling
from puna.model.presets import PRESETS

_MULTIPLE_OF = 256  # where a params.json does not say, as in Meta's own code
_LLAMA3_VOCABULARY = 128_000  # ids from which on it is Llama 3's: another RoPE base, another way to cut embeddings
_SCALED_CONTEXT, _LLAMA1_EPS = 131_072, 1e-6
_SHAPE = ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim")


def read_params(params: Mapping[str, Any], vocab_size: int, where: Path) -> ModelConfig:
    """Our config of a params.json; `vocab_size` counts the rows of the embedding, and `tie_embeddings` is left False.

    Raises:
        CheckpointError: sizes that are missing, no numbers or no Llama's, quantized weights, adapters inside.
    """
    inner = params.get("model")
    values = dict(inner if isinstance(inner, dict) else params)  # some Llama 3 files nest them
    if odd := [k for k in ("quantization_args", "lora_args", "vision_chunk_size", "moe_args") if values.get(k)]:
        raise CheckpointError(
            f"{', '.join(odd)}: not supported", where=where, cause="a quantized, adapted or image-reading checkpoint",
            fix="the bf16 text checkpoint of the same model",
        )  # fmt: skip
    try:
        config = _config(values, vocab_size, rope_theta(values, where))
    except KeyError as error:
        raise CheckpointError(f"{error.args[0]} is missing", where=where, cause="not Meta's params.json") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", where=where) from None
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise CheckpointError(f"its sizes are not numbers: {error}", where=where) from None
    check_sizes(config, where, {"ffn_dim": "hidden_dim"})
    return config


def _config(values: dict[str, Any], vocab_size: int, theta: float | None) -> ModelConfig:
    said = values.get("vocab_size", -1)
    vocab = vocab_size if said == -1 else said  # -1 in Llama 1 and 2: the tokenizer was to tell
    dim, heads = values["dim"], values["n_heads"]
    multiplier = values.get("ffn_dim_multiplier") or 1.0
    given: dict[str, Any] = {
        "dim": dim,
        "n_layers": values["n_layers"],
        "n_heads": heads,
        "n_kv_heads": values.get("n_kv_heads") or heads,
        "head_dim": values.get("head_dim") or dim // heads,
        "ffn_dim": values.get("hidden_dim") or ffn_width(dim, multiplier, values.get("multiple_of", _MULTIPLE_OF)),
        "vocab_size": vocab,
        "rope_theta": theta or (5e5 if vocab >= _LLAMA3_VOCABULARY else 1e4),
        "norm_eps": values["norm_eps"],
        "tie_embeddings": False,
    }
    given["rope_scaling"] = _scaling(values, given)
    return ModelConfig(**given, max_seq_len=values.get("max_seq_len") or _context(given))


def ffn_width(dim: int, multiplier: float, multiple_of: int) -> int:
    """Width of the feed-forward layer (spec of Meta's code: every step truncates)."""
    width = int(2 * 4 * dim / 3)
    return multiple_of * -(-int(multiplier * width) // multiple_of)


def _scaling(values: dict[str, Any], given: dict[str, Any]) -> RopeScaling | None:
    if not values.get("use_scaled_rope"):
        return None
    factor = values.get("rope_scaling_factor") or _usual_factor(given)
    return RopeScaling(factor=factor, high_freq_factor=values.get("rope_high_freq_factor") or 4.0)


def _usual_factor(given: Mapping[str, Any]) -> float:
    """What `use_scaled_rope` stands for: 8, which Meta's code has as a constant, but 32 in Llama 3.2 1B and 3B."""
    small = (PRESETS["llama3.2-1b"], PRESETS["llama3.2-3b"])
    return 32.0 if any(_same(given, preset) for preset in small) else 8.0


def _context(given: Mapping[str, Any]) -> int:
    """Positions it was made for, which no params.json says: those of the Llama it is, else of its generation."""
    for preset in PRESETS.values():
        if _same(given, preset) and (given["norm_eps"], given["rope_scaling"]) == (
            preset.norm_eps,
            preset.rope_scaling,
        ):
            return preset.max_seq_len
    if given["rope_scaling"] is not None:
        return _SCALED_CONTEXT
    if given["vocab_size"] >= _LLAMA3_VOCABULARY or given["rope_theta"] != 1e4:
        return 8192
    return 2048 if given["norm_eps"] == _LLAMA1_EPS else 4096


def _same(given: Mapping[str, Any], preset: ModelConfig) -> bool:
    return all(given[name] == getattr(preset, name) for name in _SHAPE)


def write_params(config: ModelConfig, n_kv_heads: int) -> dict[str, Any]:
    """params.json of a config; the context length has no place in it.

    Args:
        n_kv_heads: as stored: as many as shards where there are more shards than heads.

    Raises:
        UsageError: a model that Meta's code cannot compute.
    """
    scaling = config.rope_scaling
    if config.head_dim * config.n_heads != config.dim:
        raise UsageError(f"Meta's format has no head_dim: {config.head_dim} is not dim / n_heads", where="--to meta")
    if scaling is not None and (scaling.low_freq_factor, scaling.original_max_seq_len) != (1.0, 8192):
        raise UsageError(f"Meta's format has no place for this RoPE scaling: {scaling}", where="--to meta")
    values: dict[str, Any] = {name: getattr(config, name) for name in ("dim", "n_layers", "n_heads")}
    values["n_kv_heads"] = n_kv_heads
    multiplier, multiple_of = _rule(config)
    values["multiple_of"] = multiple_of
    if multiplier != 1.0:
        values["ffn_dim_multiplier"] = multiplier
    values |= {"norm_eps": config.norm_eps, "vocab_size": config.vocab_size, "rope_theta": config.rope_theta}
    if scaling is not None:
        values["use_scaled_rope"] = True
        if scaling.factor != _usual_factor(config.model_dump()):
            values["rope_scaling_factor"] = scaling.factor
        if scaling.high_freq_factor != 4.0:
            values["rope_high_freq_factor"] = scaling.high_freq_factor
    return values


def _rule(config: ModelConfig) -> tuple[float, int]:
    """(ffn_dim_multiplier, multiple_of) that give the width: the published ones where they do."""
    for multiplier, multiple_of in [(1.0, 256), (1.3, 4096), (1.3, 1024), (1.2, 4096), (1.5, 256), (1.0, 32), (1.0, 1)]:
        if ffn_width(config.dim, multiplier, multiple_of) == config.ffn_dim:
            return multiplier, multiple_of
    return (config.ffn_dim + 0.5) / int(8 * config.dim / 3), 1  # the half survives rounding, the rule cuts it off
