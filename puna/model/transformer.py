"""THE Llama: a pre-norm decoder with RoPE, grouped-query attention, SwiGLU (LLaMA 1 section 2.2, Llama 3 section 3.2).

Departures from a plain nn.Module stack, all on purpose:
- Parameter names are Hugging Face's, so published weights load without a table.
- It is built on the meta device and holds nothing until it is initialised or loaded.
- Parameters keep their own dtype; `compute_dtype` is the dtype of activations and matmuls.
- It knows nothing of LoRA, quantization, parallelism or compile: those are functions applied to it.

Shapes: B batch, T queries, S keys, H heads, K key/value heads, D head_dim, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna.model.cache import Cache
from puna.model.config import ModelConfig
from puna.ops.attention import Mask, attention
from puna.ops.norm import RMSNorm
from puna.ops.rope import apply_rope, rope_frequencies, rope_tables, scale_frequencies
from puna.ops.swiglu import swiglu

Rope = tuple[Tensor, Tensor]


class Linear(nn.Linear):
    """A linear map without bias that computes in its input's dtype, so fp32 weights train under bf16 activations."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Nothing: `init_weights` or a checkpoint fills what is built on the meta device, where this took a while."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype))


class Attention(nn.Module):
    """The projections of causal self-attention: H query heads share K key/value heads."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = Linear(config.dim, config.n_heads * config.head_dim)
        self.k_proj = Linear(config.dim, config.n_kv_heads * config.head_dim)
        self.v_proj = Linear(config.dim, config.n_kv_heads * config.head_dim)
        self.o_proj = Linear(config.n_heads * config.head_dim, config.dim)

    def qkv(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, dim) -> (B, H, T, D), (B, K, T, D), (B, K, T, D), queries and keys rotated."""
        q = apply_rope(self._heads(self.q_proj(x)), *rope)
        k = apply_rope(self._heads(self.k_proj(x)), *rope)
        return q, k, self._heads(self.v_proj(x))

    def output(self, heads: Tensor) -> Tensor:
        """(B, H, T, D) -> (B, T, dim)."""
        return self.o_proj(heads.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, T, H*D) -> (B, H, T, D)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(config.dim, config.ffn_dim)
        self.up_proj = Linear(config.dim, config.ffn_dim)
        self.down_proj = Linear(config.ffn_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """h = x + attention(norm(x)); out = h + mlp(norm(h)), in two parts that know nothing of masks or caches."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, rope: Rope, mask: Mask, cache: Cache | None, layer: int, positions: Tensor) -> Tensor:
        """(B, T, dim) -> (B, T, dim)."""
        q, k, v = self.before(x, rope)
        heads = attention(q, k, v, mask) if cache is None else cache.attend(layer, q, k, v, positions, mask)
        return self.after(x, heads)

    def before(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """What attention takes: (B, T, dim) -> (B, H, T, D), (B, K, T, D), (B, K, T, D)."""
        return self.self_attn.qkv(self.input_layernorm(x), rope)

    def after(self, x: Tensor, heads: Tensor) -> Tensor:
        """What is made of its heads (B, H, T, D) and the residual stream x (B, T, dim): (B, T, dim)."""
        x = x + self.self_attn.output(heads)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """A Llama of any size or generation."""

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        # `_weight`: its own initialisation would cost a second of imports on the meta device, for nothing.
        weight = torch.empty(config.vocab_size, config.dim)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim, _weight=weight)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = Linear(config.dim, config.vocab_size)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        # A plain attribute: not a weight, and made on the CPU even when the model is on the meta device.
        with torch.device("cpu"):
            self.frequencies = rope_frequencies(config.head_dim, config.rope_theta)
            if config.rope_scaling is not None:
                self.frequencies = scale_frequencies(self.frequencies, **config.rope_scaling.model_dump())

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Mask = None,
        cache: Cache | None = None,
        head: bool = True,
    ) -> Tensor:
        """Next-token logits.

        Args:
            tokens: (B, T) int64.
            positions: (B, T) int64; 0..T-1 by default.
            mask: what a query may see; causal by default (see ops/attention.py).
            cache: keys and values of earlier positions; read and extended.
            head: False returns the final hidden states, for losses that fuse the output projection.

        Returns:
            (B, T, V) in the compute dtype, or (B, T, dim) without the head.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        if mask is None and cache is not None:
            mask = cache.mask(positions)
        if self.frequencies.device != tokens.device:
            self.frequencies = self.frequencies.to(tokens.device)
        rope = rope_tables(self.frequencies, positions)
        x = self.embed_tokens(tokens).to(self.compute_dtype)
        for index, layer in enumerate(self.layers):
            x = layer(x, rope, mask, cache, index, positions)
        x = self.norm(x)
        return self.lm_head(x) if head else x
