"""Adapters as torchtune writes them itself: its names, and query and key rows in Meta's order.

In that order RoPE turns neighbouring rows (2i, 2i + 1) of a head, in ours row i and row i + D/2. What has a row for
each output of q_proj or k_proj moves with them: B, and DoRA's magnitude, which torchtune's own export leaves behind.
"""

from collections.abc import Mapping

from torch import Tensor

from puna.checkpoint.rope_layout import to_halves

_LAYERS = {
    "attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj", "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj", "mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj", "output": "lm_head",
}  # fmt: skip
_PARTS = {"lora_a.weight": "lora_A.weight", "lora_b.weight": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_TURNED = ("q_proj.lora_B.weight", "k_proj.lora_B.weight", "q_proj.lora_magnitude_vector",
           "k_proj.lora_magnitude_vector")  # fmt: skip


def is_torchtune(names: Mapping[str, object]) -> bool:
    """Whether these are names of torchtune's."""
    return any(name.endswith(".lora_a.weight") for name in names)


def from_torchtune(tensors: Mapping[str, Tensor], head_dim: int) -> dict[str, Tensor]:
    """torchtune's adapter tensors under our names, in our row order. Names that are none of its stay as they are."""
    renamed = {_renamed(name): tensor for name, tensor in tensors.items()}
    return {n: to_halves(t, head_dim) if n.endswith(_TURNED) else t for n, t in renamed.items()}


def _renamed(name: str) -> str:
    part = next((p for p in _PARTS if name.endswith(f".{p}")), "")
    layer = name.removesuffix(f".{part}")
    block, number, inner = [*layer.split(".", 2), "", ""][:3]
    if not part or (inner if block == "layers" else layer) not in _LAYERS:
        return name
    ours = f"layers.{number}.{_LAYERS[inner]}" if block == "layers" else _LAYERS[layer]
    return f"{ours}.{_PARTS[part]}"
