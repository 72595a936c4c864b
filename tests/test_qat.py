"""Training under rounding: what is trained is what `puna quantize` writes, with an adapter or without."""

# ruff: noqa: F811 (a fixture that is imported)

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from command_line import puna_forked
from test_methods import conversations, models, words_of  # noqa: F401 (a fixture)
from test_model import build
from test_quantize import IDS, TEXT, TIED, UNTIED

import puna
from puna.data.loader import Batch
from puna.errors import UsageError
from puna.eval.certificate import quantize
from puna.lora import LoraConfig, add_lora, lora_layers, lora_parameters, merge_lora
from puna.model.config import ModelConfig
from puna.model.transformer import Transformer
from puna.ops.packed import dequantize
from puna.ops.packed_layers import packed_layers
from puna.quant.qat import QatConfig, qat_plan, round_layers, round_rows, rounded_linear, rounded_linear_eager
from puna.quant.qat import rounded_product as product
from puna.quant.quantize import pack_layers, quantize_model
from puna.quant.schemes import Kind, scheme, scheme_for, trained_scheme
from puna.recipes import run, sft
from puna.train.objectives import next_token
from puna.tune.model import load_tuned


def born(config: ModelConfig) -> Transformer:
    """fp32 weights, of which embedding and norms are such as bf16 holds: saving those rounds in every training."""
    model = build(config, torch.float32)
    for name, parameter in model.named_parameters():
        if "_proj" not in name and name != "lm_head.weight":
            parameter.data = parameter.data.bfloat16().float()
    return model


def trained(model: Transformer, config: QatConfig, stored: torch.dtype = torch.bfloat16) -> Transformer:
    round_layers(model, qat_plan(model, config), stored)
    return model


def quantized(model: Transformer, config: QatConfig) -> Transformer:
    """As `puna quantize` makes it of the model saved in bf16."""
    saved = model.to(torch.bfloat16).float()
    pack_layers(saved, qat_plan(saved, config))
    return saved


@pytest.mark.parametrize("name", ["int8-int4", "int4"])
@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_it_computes_what_quantizing_makes(name: Any, config: ModelConfig) -> None:
    """A head that is left out, a tied one whose embedding is rounded, scales chosen by another rule: other logits."""
    qat = QatConfig(scheme=name)
    model, twin = trained(born(config), qat), quantized(born(config), qat)
    logits, expected = model(IDS), twin(IDS)
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (born(config)(IDS) - expected).abs().max() > 1e-2 * expected.abs().max()
    hidden = model(IDS, head=False)  # as losses take it
    assert torch.equal(hidden @ model.lm_head.weight.T, logits)
    assert torch.equal(model.embed_tokens(IDS), born(config).embed_tokens(IDS))


@pytest.mark.parametrize("kind", [Kind(4, 32, "int8", searched=False), Kind(4, 64, searched=False), Kind(8, 0, "int8")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_pass_straight_through(kind: Kind, dtype: torch.dtype) -> None:
    """The derivative of rounding is zero: without care nothing is learned, or the weight learns of unrounded inputs."""
    generator = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(*s, generator=generator).to(dtype) for s in ((3, 5, 128), (48, 128), (3, 5, 48)))
    found = []
    for function in (rounded_linear, rounded_linear_eager):
        inputs = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = function(*inputs, kind, torch.float32)
        found.append((y.detach(), *torch.autograd.grad(y, inputs, dy)))
    rounded, seen = dequantize(kind.pack(w)).to(dtype), x if kind.activations == "float" else round_rows(x)
    by_hand = seen @ rounded.T, dy @ rounded, dy.flatten(0, 1).T @ seen.flatten(0, 1)
    near = 1e-6 if dtype == torch.float64 else 0.02
    for ours, oracle, expected in zip(*found, by_hand, strict=True):
        assert (ours - expected).norm() <= near * expected.norm()
        assert (oracle - expected).norm() <= near * expected.norm()


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_is_rounded_with_its_base(dora: bool) -> None:
    """Rounded apart, base and adapter are not what is left after merging and quantizing."""
    config, qat = LoraConfig(rank=4, dora=dora), QatConfig(group=64)

    def adapted() -> Transformer:
        model = born(UNTIED)
        add_lora(model, config)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in lora_parameters(model).items():
            if "lora_A" not in name:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        return model

    model, plan = adapted(), qat_plan(born(UNTIED), qat)
    layers = lora_layers(model)
    assert len(layers) == 14
    for name, layer in layers.items():
        layer.product = product(plan.pop(name), torch.bfloat16)
    round_layers(model, plan, torch.bfloat16)
    merged = adapted()
    merge_lora(merged)
    expected = quantized(merged, qat)(IDS)
    logits = model(IDS)
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    batch = Batch(IDS[:, :-1], IDS[:, 1:], 7)
    next_token(model, batch).sum.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(grads) == 14 * (2 + dora)
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads.values())


def test_training_lowers_the_loss_of_the_quantized_model() -> None:
    """What all this is for: after as many steps, what was trained under rounding is the better 4-bit model."""
    ids = torch.randint(0, 64, (8, 33), generator=torch.Generator().manual_seed(0))
    batch, qat = Batch(ids[:, :-1], ids[:, 1:], 8 * 32), QatConfig(group=64)

    def steps(model: Transformer, count: int, lr: float) -> Transformer:
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        for step in range(count):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / count)
            (next_token(model, batch).sum / batch.n).backward()
            optimizer.step()
            optimizer.zero_grad()
        return model

    @torch.no_grad()
    def loss(model: Transformer) -> float:
        return float(F.cross_entropy(model(batch.tokens).flatten(0, 1), batch.labels.flatten()))

    first = born(UNTIED)
    for parameter in first.parameters():
        parameter.data *= 0.5
    steps(first, 60, 3e-3)
    plain, rounding = steps(copy.deepcopy(first), 30, 1e-3), steps(trained(copy.deepcopy(first), qat), 30, 1e-3)
    again = born(UNTIED)
    again.load_state_dict(rounding.state_dict())
    kept, searched = loss(quantized(again, qat)), copy.deepcopy(plain)
    quantize_model(searched, scheme("int8-int4", 64))
    best = min(loss(searched), loss(quantized(copy.deepcopy(plain), qat)))
    assert kept == pytest.approx(loss(rounding), rel=1e-2)
    assert loss(plain) < kept < best
    assert kept - loss(plain) < 0.7 * (best - loss(plain))


def test_the_scheme_trained_for_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    """Other groups or scales than those of training, and nothing tells that the training was wasted."""
    caplog.set_level("INFO", "puna")
    told = {"scheme": "int8-int4", "group": 128}
    assert scheme_for(told, "int8-int4", None).linears == trained_scheme("int8-int4", 128).linears
    assert "in groups of 128" in caplog.text
    for name, group in (("int8-int4", 32), ("int4", None), ("nf4", None)):
        caplog.clear()
        assert scheme_for(told, name, group) == scheme(name, group)
        assert "wastes" in caplog.text
    caplog.clear()
    for odd in (None, [], "x", {}, {"scheme": "int8-int4"}):
        assert scheme_for(odd, "int8-int4", None) == scheme("int8-int4")
    assert scheme_for({"scheme": "int8-int4", "group": [7]}, "int8-int4", None) == scheme("int8-int4")
    with pytest.raises(UsageError, match="no scheme"):
        scheme_for(told, "int5", None)


def tuned(method: str, models: Path, folder: Path, **more: Any) -> Path:
    """Four steps at a high rate, through the recipe."""
    words = words_of(method, models, conversations(folder / "rows.jsonl"), folder / "run", dtype="fp32", **more)
    return run("sft", **words, **{"train.optimizer.lr": 0.01, "train.optimizer.warmup_steps": 1})


ENDS = ["embed_tokens", "lm_head"]


@pytest.mark.parametrize("method", ["qat", "qat+lora", "qat+lora, tied ends whole", "qat+lora, ends whole"])
def test_trained_quantized_and_served_say_the_same(
    method: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained under one rounding and shipped under another: merged, quantized by the command line, loaded as stored.

    A head that rounds is no Linear: one trained whole beside adapters was looked for in vain when it was saved.
    """
    held: list[Any] = []
    method, _, whole = method.partition(", ")
    more = {"lora.modules_to_save": ENDS} if whole else {}
    more |= {"model": str(models / "teacher")} if whole == "ends whole" else {}
    monkeypatch.setattr(sft, "load_tuned", lambda *given: held.append(load_tuned(*given)) or held[0])
    final = tuned(method, models, tmp_path, **{"qat.group": 32, "save_dtype": "bf16", **more}) / "final"
    with torch.no_grad():
        for name, parameter in held[0].model.named_parameters():
            if "_proj" not in name:  # saved in bf16, as without qat
                parameter.copy_(parameter.bfloat16())
        expected = held[0].model.eval()(IDS.clamp(max=599))
    source, calls = final, []
    if method == "qat+lora":
        source = tmp_path / "merged"
        calls.append(["merge", final, source])
    calls.append(["quantize", source, tmp_path / "q", "--scheme", "int8-int4", "--json"])
    done = puna_forked(calls, tmp_path)
    assert [call.returncode for call in done] == [0] * len(calls), done[-1].stderr
    certificate = json.loads(done[-1].stdout)
    assert (certificate["group"], certificate["as_trained"]) == (32, True)
    served = puna.load(tmp_path / "q", dtype="fp32", packed=True)
    logits = served.logits(IDS.clamp(max=599))
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert len(packed_layers(served.model)) == 15
    assert json.loads((source / "puna.json").read_text())["trained_for"] == {"scheme": "int8-int4", "group": 32}
    with pytest.raises(UsageError, match="calibration rounds elsewhere"):
        quantize(source, tmp_path / "c", "int8-int4", text=TEXT, calibration=TEXT)


def test_pairs_that_exclude_each_other_are_refused(models: Path, tmp_path: Path) -> None:
    """Told after the model was loaded, or not at all: dropout that is not drawn, a compiled model that is not."""
    for more, told in (
        ({"qat.group": 32, "lora.dropout": 0.1}, "lora.dropout"),
        ({"qat.scheme": "int4", "qat.group": 256}, "no groups of 256"),
        ({"qat.group": 48}, "no groups of 48"),
        ({"qat.group": 32, "compile": True}, "compile"),
    ):
        with pytest.raises(UsageError, match=told):
            run("sft", model="nowhere", output=tmp_path / "run", **more)
    assert not (tmp_path / "run").exists()
    data = conversations(tmp_path / "rows.jsonl")
    with pytest.raises(UsageError, match="adapter on lm_head"):  # it would be trained without the rounding
        run("sft", **words_of("qat+lora", models, data, tmp_path / "run", **{
            "lora.targets": ["q_proj", "lm_head"], "model": str(models / "teacher")}))  # fmt: skip
    with pytest.raises(UsageError, match="not whole groups of 128"):
        run("sft", **words_of("qat", models, data, tmp_path / "run", **{"qat.group": 128}))
