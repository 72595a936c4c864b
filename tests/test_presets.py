"""Every published Llama is a row; each row against the fact sheet, and its long context against transformers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from test_model import BASE, ModelConfig, RopeScaling, build, reference

from puna.model.config import count_parameters
from puna.model.init import build_model
from puna.model.presets import PRESETS
from puna.ops.rope import rope_frequencies, scale_frequencies

# name: parameters, eps, theta, RoPE factor, vocabulary, context, tied
SHEET = {
    "llama-7b": (6738415616, 1e-6, 1e4, None, 32000, 2048, False),
    "llama-13b": (13015864320, 1e-6, 1e4, None, 32000, 2048, False),
    "llama-33b": (32528943616, 1e-6, 1e4, None, 32000, 2048, False),
    "llama-65b": (65285660672, 1e-5, 1e4, None, 32000, 2048, False),
    "llama2-7b": (6738415616, 1e-5, 1e4, None, 32000, 4096, False),
    "llama2-13b": (13015864320, 1e-5, 1e4, None, 32000, 4096, False),
    "llama2-34b": (33743970304, 1e-5, 1e4, None, 32000, 4096, False),
    "llama2-70b": (68976648192, 1e-5, 1e4, None, 32000, 4096, False),
    "llama3-8b": (8030261248, 1e-5, 5e5, None, 128256, 8192, False),
    "llama3-70b": (70553706496, 1e-5, 5e5, None, 128256, 8192, False),
    "llama3.1-8b": (8030261248, 1e-5, 5e5, 8, 128256, 131072, False),
    "llama3.1-70b": (70553706496, 1e-5, 5e5, 8, 128256, 131072, False),
    "llama3.1-405b": (405853388800, 1e-5, 5e5, 8, 128256, 131072, False),
    "llama3.2-1b": (1235814400, 1e-5, 5e5, 32, 128256, 131072, True),
    "llama3.2-3b": (3212749824, 1e-5, 5e5, 32, 128256, 131072, True),
    "llama3.3-70b": (70553706496, 1e-5, 5e5, 8, 128256, 131072, False),
}
# Key/value bytes a token in bf16, which depend on layers, key heads and head_dim alone.
CACHE = {
    "llama-7b": 524288, "llama-13b": 819200, "llama-33b": 1597440, "llama-65b": 2621440, "llama2-34b": 196608,
    "llama2-70b": 327680, "llama3-8b": 131072, "llama3.1-405b": 516096, "llama3.2-1b": 32768, "llama3.2-3b": 114688,
}  # fmt: skip


@pytest.mark.parametrize("name", SHEET)
def test_a_row_is_the_model_it_names(name: str) -> None:
    """One wrong width, eps or factor is another model under a known name; the model itself is built and counted."""
    parameters, eps, theta, factor, vocabulary, context, tied = SHEET[name]
    row = PRESETS[name]
    scaling = factor and RopeScaling(
        factor=factor, low_freq_factor=1, high_freq_factor=4, original_max_seq_len=8192
    )  # fmt: skip
    assert (row.norm_eps, row.rope_theta, row.rope_scaling) == (eps, theta, scaling)
    assert (row.vocab_size, row.max_seq_len, row.tie_embeddings) == (vocabulary, context, tied)
    assert row.head_dim * row.n_heads == row.dim
    model = build_model(row)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters()) == count_parameters(row) == parameters
    if name in CACHE:
        assert 2 * 2 * row.n_layers * row.n_kv_heads * row.head_dim == CACHE[name]


def test_no_row_is_unchecked() -> None:
    """A Llama that is added without its facts would be believed."""
    assert {n for n in PRESETS if not n.startswith("cria-")} == set(SHEET)


@pytest.mark.parametrize(
    ("name", "kept", "blended", "golden"),
    [("llama3.1-8b", 28, 34, {28: 3.21144611e-3, 29: 2.16657045e-3, 34: 1.78507802e-4, 35: 9.5562129e-5,
                              63: 3.06892588e-7}),
     ("llama3.2-3b", 28, 34, {28: 3.21144611e-3, 29: 2.11840667e-3, 34: 9.70828686e-5, 35: 2.38905322e-5,
                              63: 7.67231469e-8}),
     ("llama3.2-1b", 14, 17, {15: 1.29054803e-3, 17: 9.70828686e-5, 18: 1.94616387e-5, 31: 9.4183072e-8})],
)  # fmt: skip
def test_frequencies_of_the_rows(name: str, kept: int, blended: int, golden: dict[int, float]) -> None:
    """The model must really scale by its row: 3.2 with 3.1's factor degrades only near 80,000 tokens."""
    found, row = build_model(PRESETS[name].model_copy(update={"n_layers": 1})).frequencies, PRESETS[name]
    assert row.rope_scaling is not None
    base = rope_frequencies(row.head_dim, row.rope_theta)
    assert torch.equal(found, scale_frequencies(base, **row.rope_scaling.model_dump()))
    assert {i: found[i].item() for i in golden} == pytest.approx(golden, rel=1e-6)
    same = [i for i in range(len(base)) if torch.isclose(found[i], base[i], rtol=1e-6)]
    divided = [i for i in range(len(base)) if torch.isclose(found[i], base[i] / row.rope_scaling.factor, rtol=1e-6)]
    assert same == list(range(kept + 1))
    assert divided == list(range(blended + 1, len(base)))


@pytest.mark.parametrize("factor", [8, 32])
def test_long_context_equals_transformers(factor: int, exact_norm: None) -> None:
    """Scaling matters beyond the original 8192 tokens, where no short test looks."""
    scaling = RopeScaling(factor=factor, low_freq_factor=1, high_freq_factor=4, original_max_seq_len=8192)
    shape = {"n_heads": 1, "n_kv_heads": 1, "head_dim": 32, "n_layers": 1, "max_seq_len": 131072, "rope_theta": 5e5}
    model = build(ModelConfig(**{**BASE, **shape, "rope_scaling": scaling}), torch.float64)
    theirs = reference(model)
    assert isinstance(theirs, transformers.LlamaForCausalLM)
    tokens = torch.randint(0, 97, (1, 9000), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours, wanted = model(tokens)[0, -64:], theirs(tokens, logits_to_keep=64).logits[0]
        unscaled = build(ModelConfig(**{**BASE, **shape}), torch.float64)(tokens)[0, -64:]
    assert (ours - wanted).abs().max() <= 1e-9
    assert (unscaled - wanted).abs().max() > 1e-3  # the length at which the scaling shows


def test_models_that_are_there_are_listed(tmp_path: Path) -> None:
    """`ls models` is where a user looks for what `puna chat` takes: presets have no weights, these have."""
    home = tmp_path / "models--org--name"
    (home / "refs").mkdir(parents=True)
    (home / "refs/main").write_text("a" * 40)
    (home / "snapshots" / ("a" * 40)).mkdir(parents=True)
    (home / "snapshots" / ("a" * 40) / "config.json").write_text("{}")
    words = [sys.executable, "-m", "puna", "ls", "models", "--json"]
    environment = {"HF_HUB_CACHE": str(tmp_path), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert {"smollm2-135m", "org/name", *PRESETS} == set(rows)
    assert all(rows[name]["parameters"] == SHEET[name][0] for name in SHEET)
    assert "cache" in rows["org/name"]["summary"]
