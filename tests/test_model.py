"""The Transformer against transformers' LlamaForCausalLM, and the fast operations against their oracles."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from puna.checkpoint.names import from_disk_name, to_hf_config
from puna.model.config import ModelConfig, RopeScaling, count_parameters
from puna.model.init import build_model, init_weights, materialize
from puna.model.presets import PRESETS
from puna.model.transformer import Transformer
from puna.ops.attention import attention, attention_eager
from puna.ops.cross_entropy import IGNORE, linear_cross_entropy, linear_cross_entropy_eager
from puna.ops.norm import RMSNorm
from puna.ops.rope import rope_frequencies, scale_frequencies

CPU = torch.device("cpu")
BASE = {
    "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "head_dim": 8, "ffn_dim": 48, "vocab_size": 97,
    "max_seq_len": 64, "rope_theta": 10000.0, "rope_scaling": None, "norm_eps": 1e-6, "tie_embeddings": False,
}  # fmt: skip
SCALING = {"original_max_seq_len": 32, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = {
    "llama1 mha": {},
    "llama2 gqa": {"n_kv_heads": 2, "norm_eps": 1e-5},
    "llama3 mqa": {"n_kv_heads": 1, "rope_theta": 500000.0},
    "llama3.1 scaling 8": {"n_kv_heads": 2, "rope_theta": 500000.0, "rope_scaling": RopeScaling(factor=8, **SCALING)},
    "llama3.2 tied, scaling 32": {
        "n_kv_heads": 2, "tie_embeddings": True, "rope_theta": 500000.0,
        "rope_scaling": RopeScaling(factor=32, **SCALING),
    },
    "explicit head_dim": {"head_dim": 16, "n_kv_heads": 2, "tie_embeddings": True},
}  # fmt: skip


def build(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> Transformer:
    """A model with no zero matrices, so that every parameter matters."""
    model = build_model(config, dtype)
    materialize(model, CPU, dtype)
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return model


def reference(model: Transformer) -> transformers.LlamaForCausalLM:
    """transformers' model with the same weights."""
    config = transformers.LlamaConfig(**to_hf_config(model.config, torch.float64, 1, [2]))
    config._attn_implementation = "sdpa"
    theirs = transformers.LlamaForCausalLM(config).to(next(model.parameters()).dtype)
    missing, unexpected = theirs.load_state_dict(
        {f"model.{n}" if not n.startswith("lm_head") else n: p for n, p in model.state_dict().items()}, strict=False
    )
    assert not missing
    assert not unexpected
    return theirs


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_transformers(case: str, exact_norm: None) -> None:
    """A wrong head order, RoPE scaling, eps or tie changes the loss a little and the model for good."""
    model = build(ModelConfig(**{**BASE, **CASES[case]}), torch.float64)
    theirs = reference(model)
    tokens = torch.randint(0, 97, (3, 50), generator=torch.Generator().manual_seed(1))
    ours_logits, their_logits = model(tokens), theirs(tokens).logits
    assert (ours_logits - their_logits).abs().max() <= 1e-9
    for logits in (ours_logits, their_logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = {from_disk_name(n): p.grad for n, p in theirs.named_parameters()}
    for name, parameter in model.named_parameters():
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-9, name


def test_parameter_counts_equal_the_fact_sheet() -> None:
    """A preset with one wrong width is another model under a known name."""
    expected = {
        "llama-7b": 6738415616, "llama-13b": 13015864320, "llama-33b": 32528943616, "llama-65b": 65285660672,
        "llama2-7b": 6738415616, "llama2-13b": 13015864320, "llama2-34b": 33743970304, "llama2-70b": 68976648192,
        "llama3-8b": 8030261248, "llama3-70b": 70553706496, "llama3.1-8b": 8030261248, "llama3.1-70b": 70553706496,
        "llama3.1-405b": 405853388800, "llama3.2-1b": 1235814400, "llama3.2-3b": 3212749824,
        "llama3.3-70b": 70553706496,
    }  # fmt: skip
    counted = {name: count_parameters(config) for name, config in PRESETS.items()}
    assert {name: counted[name] for name in expected} == expected
    for name in ("llama3.1-8b", "llama3.2-1b", "cria-2m"):  # the formula against the modules, on the meta device
        assert sum(p.numel() for p in build_model(PRESETS[name]).parameters()) == counted[name]


def test_rope_golden_values() -> None:
    """Llama 3.2 needs factor 32 where 3.1 needs 8; the wrong one degrades far beyond the training context only."""
    base = rope_frequencies(128, 5e5)
    by8, by32 = (scale_frequencies(base, factor, 1, 4, 8192) for factor in (8, 32))
    for index, eight, thirtytwo in [(28, 3.21144611e-3, 3.21144611e-3), (29, 2.16657045e-3, 2.11840667e-3),
                                    (34, 1.78507802e-4, 9.70828686e-5), (35, 9.5562129e-5, 2.38905322e-5),
                                    (63, 3.06892588e-7, 7.67231469e-8)]:  # fmt: skip
        assert by8[index].item() == pytest.approx(eight, rel=1e-6)
        assert by32[index].item() == pytest.approx(thirtytwo, rel=1e-6)
    small = scale_frequencies(rope_frequencies(64, 5e5), 32, 1, 4, 8192)
    assert small[[15, 17, 18, 31]].tolist() == pytest.approx(
        [1.29054803e-3, 9.70828686e-5, 1.94616387e-5, 9.4183072e-8]
    )


@pytest.mark.parametrize("masked", [False, True])
def test_fast_attention_equals_the_oracle(masked: bool) -> None:
    """Key heads repeated in the wrong order (tiled, not interleaved) still train."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, 7, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 7, 8, generator=generator, dtype=torch.float64)
    mask = (torch.rand(2, 1, 7, 7, generator=generator) > 0.5) | torch.eye(7, dtype=torch.bool) if masked else None
    assert torch.allclose(attention(q, k, v, mask), attention_eager(q, k, v, mask), atol=1e-12)


@pytest.mark.parametrize("chunk", [8, 50])
def test_chunked_cross_entropy_equals_the_oracle(chunk: int) -> None:
    """The end of a chunk or of a part of one, a masked label, a tied weight: there a hand-made gradient goes wrong."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((123, 5), (11, 5)))
    labels = torch.randint(0, 11, (123,), generator=generator)
    labels[[0, 7, 122]] = IGNORE
    results = []
    for function in (linear_cross_entropy_eager, lambda h, w, t: linear_cross_entropy(h, w, t, chunk=chunk)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = function(h, w, labels)
        (loss / 20).backward()
        results.append((loss.detach(), h.grad, w.grad))
    for ours, oracle in zip(*results, strict=True):
        assert torch.allclose(ours, oracle, atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(linear_cross_entropy(hidden, weight, labels, chunk=chunk), results[0][0])


@pytest.mark.parametrize("trained", [True, False])
def test_chunked_cross_entropy_in_bf16(trained: bool) -> None:
    """More words than are added at a time, more rows than are in fp32 at a time, and two dtypes: what training runs."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(600, 16, generator=generator).bfloat16()
    weight = torch.randn(9000, 16, generator=generator).bfloat16().float()
    labels = torch.randint(0, 9000, (600,), generator=generator)
    results = []
    for function, dtype in ((linear_cross_entropy_eager, torch.float64), (linear_cross_entropy, torch.bfloat16)):
        h = hidden.detach().to(dtype).requires_grad_()
        w = weight.to(torch.promote_types(dtype, torch.float32)).requires_grad_(trained)
        loss = function(h, w, labels)
        loss.backward()
        results.append([loss.detach(), h.grad, *[w.grad] * trained])
    (expected, *oracle), (loss, *ours) = results
    assert abs(loss / expected - 1) < 1e-4
    for gradient, right in zip(ours, oracle, strict=True):
        for part, of in zip(gradient.split(500), right.split(500), strict=True):
            assert (part - of).norm() < 0.02 * of.norm()


def test_norm_is_taken_in_fp32_and_scaled_after_the_cast() -> None:
    """RMSNorm in bf16 throughout costs perplexity that no test of shapes sees."""
    norm = RMSNorm(64, 1e-5)
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16() * 100
    wide = x.float()
    expected = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).bfloat16() * norm.weight.bfloat16()
    assert torch.equal(norm(x), expected)


def test_initial_weights_depend_on_seed_and_name_only() -> None:
    """Weights that depend on the order of creation differ between one device and many."""
    config = ModelConfig(**BASE)
    one, two, other = (build_model(config) for _ in range(3))
    for model, seed in ((one, 1), (two, 1), (other, 2)):
        materialize(model, CPU)
        init_weights(model, seed)
    same = {n: torch.equal(a, b) for (n, a), b in zip(one.named_parameters(), two.parameters(), strict=True)}
    assert all(same.values())
    assert not torch.equal(one.embed_tokens.weight, other.embed_tokens.weight)
    assert not torch.equal(one.layers[0].self_attn.q_proj.weight, one.layers[1].self_attn.q_proj.weight)


def test_bf16_compute_keeps_fp32_gradients() -> None:
    """Gradients in bf16 round away small updates over many micro-batches."""
    model = build(ModelConfig(**BASE))
    model.compute_dtype = torch.bfloat16
    out = model(torch.arange(12)[None])
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
