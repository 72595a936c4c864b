"""Every kind of adapter against PEFT: rsLoRA, DoRA, ranks by layer, patterns; and torchtune's row order."""

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_lora import GQA, train_beside_peft
from test_model import build, reference
from torch import Tensor

from puna.checkpoint.adapter import load_adapter, save_adapter
from puna.checkpoint.inspect import inspect
from puna.checkpoint.rope_layout import to_neighbours
from puna.checkpoint.torchtune import from_torchtune
from puna.errors import CheckpointError, UsageError
from puna.lora import LoraConfig, add_lora, lora_layers, lora_parameters, merge_lora
from puna.model.transformer import Transformer
from puna.tokenizer.tokenizer import Tokenizer

TOKENS = torch.randint(0, 97, (2, 30), generator=torch.Generator().manual_seed(1))
KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "both": {"rslora": True, "dora": True, "targets": ["q_proj", "k_proj", "down_proj"]},
    "ranks": {
        "rank_pattern": {"q_proj": 2, r"layers\.[0-9]+\.mlp\.down_proj": 7, "^model.layers.1.mlp.(up|gate)_proj": 5},
        "alpha_pattern": {"layers.1.self_attn.v_proj": 3.5, ".*.o_proj": 40},
        "rslora": True,
    },
    "pattern": {"targets": r"model\.layers\.[01]\.(mlp|self_attn)\.(up|q)_proj", "dora": True},
    "all": {"targets": "all-linear"},
}
WHOLE = {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}


def adapted(config: LoraConfig, seed: int = 3) -> Transformer:
    """A model with adapters that do something: B is not zero, magnitudes are not the rows' lengths."""
    model = build(GQA, torch.float64)
    add_lora(model, config, seed=seed, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in lora_parameters(model).items():
        noise = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = parameter.data + noise if "lora_A" not in name else parameter.data
    return model


def config_of(kind: str, **more: Any) -> LoraConfig:
    return LoraConfig(rank=4, alpha=12, **(WHOLE if kind == "whole" else KINDS[kind]), **more)


def pefts(config: LoraConfig) -> peft.PeftModel:
    """The same adapters by PEFT on transformers' model, with its own random values."""
    return peft.get_peft_model(
        reference(build(GQA, torch.float64)),
        peft.LoraConfig(
            r=config.rank, lora_alpha=config.alpha, target_modules=config.targets, use_rslora=config.rslora,
            use_dora=config.dora, rank_pattern=dict(config.rank_pattern), alpha_pattern=dict(config.alpha_pattern),
            modules_to_save=config.modules_to_save or None, task_type="CAUSAL_LM", init_lora_weights=False,
        ),
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_travels_both_ways(kind: str, exact_norm: None, tokenizer_folder: Path, tmp_path: Path) -> None:
    """PEFT's directory gives its logits here and ours in PEFT; a wrong scale, norm or pattern moves all of them."""
    config = config_of(kind)
    theirs = pefts(config).eval()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = build(GQA, torch.float64)
    loaded = load_adapter(model, tmp_path / "theirs", torch.float64)
    assert (model.eval()(TOKENS) - theirs(TOKENS).logits).abs().max() < 1e-9
    for _, layer in sorted(lora_layers(model).items()):
        layer.lora_A.weight.data *= 1.5  # ours from here on
    expected = model(TOKENS)
    (tmp_path / "ours").mkdir()
    save_adapter(tmp_path / "ours", model, loaded, Tokenizer(tokenizer_folder), "base", {})
    written = {file.name: file.stat().st_mode for file in (tmp_path / "ours").iterdir()}
    assert len(set(written.values())) == 1, written  # weights of 0600, which a server of another user cannot read
    again = peft.PeftModel.from_pretrained(reference(build(GQA, torch.float64)), str(tmp_path / "ours"))
    assert (again(TOKENS).logits - expected).abs().max() < 1e-9
    merge_lora(model)
    assert (model(TOKENS) - expected).abs().max() < 1e-9


@pytest.mark.parametrize("kind", ["rslora", "dora", "both", "ranks", "whole"])
def test_training_steps_equal_pefts(kind: str, exact_norm: None) -> None:
    """A norm that is not detached, or a magnitude that is not trained, is another algorithm with a falling loss."""
    config = config_of(kind)
    train_beside_peft(adapted(config), pefts(config), 20)


def test_dropout_under_dora_is_pefts(exact_norm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchtune drops the adapter's input alone, PEFT and the official code also what DoRA adds to W x."""
    monkeypatch.setattr(F, "dropout", lambda x, p, training=True, inplace=False: x * torch.linspace(0, 2, x.shape[-1]))
    config = config_of("dora", dropout=0.5)
    model, theirs = adapted(config).train(), pefts(config).train()
    for name, layer in lora_layers(model).items():
        other = theirs.base_model.model.get_submodule(f"model.{name}")
        other.lora_dropout["default"] = torch.nn.Dropout(0.5)
        with torch.no_grad():
            other.lora_A["default"].weight.copy_(layer.lora_A.weight)
            other.lora_B["default"].weight.copy_(layer.lora_B.weight)
            other.lora_magnitude_vector["default"].weight.copy_(layer.lora_magnitude_vector)
    assert (model(TOKENS) - theirs(TOKENS).logits).abs().max() < 1e-9


def test_dora_changes_nothing_before_the_first_step() -> None:
    """Magnitudes that are made before the weights are loaded, and rows of zeros, whose direction is 0 / 0."""
    plain, model = build(GQA, torch.float64), build(GQA, torch.float64)
    for each in (plain, model):
        each.layers[0].mlp.up_proj.weight.data[3] = 0
    add_lora(model, config_of("dora"), dtype=torch.float64)
    assert (plain(TOKENS) - model(TOKENS)).abs().max() < 1e-12


def test_patterns_that_name_nothing_or_never_end() -> None:
    """An adapter on no layer trains nothing; a pattern in a downloaded config must not hang whoever reads it."""
    for targets in ("mlp", "(x+x+)+y", "[", ["q_prj"]):
        with pytest.raises(UsageError, match="lora"):
            add_lora(build(GQA), LoraConfig(targets=targets))


def test_an_adapter_of_a_tied_head_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Merged into the head, it is in the embedding too: another model than the one that was trained."""
    tied = GQA.model_copy(update={"tie_embeddings": True})
    for targets in (["lm_head"], ["q_proj", "lm_head"], ".*"):
        config = LoraConfig(targets=targets)
        with pytest.raises(UsageError, match="lm_head is tied"):
            add_lora(build(tied), config)
        add_lora(untied := build(GQA), config)
        save_adapter(tmp_path, untied, config, Tokenizer(tokenizer_folder), "base", {})
        with pytest.raises(CheckpointError, match="lm_head is tied"):
            load_adapter(build(tied), tmp_path)


def test_files_of_adapters_are_trusted_in_nothing(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Of two tensors that get one name the last won; a link led out of the folder; 16 MB of header took 7.7 s."""
    config = config_of("all")
    save_adapter(tmp_path, adapted(config), config, Tokenizer(tokenizer_folder), "base", {})
    weights = tmp_path / "adapter_model.safetensors"
    sound = load_file(weights)
    name = next(iter(sound))
    save_file({**sound, name.removeprefix("base_model.model."): sound[name] + 1}, weights)
    refused = {"under two names": weights.read_bytes(), "header of 16777216 bytes": (2**24).to_bytes(8, "little")}
    refused["header of 16777216 bytes"] += b"{" + b" " * (2**24 - 2) + b"}"
    for told, content in refused.items():
        weights.write_bytes(content)
        with pytest.raises(CheckpointError, match=told):
            load_adapter(build(GQA), tmp_path)
    assert "header of 16777216 bytes" in inspect(tmp_path)["weights"]
    (tmp_path / "elsewhere").mkdir()
    save_file(sound, tmp_path / "elsewhere/a.safetensors")
    weights.unlink()
    weights.symlink_to(tmp_path / "elsewhere/a.safetensors")
    with pytest.raises(CheckpointError, match="leads outside the folder"):
        load_adapter(build(GQA), tmp_path)
    assert "leads outside the folder" in inspect(tmp_path)["weights"]


def neighbours_logits(model: Transformer, tokens: Tensor) -> Tensor:
    """Logits with RoPE as Meta and torchtune turn it: elements 2i and 2i + 1 of a head as one complex number."""

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.complex(cos.to(x.dtype), sin.to(x.dtype))).flatten(-2)

    import puna.model.transformer as place

    kept, place.apply_rope = place.apply_rope, turned
    try:
        return model(tokens)
    finally:
        place.apply_rope = kept


THEIRS = {
    "self_attn.o_proj": "attn.output_proj", "self_attn.": "attn.", "mlp.gate_proj": "mlp.w1", "mlp.down_proj": "mlp.w2",
    "mlp.up_proj": "mlp.w3", "lm_head": "output", "lora_A": "lora_a", "lora_B": "lora_b",
    "lora_magnitude_vector": "magnitude",
}  # fmt: skip


def as_torchtune_saves(tensors: dict[str, Tensor], head_dim: int) -> dict[str, Tensor]:
    """Its names, and rows of query and key in Meta's order."""
    saved = {}
    for name, tensor in tensors.items():
        turned = re.search("[qk]_proj.lora_(B|magnitude)", name)
        for ours, theirs in THEIRS.items():
            name = name.replace(ours, theirs)
        saved[name] = to_neighbours(tensor, head_dim) if turned else tensor
    return saved


@pytest.mark.parametrize("kind", ["rslora", "dora"])
def test_torchtunes_adapters_keep_their_logits(kind: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    """An adapter in Meta's row order on a base in Meta's row order says what ours says on ours, magnitude and all."""
    config = config_of(kind)
    model = adapted(config).eval()
    expected = model(TOKENS)
    ours = {n: p.detach().clone() for n, p in lora_parameters(model).items()}
    theirs = as_torchtune_saves(ours, GQA.head_dim)
    assert "layers.1.attn.q_proj.lora_a.weight" in theirs
    assert "layers.1.mlp.w2.lora_b.weight" in theirs
    assert all(torch.equal(ours[n], t) for n, t in from_torchtune(theirs, GQA.head_dim).items())
    # their model: base rows and adapter rows as Meta orders them, computed as Meta computes them
    meta = adapted(config).eval()
    layers = {name: layer for name, layer in lora_layers(meta).items() if re.search("[qk]_proj$", name)}
    for name, layer in layers.items():
        part = name.replace("self_attn", "attn")
        layer.base.weight.data = to_neighbours(layer.base.weight.data, GQA.head_dim)
        layer.lora_B.weight.data = theirs[f"{part}.lora_b.weight"]
        if config.dora:
            layer.lora_magnitude_vector.data = theirs[f"{part}.magnitude"]
    assert (neighbours_logits(meta, TOKENS) - expected).abs().max() < 1e-9
    # and their file opened here
    save_adapter(tmp_path, model, config, Tokenizer(tokenizer_folder), "base", {})
    save_file(theirs, tmp_path / "adapter_model.safetensors")
    again = build(GQA, torch.float64)
    load_adapter(again, tmp_path, torch.float64)
    assert (again.eval()(TOKENS) - expected).abs().max() < 1e-9


def test_meta_rows_are_checked_by_themselves() -> None:
    """The oracle of the test above must itself notice rows in the wrong order."""
    model = build(GQA, torch.float64)
    assert (neighbours_logits(model, TOKENS) - model(TOKENS)).abs().max() > 1e-2


def test_a_pickled_adapter_is_refused_with_a_way_out(tokenizer_folder: Path, tmp_path: Path) -> None:
    """What an old PEFT left: reading it can run code, so a converter is named instead of "no such file"."""
    model = adapted(config_of("all"))
    save_adapter(tmp_path, model, config_of("all"), Tokenizer(tokenizer_folder), "base", {})
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == [
        f"model.{name}" for name in lora_layers(model)
    ]
    weights = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(weights), tmp_path / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(CheckpointError, match="pickle") as caught:
        load_adapter(build(GQA), tmp_path)
    assert "weights_only=True" in caught.value.fix
