"""The numbers that make a Llama; field names are the papers'."""

from puna.config import Config


class RopeScaling(Config):
    """Llama 3.1's frequency scaling (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


class ModelConfig(Config):
    """One architecture for Llama 1, 2 and 3.x: they differ in these values only."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    """Key/value heads; fewer than n_heads is grouped-query attention (GQA)."""
    head_dim: int
    """Never derived when given: it need not be dim / n_heads."""
    ffn_dim: int
    vocab_size: int
    max_seq_len: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    norm_eps: float
    tie_embeddings: bool
    """The output projection is the embedding matrix."""


def count_parameters(config: ModelConfig) -> int:
    """Stored weights, norms included, a tied head counted once."""
    heads = (2 * config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    layer = config.dim * (heads + 3 * config.ffn_dim + 2)
    tables = config.vocab_size * config.dim * (1 if config.tie_embeddings else 2)
    return tables + config.n_layers * layer + config.dim
