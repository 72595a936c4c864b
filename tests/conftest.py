"""Shared fixtures. `assets` is the one way to real models and data; without PUNA_TEST_ASSETS its tests skip, loudly."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama

from puna.model.config import ModelConfig, RopeScaling
from puna.recipes import run

torch.set_num_threads(1)  # sums in one order, and tests side by side do not fight over cores

TEXT = """In the high puna the llamas graze. A llama that grazes in the puna does not count the stars; \
the stars count the llamas: 1, 2, 3, 12 and 345.
"Where is the grass?" said the old llama. "It's under the snow," they said, and didn't move.
"""


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real assets named by PUNA_TEST_ASSETS."""
    folder = os.environ.get("PUNA_TEST_ASSETS")
    if not folder:
        pytest.skip("PUNA_TEST_ASSETS is not set: real tokenizers, checkpoints and texts are not tested")
    return Path(folder)


@pytest.fixture(scope="session")
def shape() -> ModelConfig:
    """A tiny Llama 3."""
    return ModelConfig(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=300, max_seq_len=64,
        rope_theta=500000.0, rope_scaling=RopeScaling(factor=8, original_max_seq_len=32), norm_eps=1e-5,
        tie_embeddings=True,
    )  # fmt: skip


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text files, each a little different."""
    folder = tmp_path_factory.mktemp("texts")
    for i in range(40):
        (folder / f"{i:02}.txt").write_text("".join(f"{i} {TEXT}" for _ in range(20)), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with 600 ids, trained by the recipe."""
    output = tmp_path_factory.mktemp("tokenizer") / "bpe"
    return run("tokenizer", **{"output": output, "vocab_size": 600, "sources.path": texts})


@pytest.fixture(scope="session")
def shards(texts: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the texts with a tenth held out, made by the recipe."""
    output = tmp_path_factory.mktemp("data") / "shards"
    words = {"sources.path": texts, "sources.valid_fraction": 0.1}
    return run("data", output=output, tokenizer=tokenizer_folder, **words)


@pytest.fixture
def exact_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers rounds to fp32 inside RMSNorm even in fp64; keep fp64, or parity below 1e-7 is chance."""

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", forward)
