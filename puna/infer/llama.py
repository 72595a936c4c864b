"""The Python API's object: a model with its tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from puna.checkpoint.model_directory import find_model, load_model, save_model
from puna.device import choose_device, choose_dtype
from puna.files import atomic_folder
from puna.infer.generate import generate
from puna.model.transformer import Transformer
from puna.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Llama:
    """A loaded model: `model` is the Transformer, `tokenizer` its tokenizer, `path` where both came from."""

    model: Transformer
    tokenizer: Tokenizer
    path: Path

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of a raw prompt, with BOS where the tokenizer's config asks for it."""
        return [self.tokenizer.bos_id] * self.tokenizer.adds_bos + self.tokenizer.encode(text, special=special)

    @torch.inference_mode()
    def logits(self, ids: Sequence[Sequence[int]] | Tensor) -> Tensor:
        """(B, T) ids -> (B, T, V) fp32 next-token logits; rows have one length."""
        tokens = torch.as_tensor(ids, device=next(self.model.parameters()).device)
        return self.model(tokens).float()

    @overload
    def generate(self, prompt: str, max_tokens: int = 256, **sampling: Any) -> str: ...
    @overload
    def generate(self, prompt: list[str], max_tokens: int = 256, **sampling: Any) -> list[str]: ...
    def generate(self, prompt: str | list[str], max_tokens: int = 256, **sampling: Any) -> str | list[str]:
        """The continuation of raw text, without the prompt. `sampling`: temperature, top_p, seed (see `generate`)."""
        prompts = [prompt] if isinstance(prompt, str) else prompt
        stops = self.tokenizer.stop_ids
        ids = generate(self.model, [self.encode(p) for p in prompts], max_tokens=max_tokens, stop_ids=stops, **sampling)
        texts = [self.tokenizer.decode(row) for row in ids]
        return texts[0] if isinstance(prompt, str) else texts

    def save(self, path: str | Path, dtype: str = "bf16") -> None:
        """Write a model directory that transformers, vLLM and llama.cpp's converter open."""
        with atomic_folder(Path(path)) as folder:
            save_model(folder, self.model, self.tokenizer, dtype, {"parents": [str(self.path)]})


def load(path: str | Path, dtype: str = "auto", device: str = "auto") -> Llama:
    """Load a model directory or a run folder.

    Args:
        dtype: fp32, bf16, fp64, or auto: bf16 where the hardware has native bf16.

    Raises:
        CheckpointError: not a model, or damaged. DataError: its tokenizer cannot be read.
    """
    where = choose_device(device)
    folder = find_model(Path(path).expanduser())
    return Llama(load_model(folder, choose_dtype(dtype, where), where), Tokenizer(folder), folder)
