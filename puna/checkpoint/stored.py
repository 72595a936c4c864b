"""A model as it lies on disk, whatever its format: config, weights by our names read one at a time, tokenizer.

Every reader opens its format as a `Stored` and every writer writes one, so a conversion is a reader and a writer, and
neither holds more than a tensor.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from puna.checkpoint.names import name_problems
from puna.errors import CheckpointError
from puna.model.config import ModelConfig
from puna.model.init import build_model, materialize
from puna.model.transformer import Transformer
from puna.tokenizer.tokenizer import Tokenizer

Format = Literal["hf", "meta", "gguf", "llama2.c"]
_SHOWN = 20  # problems told at once


class Weight(NamedTuple):
    """One tensor that is not read yet. `dtype` is what `read` gives: as stored, or fp32 of a quantized one."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """The tensor with our rows: RoPE's halves, not Meta's neighbours. It may be read-only memory of the file."""


@dataclass(frozen=True)
class Stored:
    """An open model. Nothing but headers was read."""

    path: Path
    format: Format
    config: ModelConfig
    weights: Mapping[str, Weight]
    """By our names; whatever the file holds, so also what does not belong (see `problems`)."""
    storage: str
    """What the weights are stored in: `BF16`, `Q4_1 x 210, F32 x 61`."""
    files: Sequence[Path]
    """The files that hold weights."""
    read_tokenizer: Callable[[], Tokenizer]
    stop_ids: Sequence[int] = ()
    """Beyond the tokenizer's own: what generation_config.json lists."""
    lineage: Mapping[str, Any] = field(default_factory=dict)
    """Its puna.json."""

    def problems(self) -> list[str]:
        """Tensors that are missing, too many, or of another shape than the config says; nothing when it fits."""
        wanted = expected_shapes(self.config)
        wrong = name_problems(wanted, self.weights)
        return wrong + [
            f"{name} is {self.weights[name].shape}, the config says {shape}"
            for name, shape in wanted.items()
            if name in self.weights and self.weights[name].shape != shape
        ]

    def check(self) -> None:
        """
        Raises:
            CheckpointError: the tensors do not fit the config; all are listed.
        """
        if wrong := self.problems():
            more = [f"and {len(wrong) - _SHOWN} more"] * (len(wrong) > _SHOWN)
            raise CheckpointError("does not fit its config: " + "; ".join(wrong[:_SHOWN] + more), where=self.path)

    def load(self, dtype: torch.dtype, device: torch.device) -> Transformer:
        """The model with its weights and activations in `dtype` on `device`.

        Raises:
            CheckpointError: tensors that do not fit the config, or cannot be read.
        """
        self.check()
        model = build_model(self.config, dtype)
        materialize(model, device, dtype)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name in expected_shapes(self.config):
                parameters[name].copy_(self.weights[name].read())
        return model.eval()


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every stored tensor by our names, in the model's order; a tied head is stored once, as the embedding."""
    names = build_model(config).named_parameters()
    tied = config.tie_embeddings
    return {name: tuple(p.shape) for name, p in names if not (tied and name.startswith("lm_head."))}
