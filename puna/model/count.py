"""How large and how costly a model is, from its config alone."""

from puna.model.config import ModelConfig


def count_parameters(config: ModelConfig) -> int:
    """Stored weights, norms included, a tied head counted once."""
    heads = (2 * config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    layer = config.dim * (heads + 3 * config.ffn_dim + 2)
    tables = config.vocab_size * config.dim * (1 if config.tie_embeddings else 2)
    return tables + config.n_layers * layer + config.dim


def train_flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Forward and backward: 6 x matmul weights + 6 x layers x heads x head_dim x seq_len (causal attention)."""
    matmul = count_parameters(config) - (0 if config.tie_embeddings else config.vocab_size * config.dim)
    return 6 * matmul + 6 * config.n_layers * config.n_heads * config.head_dim * seq_len
