"""Meta's names for our tensors, and how its model-parallel shards cut them."""

from torch import Tensor

_BLOCK = {
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_TOP = {"embed_tokens": "tok_embeddings", "norm": "norm", "lm_head": "output"}
_OURS = {meta: ours for ours, meta in (_BLOCK | _TOP).items()}
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


def to_meta_name(name: str) -> str:
    """`layers.0.mlp.gate_proj.weight` -> `layers.0.feed_forward.w1.weight`."""
    layer, inner = _split(name)
    return f"{layer}{(_BLOCK if layer else _TOP)[inner]}.weight"


def from_meta_name(name: str) -> str:
    """The inverse; a name that is none of Meta's comes back as it is, so that it is told as unexpected."""
    layer, inner = _split(name)
    return f"{layer}{_OURS[inner]}.weight" if inner in _OURS and name.endswith(".weight") else name


def _split(name: str) -> tuple[str, str]:
    """`layers.0.x.y.weight` -> (`layers.0.`, `x.y`); `norm.weight` -> (``, `norm`)."""
    parts = name.removesuffix(".weight").split(".")
    return (f"layers.{parts[1]}.", ".".join(parts[2:])) if parts[0] == "layers" and len(parts) > 2 else ("", parts[0])


def cut_axis(name: str) -> int | None:
    """The axis along which shards cut a tensor of ours; None where each holds all of it (norms).

    The embedding is not told here: Llama 1 and 2 cut its columns (1), Llama 3 its rows (0).
    """
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return 1
    return None if name.endswith("norm.weight") else 0


def is_key_or_value(name: str) -> bool:
    """Whether shards repeat its heads when there are more shards than heads."""
    return name.endswith(("k_proj.weight", "v_proj.weight"))


def cut(tensor: Tensor, axis: int | None, shards: int, shard: int, repeat: int = 1) -> Tensor:
    """The part of `tensor` that belongs to one shard; `repeat` neighbouring shards hold the same part."""
    return tensor if axis is None else tensor.chunk(shards // repeat, axis)[shard // repeat]
