"""A model as it lies on disk, whatever its format: config, weights by our names read one at a time, tokenizer.

Every reader opens its format as a `Stored` and every writer writes one, so a conversion is a reader and a writer, and
neither holds more than a tensor.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from puna.checkpoint.names import name_problems
from puna.checkpoint.safetensors_file import Weight
from puna.device import release_freed_memory
from puna.errors import CheckpointError
from puna.model.config import ModelConfig
from puna.model.init import build_model
from puna.model.transformer import Transformer
from puna.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from puna.ops.packed import Packed

Put = Callable[[Transformer, str, "Packed", torch.device], None]
Format = Literal["hf", "meta", "gguf", "llama2.c"]
_SHOWN = 20  # problems told at once


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

    def load(self, dtype: torch.dtype, device: torch.device, put: "Put | None" = None) -> Transformer:
        """The model with its weights and activations in `dtype` on `device`.

        Args:
            put: puts a quantized weight into the model as it lies (see `quant.quantize`); by default all are
                dequantized.

        Raises:
            CheckpointError: tensors that do not fit the config, or cannot be read.
        """
        self.check()
        model = build_model(self.config, dtype)
        for name, weight in self.weights.items():
            if put is not None and weight.packed is not None:
                put(model, name.removesuffix(".weight"), weight.packed(), device)
        if put is not None:  # rounding left more behind, among the packed weights, than they take themselves
            release_freed_memory()
        names = [name for name, _ in model.named_parameters()]  # a tied head has no name of its own
        tensors = {name: self._tensor(name, dtype, device) for name in names}
        model.load_state_dict(tensors, strict=False, assign=True)  # not strict: a tied head is stored once
        if self.config.tie_embeddings and isinstance(model.embed_tokens, nn.Embedding):
            model.lm_head.weight = model.embed_tokens.weight
        return model.eval()

    @property
    def quantized(self) -> bool:
        """Whether tensors are stored in blocks of integers, so that the dtype they are read in means nothing."""
        return not {kind.split()[0] for kind in self.storage.split(", ")} <= {"F64", "F32", "F16", "BF16"}

    def _tensor(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """One tensor for a model to keep: memory of the file is copied, since training writes into parameters."""
        weight = self.weights[name]
        tensor = weight.read()
        return tensor.to(device, dtype, copy=tensor.dtype == dtype and device.type == "cpu" and not weight.owned)


def rows_missing(tokenizer: Tokenizer, config: ModelConfig) -> list[str]:
    """What is wrong with a tokenizer of more ids than the embedding has rows; nothing when each has one."""
    ids, rows = tokenizer.vocab_size, config.vocab_size
    return [f"{ids:,} token ids over {rows:,} rows of embedding"] * (ids > rows)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every stored tensor by our names; a tied head is stored once, as the embedding."""
    one = build_model(config.model_copy(update={"n_layers": 1})).named_parameters()  # all layers are alike
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in one:
        layers = range(config.n_layers) if name.startswith("layers.0.") else [0]
        shapes |= {name.replace("layers.0.", f"layers.{i}."): tuple(parameter.shape) for i in layers}
    if config.tie_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes
