"""Row orders of q and k: Meta and GGUF rotate neighbours (2i, 2i + 1), Hugging Face and puna halves (i, i + D/2)."""

from torch import Tensor


def is_rotated(name: str) -> bool:
    """Whether RoPE turns what this weight of ours makes, so that its rows have an order."""
    return name.endswith(("q_proj.weight", "k_proj.weight"))


def to_halves(rows: Tensor, head_dim: int) -> Tensor:
    """(heads * D, ...) with Meta's neighbours -> the same with halves, head by head. A copy."""
    return rows.view(-1, head_dim // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def to_neighbours(rows: Tensor, head_dim: int) -> Tensor:
    """(heads * D, ...) with halves -> the same with Meta's neighbours, head by head. A copy."""
    return rows.view(-1, 2, head_dim // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
