"""Hugging Face directories of every make: loaded as transformers loads them, or refused by name."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_model import BASE, CASES, CPU, ModelConfig, build

import puna
from puna.checkpoint.model_directory import save_model
from puna.checkpoint.registry import open_model
from puna.checkpoint.stored import Stored, Weight, expected_shapes
from puna.checkpoint.stored_directory import open_model_directory, write_model_directory
from puna.checkpoint.weight_files import write_weights
from puna.errors import CheckpointError
from puna.model.init import build_model
from puna.tokenizer.tokenizer import Tokenizer

LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
SHAPE = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "hidden_act": "silu", "torch_dtype": "float64",
}  # fmt: skip
WITHOUT = object()
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "llama 1: no key heads, no theta": {"num_key_value_heads": WITHOUT, "rope_theta": WITHOUT, "rms_norm_eps": 1e-6},
    "nothing optional": dict.fromkeys(
        ("num_key_value_heads", "rope_theta", "rms_norm_eps", "max_position_embeddings", "hidden_act", "architectures",
         "tie_word_embeddings", "torch_dtype"), WITHOUT),
    "nulls": {"num_key_value_heads": None, "head_dim": None, "rope_scaling": None, "sliding_window": None,
              "quantization_config": None},
    "llama3 scaling, old keys": {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "llama3 scaling, older key": {"rope_scaling": {"type": "llama3", **LLAMA3}},
    "llama3 scaling, new keys": {"rope_theta": WITHOUT,
                                 "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}},
    "new keys, no scaling": {"rope_theta": WITHOUT, "rope_parameters": {"rope_type": "default", "rope_theta": 7e5}},
    "both spellings": {"rope_scaling": {"rope_type": "llama3", **LLAMA3},
                       "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}},
    "default scaling": {"rope_scaling": {"type": "default"}},
    "factor 32": {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "factor": 32}},
    "wide heads": {"head_dim": 16},
    "narrow heads": {"head_dim": 4, "num_key_value_heads": 1},
    "pretraining_tp": {"pretraining_tp": 2},
    "new dtype key": {"torch_dtype": WITHOUT, "dtype": "float64"},
    "tied": {"tie_word_embeddings": True},
    "whole numbers": {"rope_theta": 500000, "rope_scaling": {"rope_type": "llama3", **LLAMA3, "factor": 8}},
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mistral": ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "mistral.*puna reads llama"),
    "qwen2": ({"model_type": "qwen2"}, "qwen2"),
    "no model_type": ({"model_type": WITHOUT}, "None"),
    "a reward model": ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    "attention biases": ({"attention_bias": True}, "attention_bias"),
    "MLP biases": ({"mlp_bias": True}, "mlp_bias"),
    "GPTQ": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config(.|\n)*GGUF"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "a mixture of experts": ({"num_local_experts": 8}, "num_local_experts"),
    "sliding window": ({"sliding_window": 4096}, "sliding_window"),
    "softcapping": ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    "softcapping of logits": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "partial rotary, new": ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial"),
    "code of its own": ({"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "auto_map"),
    "linear scaling": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear' is not supported"),
    "dynamic scaling": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn' is not supported"),
    "longrope": ({"rope_parameters": {"rope_type": "longrope"}}, "'longrope' is not supported"),
    "RoPE by layer type": ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
    "half a scaling": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "without low_freq_factor"),
    "two thetas": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "contradict"),
    "two scalings": ({"rope_scaling": {"rope_type": "llama3", **LLAMA3},
                      "rope_parameters": {"rope_type": "llama3", **LLAMA3, "factor": 32.0}}, "contradict"),
    "a theta in quotes": ({"rope_theta": "500000.0"}, "rope_theta is '500000.0'"),
    "a theta in quotes, new": ({"rope_parameters": {"rope_theta": "1e6"}}, "rope_theta is '1e6'"),
    "a theta of zero": ({"rope_theta": 0}, "rope_theta is 0"),
    "a theta that is true": ({"rope_theta": True}, "rope_theta is True"),
    "no width": ({"hidden_size": WITHOUT}, "missing: hidden_size"),
}  # fmt: skip


def directory(folder: Path, change: dict[str, Any]) -> Path:
    """A directory whose weights fit `change`d shapes, written by transformers' side of the border."""
    values = {k: v for k, v in {**SHAPE, **change}.items() if v is not WITHOUT}
    heads = values["num_attention_heads"]
    config = ModelConfig(
        dim=32, n_layers=2, n_heads=heads, n_kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or 32 // heads, ffn_dim=48, vocab_size=97, max_seq_len=64, rope_theta=1.0,
        rope_scaling=None, norm_eps=1e-5, tie_embeddings=values.get("tie_word_embeddings", False),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    tensors = {
        n if n.startswith("lm_head") else f"model.{n}": torch.randn(s, generator=generator, dtype=torch.float64) * 0.2
        for n, s in expected_shapes(config).items()
    }
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def their_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    return transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float64)(tokens).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_gives_the_logits_of_transformers(variant: str, tmp_path: Path, exact_norm: None) -> None:
    """A default that is taken differently is a model that is a little stupid, under its right name."""
    folder = directory(tmp_path / "m", VARIANTS[variant])
    tokens = torch.randint(0, 97, (2, 60), generator=torch.Generator().manual_seed(1))
    ours = open_model_directory(folder).load(torch.float64, CPU)(tokens)
    theirs = their_logits(folder, tokens)
    assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()


@pytest.mark.parametrize("variant", REFUSED)
def test_what_is_computed_otherwise_is_refused_by_name(variant: str, tmp_path: Path) -> None:
    """A key that is overlooked loads a model that nobody trained."""
    change, said = REFUSED[variant]
    directory(folder := tmp_path / "m", {})
    values = {k: v for k, v in {**SHAPE, **change}.items() if v is not WITHOUT}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=said):
        open_model_directory(folder)


def test_biases_nobody_announced_are_refused(tmp_path: Path) -> None:
    """Old files have biases and a config.json without the keys."""
    folder = directory(tmp_path / "m", {})
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected layers\.0\.self_attn\.q_proj\.bias"):
        open_model_directory(folder).check()


def test_buffers_of_old_files_are_passed_over(tmp_path: Path, exact_norm: None) -> None:
    """Files of 2023 carry `rotary_emb.inv_freq`."""
    folder = directory(tmp_path / "m", {})
    tensors = load_file(folder / "model.safetensors")
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) * i for i in range(2)}
    save_file({**tensors, **old}, folder / "model.safetensors", {"format": "pt"})
    tokens = torch.arange(20)[None]
    ours = open_model_directory(folder).load(torch.float64, CPU)(tokens)
    assert (ours - their_logits(folder, tokens)).abs().max() <= 1e-9


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(tmp_path: Path) -> None:
    """Some writers store it twice; one that differs was trained untied, and dropping it loses the training."""
    folder = directory(tmp_path / "m", {"tie_word_embeddings": True})
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding.clone()}, folder / "model.safetensors", {"format": "pt"})
    model = open_model_directory(folder).load(torch.float64, CPU)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, embedding)
    save_file({**tensors, "lm_head.weight": embedding + 1}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="another matrix"):
        open_model_directory(folder).load(torch.float64, CPU)


def test_pickled_weights_are_read_as_data(tmp_path: Path) -> None:
    """An old model has nothing but pytorch_model.bin; a directory opened without a reader for it must say so."""
    folder = directory(tmp_path / "m", {})
    sound = open_model_directory(folder).load(torch.float64, CPU).state_dict()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    found = open_model(folder).load(torch.float64, CPU).state_dict()
    assert all(torch.equal(found[n], t) for n, t in sound.items())
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        open_model_directory(folder)


def test_stop_ids_of_config_json_count(tmp_path: Path) -> None:
    """Without a generation_config.json, transformers stops at what config.json lists."""
    folder = directory(tmp_path / "m", {"eos_token_id": [2, 7]})
    assert open_model_directory(folder).stop_ids == [2, 7]
    (folder / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert open_model_directory(folder).stop_ids == [5]


@pytest.mark.parametrize("ids", ["97", "[2, 1000000000000]", str(10**30), "-1", "true", '"2"', "[[2]]"])
def test_stop_ids_that_cannot_be_are_refused(ids: str, tmp_path: Path) -> None:
    """`puna inspect` and the conversion to GGUF ended in an OverflowError and a struct.error."""
    folder = directory(tmp_path / "m", {})
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {ids}}}')
    with pytest.raises(CheckpointError, match=r"eos_token_id is (.|\n)*whole numbers below 97"):
        open_model_directory(folder)


@pytest.fixture(scope="module")
def written(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An fp32 directory of ours, tied and scaled, in several shards."""
    folder = tmp_path_factory.mktemp("written")
    config = ModelConfig(**{**BASE, **CASES["llama3.2 tied, scaling 32"], "vocab_size": 600})
    save_model(folder, build(config), Tokenizer(tokenizer_folder), "fp32", {"recipe": "x"}, [7])
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weights = {n: Weight(tuple(t.shape), t.dtype, partial(whole.get, n)) for n, t in whole.items()}
    write_weights(folder, weights, lambda name: None, shard_bytes=40_000)
    return folder


def same(a: Stored, b: Stored) -> bool:
    return a.weights.keys() == b.weights.keys() and all(
        torch.equal(a.weights[n].read(), b.weights[n].read()) for n in a.weights
    )


def test_a_directory_is_written_as_it_was(written: Path, tmp_path: Path) -> None:
    """Opening and writing must lose nothing: shards, stop ids, tokenizer, scaling, tie."""
    source = open_model_directory(written)
    assert len(source.files) == 3
    seen: list[str] = []
    (target := tmp_path / "out").mkdir()
    write_model_directory(source, target, None, {"format": 1}, seen.append)
    copy = open_model_directory(target)
    assert same(source, copy)
    assert (copy.config, copy.storage, copy.stop_ids) == (source.config, "F32", source.stop_ids)
    assert len(seen) == len(source.weights)
    names = ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json")
    assert all((target / n).read_bytes() == (written / n).read_bytes() for n in names)
    assert copy.lineage == {"format": 1, "tokenizer": source.read_tokenizer().fingerprint}
    tokens = torch.arange(50)[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(target), dtype=torch.float32)(tokens).logits
    assert (puna.load(target, dtype="fp32").logits(tokens) - theirs).abs().max() < 1e-5


@pytest.mark.parametrize(("dtype", "name"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp64", "float64")])
def test_a_dtype_that_is_asked_for(written: Path, tmp_path: Path, dtype: str, name: str) -> None:
    """config.json names the dtype that readers load in: it must be that of the tensors."""
    (target := tmp_path / "out").mkdir()
    write_model_directory(open_model_directory(written), target, dtype, {}, lambda name: None)
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == name
    with safe_open(target / "model.safetensors", "pt") as file:
        wanted, norm = getattr(torch, name), file.get_tensor("model.norm.weight")
    assert norm.dtype == wanted
    assert torch.equal(norm, open_model_directory(written).weights["norm.weight"].read().to(wanted))


def test_a_quantized_model_is_written_in_bf16(written: Path, tmp_path: Path) -> None:
    """Four bits that were read as fp32 are no reason for a file of eight times their size."""
    source = open_model_directory(written)
    quantized = Stored(**{**vars(source), "storage": "Q4_1 x 210, F32 x 61"})
    (target := tmp_path / "out").mkdir()
    write_model_directory(quantized, target, None, {}, lambda name: None)
    assert open_model_directory(target).storage == "BF16"
    assert open_model_directory(target).config == source.config


def test_a_model_that_does_not_fit_is_not_written(written: Path, tmp_path: Path) -> None:
    """A conversion that leaves tensors out looks like a success."""
    source = open_model_directory(written)
    weights = {n: w for n, w in source.weights.items() if n != "norm.weight"}
    with pytest.raises(CheckpointError, match=r"missing norm\.weight"):
        write_model_directory(Stored(**{**vars(source), "weights": weights}), tmp_path, None, {}, lambda name: None)
    assert not list(tmp_path.iterdir())


def test_a_missing_shard_is_named(written: Path, tmp_path: Path) -> None:
    """The commonest damage of all: a download that was stopped."""
    shutil.copytree(written, folder := tmp_path / "m")
    (lost := sorted(folder.glob("model-*"))[1]).unlink()
    with pytest.raises(CheckpointError, match=f"no {lost.name} here"):
        open_model_directory(folder)


def test_two_models_in_one_folder_are_refused(written: Path, tmp_path: Path) -> None:
    """A model saved over a sharded one: transformers opened the new weights under our name for the old ones."""
    shutil.copytree(written, folder := tmp_path / "m")
    whole = {n: t for file in folder.glob("model-*") for n, t in load_file(file).items()}
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"two models: model\.safetensors"):
        open_model_directory(folder)
    index = {"weight_map": dict.fromkeys(whole, "model.safetensors")}  # an index of the one file is no second model
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(open_model_directory(folder), open_model_directory(written))


@pytest.mark.parametrize("case", CASES)
def test_expected_shapes_are_those_of_the_model(case: str) -> None:
    """They are made of one layer: a model whose layers differ would be checked against another one."""
    config = ModelConfig(**{**BASE, **CASES[case], "n_layers": 12})
    parameters = {n: tuple(p.shape) for n, p in build_model(config).named_parameters()}
    assert expected_shapes(config) == {n: s for n, s in parameters.items() if n in expected_shapes(config)}
    assert parameters.keys() - expected_shapes(config).keys() <= {"lm_head.weight"}
