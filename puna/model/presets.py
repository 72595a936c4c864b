"""Every Llama as a row of data, and how a config names one."""

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, PositiveInt

from puna.config import Config, nearest
from puna.errors import UsageError
from puna.model.config import ModelConfig, RopeScaling

_LLAMA1 = {"vocab_size": 32000, "max_seq_len": 2048, "rope_theta": 1e4, "norm_eps": 1e-6}
_LLAMA2 = {**_LLAMA1, "max_seq_len": 4096, "norm_eps": 1e-5}
_LLAMA3 = {"vocab_size": 128256, "max_seq_len": 8192, "rope_theta": 5e5, "norm_eps": 1e-5}
_LLAMA31 = {**_LLAMA3, "max_seq_len": 131072, "rope_scaling": RopeScaling(factor=8)}
_LLAMA32 = {**_LLAMA31, "rope_scaling": RopeScaling(factor=32), "tie_embeddings": True}
_SMALL = {**_LLAMA3, "vocab_size": 2048, "max_seq_len": 512, "tie_embeddings": True}

# name: (dim, n_layers, n_heads, n_kv_heads, head_dim, ffn_dim), what the family shares
_ROWS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "llama-7b": ((4096, 32, 32, 32, 128, 11008), _LLAMA1),
    "llama-13b": ((5120, 40, 40, 40, 128, 13824), _LLAMA1),
    "llama-33b": ((6656, 60, 52, 52, 128, 17920), _LLAMA1),
    "llama-65b": ((8192, 80, 64, 64, 128, 22016), {**_LLAMA1, "norm_eps": 1e-5}),
    "llama2-7b": ((4096, 32, 32, 32, 128, 11008), _LLAMA2),
    "llama2-13b": ((5120, 40, 40, 40, 128, 13824), _LLAMA2),
    "llama2-34b": ((8192, 48, 64, 8, 128, 22016), _LLAMA2),
    "llama2-70b": ((8192, 80, 64, 8, 128, 28672), _LLAMA2),
    "llama3-8b": ((4096, 32, 32, 8, 128, 14336), _LLAMA3),
    "llama3-70b": ((8192, 80, 64, 8, 128, 28672), _LLAMA3),
    "llama3.1-8b": ((4096, 32, 32, 8, 128, 14336), _LLAMA31),
    "llama3.1-70b": ((8192, 80, 64, 8, 128, 28672), _LLAMA31),
    "llama3.1-405b": ((16384, 126, 128, 8, 128, 53248), _LLAMA31),
    "llama3.2-1b": ((2048, 16, 32, 8, 64, 8192), _LLAMA32),
    "llama3.2-3b": ((3072, 28, 24, 8, 128, 8192), _LLAMA32),
    "llama3.3-70b": ((8192, 80, 64, 8, 128, 28672), _LLAMA31),
    "cria-1m": ((192, 2, 3, 1, 64, 512), _SMALL),
    "cria-2m": ((192, 4, 6, 2, 32, 512), _SMALL),
    "cria-15m": ((384, 8, 6, 2, 64, 1024), {**_SMALL, "vocab_size": 8192}),
}
_COLUMNS = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim")

PRESETS: dict[str, ModelConfig] = {
    name: ModelConfig(
        **dict(zip(_COLUMNS, row, strict=True)), **{"rope_scaling": None, "tie_embeddings": False, **family}
    )
    for name, (row, family) in _ROWS.items()
}


def _known(name: str) -> str:
    if name not in PRESETS:
        raise ValueError(f"no preset of this name{nearest(name, list(PRESETS))} (all: puna ls models)")
    return name


class ModelChoice(Config):
    """A preset, with any of its values replaced; the vocabulary size comes from the tokenizer."""

    preset: Annotated[str, AfterValidator(_known)] = "cria-2m"
    """A name of `puna ls models`."""
    dim: PositiveInt | None = None
    n_layers: PositiveInt | None = None
    n_heads: PositiveInt | None = None
    n_kv_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    ffn_dim: PositiveInt | None = None
    max_seq_len: PositiveInt | None = None
    rope_theta: float | None = None
    rope_scaling: RopeScaling | None = None
    norm_eps: float | None = None
    tie_embeddings: bool | None = None


def _by_name(value: Any) -> Any:
    return {"preset": value} if isinstance(value, str) else value


ModelSpec = Annotated[ModelChoice, BeforeValidator(_by_name)]
"""`model: llama3.2-1b`, or `model: {preset: llama3.2-1b, n_layers: 4}`."""


def resolve_model(choice: ModelChoice, vocab_size: int) -> ModelConfig:
    """The full config of a choice.

    Raises:
        UsageError: values that do not divide.
    """
    given = choice.model_dump(exclude={"preset"}, exclude_none=True)
    config = ModelConfig(**{**PRESETS[choice.preset].model_dump(), **given, "vocab_size": vocab_size})
    if config.n_heads % config.n_kv_heads or config.head_dim % 2:
        raise UsageError(
            f"n_heads={config.n_heads} must be a multiple of n_kv_heads={config.n_kv_heads}, "
            f"and head_dim={config.head_dim} even",
            where="model",
        )
    return config
