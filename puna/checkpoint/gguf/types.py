"""Which storage type each tensor of a file gets: llama.cpp's rules, so that a file is what its name says."""

from typing import NamedTuple

from puna.checkpoint.gguf.blocks import LAYOUTS, Ggml
from puna.errors import UsageError
from puna.model.config import ModelConfig


class FileType(NamedTuple):
    """What a file is called, by its matrices: `number` is general.file_type."""

    number: int
    matrices: Ggml


FILE_TYPES = {
    "F32": FileType(0, Ggml.F32), "F16": FileType(1, Ggml.F16), "BF16": FileType(32, Ggml.BF16),
    "Q8_0": FileType(7, Ggml.Q8_0), "Q4_0": FileType(2, Ggml.Q4_0), "Q4_K_M": FileType(15, Ggml.Q4_K),
}  # fmt: skip
_FALLBACK = {Ggml.Q4_K: Ggml.Q5_0, Ggml.Q5_K: Ggml.Q8_0, Ggml.Q6_K: Ggml.Q8_0}


def file_type(name: str) -> str:
    """The key of FILE_TYPES for what a user typed: `q4_k` and `Q4_K_M` are the same.

    Raises:
        UsageError: a type that is not written.
    """
    found = name.upper()
    found = "Q4_K_M" if found == "Q4_K" else found
    if found not in FILE_TYPES:
        raise UsageError(f"{name!r} is no type of GGUF that is written", fix=f"one of {', '.join(FILE_TYPES)}")
    return found


def storage(name: str, shape: tuple[int, ...], file: str, config: ModelConfig) -> Ggml:
    """The type of one tensor, by its GGUF name; one-dimensional ones stay fp32.

    Rows that are not whole superblocks of 256 fall back to a type with blocks of 32, others to F16.
    """
    if len(shape) == 1:
        return Ggml.F32
    wanted = _wanted(name, file, config)
    for kind in (wanted, _FALLBACK.get(wanted, wanted)):
        if shape[-1] % LAYOUTS[kind].weights == 0:
            return kind
    return Ggml.F16


def _wanted(name: str, file: str, config: ModelConfig) -> Ggml:
    matrices = FILE_TYPES[file].matrices
    head = "token_embd.weight" if config.tie_embeddings else "output.weight"
    if matrices in (Ggml.Q4_0, Ggml.Q4_K) and name == head:
        return Ggml.Q6_K
    if matrices == Ggml.Q4_K and name.endswith(("attn_v.weight", "ffn_down.weight")):
        if _more_bits(int(name.split(".")[1]), config.n_layers):
            return Ggml.Q6_K
        # Eight heads of a 70B share these values, so bits spent here count eight times.
        if name.endswith("attn_v.weight") and config.n_layers == 80 and config.n_heads != config.n_kv_heads:
            return Ggml.Q5_K
    return matrices


def _more_bits(layer: int, layers: int) -> bool:
    """The first eighth, the last eighth, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
