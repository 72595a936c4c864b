"""Quantized weights: what rounding costs, layouts that others open, and models that compute in what they store."""

import copy
import hashlib
import importlib
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command_line import puna_forked
from safetensors.torch import load_file, save_file
from test_model import build

from puna import device
from puna.checkpoint import bitsandbytes, compressed_tensors
from puna.checkpoint.compressed_config import Group, matched, read_groups
from puna.checkpoint.convert import convert
from puna.checkpoint.gguf.blocks import LAYOUTS, Ggml
from puna.checkpoint.gguf.blocks import dequantize as dequantize_blocks
from puna.checkpoint.gguf.packed import PACKED, unpacked_blocks
from puna.checkpoint.inspect import inspect
from puna.checkpoint.model_directory import save_model
from puna.checkpoint.registry import open_model
from puna.checkpoint.stored import Weight
from puna.device import require_memory
from puna.errors import CheckpointError, NumericError, ResourceError, UsageError
from puna.eval.certificate import CERTIFICATE, quantize, table
from puna.files import verify
from puna.infer.llama import Llama, load
from puna.lora import LoraConfig, add_lora, lora_parameters, merge_lora
from puna.model.config import ModelConfig
from puna.model.transformer import Transformer
from puna.ops.native.library import native
from puna.ops.nibbles import pack_nibbles, unpack_nibbles
from puna.ops.packed import Packed, dequantize, packed_linear, plain_scales
from puna.ops.packed_layers import PackedEmbedding, PackedLinear, packed_layers
from puna.quant.dynamic import dynamic_table
from puna.quant.gptq import rounded_in_turn
from puna.quant.nf4 import VALUES, round_nf4, with_nested_scales
from puna.quant.quantize import quantize_model
from puna.quant.rounding import round_symmetric
from puna.quant.schemes import SCHEMES, Kind, scheme
from puna.tokenizer.tokenizer import Tokenizer

TIED = ModelConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=128, vocab_size=640, max_seq_len=128,
    rope_theta=10000.0, rope_scaling=None, norm_eps=1e-5, tie_embeddings=True,
)  # fmt: skip
UNTIED = TIED.model_copy(update={"tie_embeddings": False})
IDS = torch.tensor([[1, 5, 9, 300, 77, 12, 600, 3]])
TEXT = "In the high puna the llamas graze; a llama does not count the stars: 1, 2, 3, 12 and 345. " * 4


def written(config: ModelConfig, tokenizer: Path, target: Path) -> Path:
    """A tiny model directory in fp32."""
    target.mkdir()
    save_model(target, build(config, torch.float32), Tokenizer(tokenizer), "fp32", {})
    return target


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = TIED if request.param == "tied" else UNTIED
    return written(config, tokenizer_folder, tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def untied(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(UNTIED, tokenizer_folder, tmp_path_factory.mktemp("untied") / "m")


def plain_twin(model: Transformer) -> Transformer:
    """The same model with every packed weight dequantized, in fp64."""
    twin = build(model.config.model_copy(update={"tie_embeddings": False}), torch.float64)
    layers = packed_layers(model)
    values = {f"{name}.weight": layer.weight for name, layer in layers.items()}
    values = {**dict(model.named_parameters()), **values}
    values.setdefault("lm_head.weight", values["embed_tokens.weight"])
    twin.load_state_dict({name: tensor.double() for name, tensor in values.items()})
    return twin


def test_codes_lie_as_ggufs_blocks_do() -> None:
    """Kernels and files read byte j as weights j and j + 16; any other order gives a model of noise."""
    codes = torch.arange(64).remainder(16).view(2, 32)
    packed = pack_nibbles(codes)
    assert packed.shape == (2, 16)
    assert packed[0, 3] == 3 | codes[0, 19] << 4
    assert torch.equal(unpack_nibbles(packed), codes.to(torch.uint8))


def test_words_are_those_of_compressed_tensors() -> None:
    """Eight codes a word, the first in its lowest bits, each with 8 added: written by hand."""
    codes = torch.tensor([[-8, 7, 0, 1, -1, 2, -2, 3]])
    word = sum((int(code) + 8) << 4 * place for place, code in enumerate(codes[0]))
    signed = word - (1 << 32) if word >= 1 << 31 else word
    assert compressed_tensors.pack_words(codes, 4).tolist() == [[signed]]
    assert torch.equal(
        compressed_tensors.unpack_words(torch.tensor([[signed]], dtype=torch.int32), 4), codes.to(torch.int8)
    )
    bytes_ = torch.randint(-128, 128, (3, 12), dtype=torch.int8)
    assert torch.equal(compressed_tensors.unpack_words(compressed_tensors.pack_words(bytes_, 8), 8), bytes_)


@pytest.mark.parametrize(("name", "most"), [("int8", 0.012), ("int4", 0.085), ("int8-int4", 0.085), ("nf4", 0.096)])
def test_rounding_costs_no_more_than_its_bits_must(name: str, most: float) -> None:
    """A scale that is off by one convention (7 for 8, whole rows for groups) costs a tenth more and nothing fails."""
    weight = torch.randn(48, 512, generator=torch.Generator().manual_seed(0))
    packed = SCHEMES[name].linears.pack(weight)
    assert ((dequantize(packed) - weight).norm() / weight.norm()).item() < most
    if packed.table is None:
        assert packed.scales.dtype == torch.float16
        assert torch.equal(packed.scales.float(), packed.scales.bfloat16().float())


def test_zeros_and_infinities() -> None:
    """A row of zeros would be divided by its scale; an infinity would turn its whole group into zeros."""
    weight = torch.zeros(2, 64)
    for kind in (Kind(4, 32), Kind(8), Kind(4, 64, nf4=True)):
        assert torch.equal(dequantize(kind.pack(weight)), weight)
        assert kind.nf4 or kind.pack(weight).scales.dtype == torch.float16
        with pytest.raises(NumericError):
            kind.pack(weight + torch.inf)


@pytest.mark.parametrize("shift", [-100, -20, 70])
@pytest.mark.parametrize("name", ["int8", "int4", "int8-int4"])
def test_small_weights_are_rounded_as_large_ones_are(name: str, shift: int) -> None:
    """A floor under the scales made weights of 1e-5 zero; squares of 1e22 are infinite, and no scale was chosen."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    near, far = (SCHEMES[name].linears.pack(w) for w in (weight, weight * 2.0**shift))
    assert torch.equal(dequantize(far), dequantize(near) * 2.0**shift)
    moments = torch.eye(64)
    near, far = (rounded_in_turn(w, moments, SCHEMES[name].linears) for w in (weight, weight * 2.0**shift))
    assert torch.equal(dequantize(far), dequantize(near) * 2.0**shift)


def test_what_is_not_finite_is_not_calibrated() -> None:
    """GPTQ had no check: a NaN became whatever lay in the memory."""
    weight, moments = torch.ones(2, 64), torch.eye(64)
    for damaged in (weight.index_fill(1, torch.tensor([3]), torch.nan), weight * torch.inf):
        with pytest.raises(NumericError, match="weights"):
            rounded_in_turn(damaged, moments, Kind(4, 32))
    with pytest.raises(NumericError, match="enters"):
        rounded_in_turn(weight, moments * torch.nan, Kind(4, 32))


def test_nf4_by_hand() -> None:
    """Each of the 16 values, and the two sides of each middle between them."""
    middles = (VALUES[:-1] + VALUES[1:]) / 2
    weight = torch.cat((VALUES, middles - 1e-4, middles + 1e-4, torch.ones(18)))[None]
    packed = round_nf4(2 * weight)
    expected = [*range(16), *range(15), *range(1, 16), *[15] * 18]
    assert unpack_nibbles(packed.codes)[0].tolist() == expected
    assert packed.scales.tolist() == [[2.0]]
    assert torch.equal(dequantize(packed), 2 * VALUES[torch.tensor(expected)][None])


BNB = "0.50.2"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nested", [False, True], ids=["nf4", "nf4-double"])
@pytest.mark.parametrize("std", [1.0, 0.02, 1e-5])
def test_nf4_is_bitsandbytes(nested: bool, std: float, dtype: torch.dtype) -> None:
    """Codes, scales and values bit for bit, or an adapter trained here belongs to another base there.

    Held against the CPU backend of bitsandbytes 0.50.2: others may round the scales of scales otherwise.
    """
    theirs = pytest.importorskip("bitsandbytes.functional", reason=f"bitsandbytes {BNB}: NF4 is compared with its own")
    weight = (std * torch.randn(192, 576, generator=torch.Generator().manual_seed(1))).to(dtype)
    weight[3] = 0  # blocks of zeros
    packed = with_nested_scales(round_nf4(weight)) if nested else round_nf4(weight)
    column, state = theirs.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=nested)
    tensors = bitsandbytes.tensors_of("w", packed, dtype)
    assert torch.equal(tensors["w"], column)
    assert torch.equal(tensors["w.absmax"], state.absmax)
    if nested:
        assert torch.equal(tensors["w.nested_absmax"], state.state2.absmax)
        assert torch.equal(tensors["w.nested_quant_map"], state.state2.code)
        assert packed.scale_offset is not None
        assert torch.equal(packed.scale_offset, state.offset)
    for computed in (torch.float32, torch.bfloat16, torch.float16):
        state.dtype = computed
        assert torch.equal(theirs.dequantize_4bit(column, state), dequantize(packed).to(computed))
    assert torch.equal(dynamic_table(), theirs.create_dynamic_map())


def test_scales_of_scales_are_bitsandbytes() -> None:
    """At every border between two codes, where its look-up by 65,536 places is a step off the nearest."""
    theirs = pytest.importorskip("bitsandbytes.functional", reason=f"bitsandbytes {BNB}: NF4 is compared with its own")
    table = dynamic_table()
    middles = (table[:-1] + table[1:]) / 2
    steps = torch.arange(-3, 4)[:, None] / 65535
    values = torch.cat((middles + steps, table[None].expand(7, -1)), 1).flatten()
    values = torch.nn.functional.pad(values, (0, -len(values) % 255)).view(-1, 255)
    scales = torch.cat((values, torch.ones(len(values), 1)), 1)  # the largest of each block of 256 is 1
    scales = scales - scales.mean()
    packed = with_nested_scales(Packed(torch.empty(0), scales, None, 4, 64))
    assert packed.scale_offset is not None
    codes, state = theirs.quantize_blockwise(scales.flatten() - packed.scale_offset, blocksize=256)
    assert torch.equal(packed.scales.flatten(), codes)
    back = theirs.dequantize_blockwise(codes, state) + packed.scale_offset
    assert torch.equal(plain_scales(packed).flatten(), back)


def test_scales_of_scales() -> None:
    """Eight bits hold a scale to 1 %; blocks of 256 with one that is not full."""
    scales = torch.rand(3, 100, generator=torch.Generator().manual_seed(2)) + 0.5
    packed = with_nested_scales(Packed(torch.empty(3, 0), scales, None, 4, 64))
    assert packed.scales.dtype == torch.uint8
    assert ((plain_scales(packed) - scales).abs() / scales).max() < 0.01
    some = packed.rows(torch.tensor([2, 0]))  # its blocks run over the ends of rows
    assert torch.equal(plain_scales(some), plain_scales(packed)[[2, 0]])
    assert len(dynamic_table().unique()) == 256


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("compact", [False, True])
def test_a_packed_model_computes_with_its_dequantized_weights(name: str, config: ModelConfig, compact: bool) -> None:
    """A layer that was left out, tied to the wrong one or read in another order changes every logit."""
    if compact and SCHEMES[name].head is None:
        pytest.skip(f"{name} leaves the embedding as it is")
    model = build(config, torch.float32)
    quantize_model(model, scheme(name, compact=compact))
    wide = plain_twin(model)
    logits, expected = model(IDS), wide(IDS)
    rounded = 0.05 if name == "int8-int4" else 1e-4  # its inputs are rounded as well
    assert (logits - expected).abs().max() < rounded * expected.abs().max()
    assert isinstance(model.embed_tokens, PackedEmbedding) == compact
    assert len(packed_layers(model)) == 14 + (SCHEMES[name].head is not None) + compact
    assert model.config.tie_embeddings == (config.tie_embeddings and (compact or SCHEMES[name].head is None))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("compact", [False, True])
def test_a_directory_holds_what_was_quantized(name: str, compact: bool, folder: Path, tmp_path: Path) -> None:
    """Saved, inspected, verified, loaded packed and dequantized, converted: the same weights everywhere."""
    if compact and SCHEMES[name].head is None:
        pytest.skip(f"{name} leaves the embedding as it is")
    certificate = quantize(folder, tmp_path / "q", name, compact=compact, text=TEXT, prompts=["a", "b"], max_tokens=2)
    model = load(folder, "fp32").model
    quantize_model(model, scheme(name, compact=compact))
    packed, plain = load(tmp_path / "q", "fp32", packed=True), load(tmp_path / "q", "fp32")
    expected, found = packed_layers(model), packed_layers(packed.model)
    assert expected.keys() == found.keys()
    for key, layer in expected.items():
        assert torch.equal(found[key].codes, layer.codes)
        assert torch.equal(found[key].packed.scales.float(), layer.packed.scales.float())
        assert torch.equal(found[key].weight, layer.weight)
        assert found[key].packed.nbytes == layer.packed.nbytes
        assert found[key].packed.activations == layer.packed.activations
        assert torch.equal(plain.model.get_parameter(f"{key}.weight").float(), found[key].weight)
    verify(tmp_path / "q")
    kind = {"int8": "INT8", "nf4": "NF4", "nf4-double": "NF4"}.get(name, "INT4")
    stored = len(
        {layer.codes.data_ptr() for layer in found.values() if layer.packed.bits == (8 if kind == "INT8" else 4)}
    )
    assert f"{kind} x {stored}," in inspect(tmp_path / "q")["weights"]
    assert json.loads((tmp_path / "q" / CERTIFICATE).read_text())["perplexity"] == certificate["perplexity"]
    assert certificate["bytes"]["after"] == (tmp_path / "q" / "model.safetensors").stat().st_size
    again = convert(tmp_path / "q", tmp_path / "plain", "hf", dtype="fp32")
    assert torch.equal(load(again, "fp32").logits(IDS), plain.logits(IDS))


def test_a_certificate_names_what_it_was_measured_on(untied: Path, tmp_path: Path) -> None:
    """Perplexities of two certificates were compared, and nothing told that their texts were two."""
    quantize(untied, tmp_path / "q", "int4", compact=True, text=TEXT, prompts=["a"], max_tokens=1, calibration=TEXT[1:])
    certificate, made_from = (json.loads((tmp_path / "q" / name).read_text()) for name in (CERTIFICATE, "puna.json"))
    hashes = {"text": TEXT, "calibration": TEXT[1:], "prompts": '["a"]'}
    for told in (certificate, made_from):
        assert told["sha256"] == {key: hashlib.sha256(words.encode()).hexdigest() for key, words in hashes.items()}
        assert (told["torch"], told["compact"], told["calibrated"]) == (torch.__version__, True, True)
        assert told["storage"] == "F32"


def test_a_quantized_source_is_told(untied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Rounded twice: a certificate against the first rounding looks far better than the model is."""
    options: dict[str, Any] = {"text": TEXT, "prompts": ["a"], "max_tokens": 1}
    quantize(untied, tmp_path / "q", "int4", **options)
    assert "rounded anew" not in caplog.text
    certificate = quantize(tmp_path / "q", tmp_path / "twice", "nf4", **options)
    assert "INT4" in certificate["storage"]
    assert "rounded anew" in caplog.text
    assert "INT4" in table(certificate)["source"]


def test_a_model_that_memory_does_not_hold_is_refused(
    untied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed by the system minutes later, or a machine that swaps, instead of a word."""
    (tmp_path / "meminfo").write_text("MemTotal:     99999999 kB\nMemAvailable:        300 kB\n")
    monkeypatch.setattr(device, "_MEMORY", tmp_path / "meminfo")
    with pytest.raises(ResourceError, match="free memory"):
        quantize(untied, tmp_path / "q", "int4", text=TEXT)
    (tmp_path / "meminfo").write_text("nothing known")
    require_memory(1 << 60, torch.device("cpu"))


@pytest.mark.parametrize("name", ["int4", "nf4", "nf4-double"])
def test_saved_again_it_is_the_same(name: str, untied: Path, tmp_path: Path) -> None:
    """A model that is loaded packed and saved keeps its codes: rounding twice would lose twice.

    nf4-double was saved as nf4.
    """
    quantize(untied, tmp_path / "q", name, text=TEXT, prompts=["a"], max_tokens=1)
    load(tmp_path / "q", "fp32", packed=True).save(tmp_path / "again")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("q", "again"))
    assert one == two


@pytest.mark.parametrize("name", ["int8", "int4", "int8-int4", "nf4", "nf4-double"])
def test_transformers_opens_it(name: str, folder: Path, tmp_path: Path) -> None:
    """The directory is for others, too: their logits are ours."""
    package = "bitsandbytes" if "nf4" in name else "compressed_tensors"
    pytest.importorskip(package, reason=f"{package}: directories are opened by transformers with it")
    transformers: Any = pytest.importorskip("transformers")
    quantize(folder, tmp_path / "q", name, text=TEXT, prompts=["a"], max_tokens=1)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32).eval()
    ours = load(tmp_path / "q", "fp32", packed=True)
    if "nf4" in name:  # before it computes, which may lay the codes out anew
        functional = importlib.import_module("bitsandbytes.functional")
        for key, layer in packed_layers(ours.model).items():
            weight = theirs.model.get_submodule(key).weight
            state = copy.copy(weight.quant_state)
            state.dtype = torch.float32
            assert torch.equal(functional.dequantize_4bit(weight.data, state), layer.weight)
    with torch.no_grad():
        expected = theirs(IDS).logits.float()
    # bitsandbytes computes in bf16; the rounded inputs of int8-int4 are halved at 127.5 there, at 127 here
    most = {"int8": 1e-4, "int4": 1e-4, "int8-int4": 0.06}.get(name, 0.05)
    assert (ours.logits(IDS) - expected).abs().max() < most * expected.abs().max()


@pytest.mark.parametrize("kind", PACKED)
def test_a_ggufs_blocks_are_the_same_weights(kind: Ggml) -> None:
    """Taken apart, not rounded again: equal to the dequantized blocks bit for bit."""
    raw = np.random.default_rng(0).integers(0, 256, (6, 3, LAYOUTS[kind].size), np.uint8)
    raw[:, :, :4].view("<f2")[...] = np.random.default_rng(1).normal(size=(6, 3, 2)).astype("<f2")
    expected = dequantize_blocks(raw.reshape(-1), kind).reshape(6, 96)
    found = dequantize(unpacked_blocks(raw.reshape(-1), kind, (6, 96)))
    assert found.numpy().tobytes() == expected.tobytes()
    raw[2, 1, :2].view("<f2")[...] = np.nan
    with pytest.raises(CheckpointError, match="not finite"):
        unpacked_blocks(raw.reshape(-1), kind, (6, 96))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_a_gguf_is_computed_in_as_it_lies(kind: str, folder: Path, tmp_path: Path) -> None:
    """Rows of q and k are stored in another order, head by head: codes and scales have to move alike."""
    file = convert(folder, tmp_path / "model.gguf", kind=kind)
    packed, plain = load(file, "fp32", packed=True), load(file, "fp32")
    assert len(packed_layers(packed.model)) >= 14
    for name, layer in packed_layers(packed.model).items():
        assert torch.equal(layer.weight, plain.model.get_parameter(f"{name}.weight"))
    assert (packed.logits(IDS) - plain.logits(IDS)).abs().max() < 1e-4 * plain.logits(IDS).abs().max()


@pytest.mark.parametrize("name", ["int4", "nf4"])
def test_lora_over_packed_weights(name: str) -> None:
    """QLoRA: outputs and the adapters' gradients are those over the dequantized weights; the codes stay."""
    model = build(UNTIED, torch.float64)
    quantize_model(model, name)
    wide = plain_twin(model)
    grads = []
    for one in (model, wide):
        add_lora(one, LoraConfig(rank=4, targets="all-linear"), seed=1, dtype=torch.float64)
        for key, parameter in lora_parameters(one).items():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(key)))
        logits = one(IDS)
        F.cross_entropy(logits[0, :-1], IDS[0, 1:]).backward()
        grads.append({key: p.grad for key, p in lora_parameters(one).items()} | {"logits": logits.detach()})
    assert len(grads[0]) == 29
    for key, grad in grads[1].items():
        assert torch.allclose(grads[0][key], grad, rtol=1e-9, atol=1e-12), key
    with pytest.raises(UsageError, match="quantized"):
        merge_lora(model)


def test_dora_dequantizes_a_layer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole matrix was dequantized to learn its dtype."""
    model = build(UNTIED, torch.float32)
    quantize_model(model, "nf4")
    calls: list[Packed] = []
    monkeypatch.setattr("puna.ops.packed_layers.dequantize", lambda packed: calls.append(packed) or dequantize(packed))
    add_lora(model, LoraConfig(rank=4, targets="all-linear", dora=True))
    assert len(calls) == 14
    model(IDS)
    assert len(calls) == 28


def test_a_gradient_flows_through_rounded_inputs() -> None:
    """The rounding's own derivative is zero: passed through it, layers below would never learn."""
    packed = round_symmetric(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), 4, 32, "int8")
    x = torch.randn(3, 64, requires_grad=True)
    packed_linear(x, packed).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, dequantize(packed).sum(0).expand(3, -1), atol=1e-5)


def test_columns_that_follow_make_good_for_an_error() -> None:
    """GPTQ: on inputs that go together the outputs' error is far below that of rounding to the nearest."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 128, generator=generator)
    x = torch.randn(2000, 16, generator=generator) @ torch.randn(16, 128, generator=generator)
    x += 0.1 * torch.randn(2000, 128, generator=generator)
    errors = [
        (F.linear(x, dequantize(packed)) - F.linear(x, weight)).square().mean()
        for packed in (Kind(4, 32).pack(weight), rounded_in_turn(weight, x.T @ x, Kind(4, 32)))
    ]
    assert errors[1] < 0.5 * errors[0]


def test_a_calibrated_directory(untied: Path, tmp_path: Path) -> None:
    """Every linear of every block is rounded by the text, the head to its nearest."""
    options: dict[str, Any] = {"text": TEXT, "prompts": ["a"], "max_tokens": 1}
    quantize(untied, tmp_path / "near", "int4", **options)
    quantize(untied, tmp_path / "q", "int4", calibration=TEXT, **options)
    near, found = (packed_layers(load(tmp_path / name, "fp32", packed=True).model) for name in ("near", "q"))
    assert all(torch.equal(near[n].codes, found[n].codes) == (n == "lm_head") for n in near)


def test_layers_move_and_are_copied_whole() -> None:
    """`model.to(bf16)` must not round scales; a copy must not read the memory of what it was copied from."""
    layer = PackedLinear(round_nf4(torch.randn(4, 64, generator=torch.Generator().manual_seed(0))))
    before, x = layer.weight, torch.ones(1, 64)
    expected = layer(x)
    twin = copy.deepcopy(layer).to(torch.bfloat16)
    assert torch.equal(twin.weight, before)
    layer.codes.zero_()
    assert torch.equal(twin(x), expected)


GROUP: dict[str, Any] = {
    "targets": ["Linear"], "input_activations": None,
    "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
}  # fmt: skip
SECTION: dict[str, Any] = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": [], "config_groups": {"group_0": GROUP}
}  # fmt: skip


def one_group(**changes: Any) -> dict[str, Any]:
    return {**SECTION, "config_groups": {"group_0": {**GROUP, **changes}}}


REFUSED: dict[str, Any] = {
    "AWQ": {"quant_method": "awq"},
    "nothing said": {"bits": 4},
    "another format": {**SECTION, "format": "marlin-24"},
    "sparse": {**SECTION, "sparsity_config": {"format": "sparse-24"}},
    "a packed cache": {**SECTION, "kv_cache_scheme": {"num_bits": 8}},
    "no groups": {**SECTION, "config_groups": []},
    **{
        f"{key} {value}": one_group(weights={**GROUP["weights"], key: value})
        for key, value in (("actorder", "group"), ("symmetric", False), ("type", "float"), ("num_bits", 3),
                           ("group_size", 48), ("group_size", "32"), ("strategy", "block"))
    },
    "static inputs": one_group(input_activations={"num_bits": 8, "type": "int", "strategy": "tensor"}),
    "a slow pattern": one_group(targets=["re:(.*)*(.*)*x"]),
    "LLM.int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "FP4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int4 directory."""
    place = tmp_path_factory.mktemp("small")
    model = build(UNTIED, torch.float32)
    quantize_model(model, "int4")
    Llama(model, Tokenizer(tokenizer_folder), place, []).save(place / "int4")
    return place / "int4"


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_is_refused(case: str, small: Path, tmp_path: Path) -> None:
    """Read as if it were a known scheme, another one gives a model of noise."""
    values = json.loads((small / "config.json").read_text())
    shutil.copytree(small, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps({**values, "quantization_config": REFUSED[case]}))
    with pytest.raises(CheckpointError, match="quantization_config"):
        open_model(tmp_path)


DAMAGE: dict[str, Any] = {
    "no scale": lambda t: t.pop("model.layers.0.mlp.up_proj.weight_scale"),
    "no codes": lambda t: t.pop("model.layers.0.mlp.up_proj.weight_packed"),
    "scales of another group": lambda t: t.update({"lm_head.weight_scale": torch.ones(640, 2)}),
    "zero points": lambda t: t.update({"lm_head.weight_zero_point": torch.zeros(640, 1, dtype=torch.int8)}),
    "an order of columns": lambda t: t.update({"lm_head.weight_g_idx": torch.zeros(64, dtype=torch.int32)}),
    "a layer there is not": lambda t: t.update({"model.layers.9.mlp.up_proj.weight_scale": torch.ones(1)}),
    "integers alone": lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}),
    "a shape of other values": lambda t: t["lm_head.weight_shape"].fill_(-1),
    "scales that are integers": lambda t: t.update({"lm_head.weight_scale": torch.ones(640, 1, dtype=torch.int32)}),
    "scales of complex numbers": lambda t: t.update({"lm_head.weight_scale": torch.ones(640, 1, dtype=torch.cfloat)}),
    "a scale that is NaN": lambda t: t["lm_head.weight_scale"].fill_(torch.nan),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_parts_that_do_not_fit_are_refused(case: str, small: Path, tmp_path: Path) -> None:
    """A directory edited or cut off must not become a model, nor anything but a typed error."""
    tensors = load_file(small / "model.safetensors")
    DAMAGE[case](tensors)
    shutil.copytree(small, tmp_path, dirs_exist_ok=True)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError):
        open_model(tmp_path).load(torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("bits", "size", "columns"), [(4, 32, 48), (8, 32, 48), (4, 0, 48), (4, 0, 7), (8, 0, 6), (8, 64, 32)]
)
def test_columns_that_do_not_divide_are_refused(bits: int, size: int, columns: int) -> None:
    """Rounded down, scales for all but the last columns fitted, and a RuntimeError came when the layer was read."""
    packed = torch.zeros(2, columns * bits // 32, dtype=torch.int32)
    scales = torch.ones(2, columns // size if size else 1)
    tensors = {"weight_packed": packed, "weight_scale": scales, "weight_shape": torch.tensor([2, columns])}
    parts = {name: Weight(tuple(t.shape), t.dtype, partial(torch.clone, t)) for name, t in tensors.items()}
    with pytest.raises(CheckpointError, match="columns"):
        compressed_tensors.opened(parts, Group(("Linear",), bits, size, "float"), (2, columns), "here")
    assert Kind(bits, size).problem(columns)


def test_a_groups_names_are_stronger_than_its_classes() -> None:
    """llm-compressor gives the head other bits by its name, or by a pattern of it."""
    weights = GROUP["weights"]
    section = {**SECTION, "config_groups": {
        "a": {"targets": ["Linear"], "weights": weights},
        "b": {"targets": ["re:.*down_proj"], "weights": {**weights, "num_bits": 8}},
        "c": {"targets": ["lm_head"], "weights": {**weights, "num_bits": 8, "strategy": "channel"}},
    }}  # fmt: skip
    groups = read_groups(section, "config.json")
    found = [
        matched(name, groups) for name in ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "lm_head")
    ]
    assert [(group.bits, group.size) for group in found if group] == [(4, 32), (8, 32), (8, 0)]
    assert matched("model.embed_tokens", groups) is None


def test_what_cannot_be_quantized_is_told_before_anything_is_written(untied: Path, tmp_path: Path) -> None:
    """Half a folder, or a scheme that nobody asked for, instead of a word."""
    for name, options in (
        ("int5", {}),
        ("int4", {"group": 48}),
        ("nf4", {"compact": True}),
        ("int8-int4", {"group": 256}),
    ):
        with pytest.raises(UsageError):
            quantize(untied, tmp_path / "q", name, text=TEXT, **options)
    quantize(untied, tmp_path / "q", "int8", text=TEXT, prompts=["a"], max_tokens=1)
    with pytest.raises(UsageError, match="exists"):
        quantize(untied, tmp_path / "q", "int8")
    with pytest.raises(UsageError, match="name of a file"):
        quantize(untied, tmp_path / "q.gguf", "int8")
    with pytest.raises(UsageError, match="quantized already"):
        quantize_model(load(tmp_path / "q", "fp32", packed=True).model, "int4")
    assert [p.name for p in tmp_path.iterdir()] == ["q"]


def test_the_verb(untied: Path, tmp_path: Path) -> None:
    """The certificate is printed, lies in the folder, and the folder is a model for every other verb."""
    (tmp_path / "text.txt").write_text(TEXT)
    calls = [
        ["quantize", untied, "q", "--scheme", "int4", "--group", "64", "--text", "text.txt"],
        ["quantize", untied, "r", "--scheme", "int3"],
        ["eval", "q", "--text", "text.txt"],
        ["verify", "q"],
        ["convert", "q", "q.gguf"],
    ]
    answers = puna_forked(calls, tmp_path)
    assert [done.returncode for done in answers] == [0, 2, 0, 0, 0], [done.stderr for done in answers]
    assert "int4, a scale for each 64" in answers[0].stdout
    assert "perplexity" in answers[0].stdout
    assert "int4" in answers[1].stderr
    assert ("as stored" if native() else "dequantized") in answers[2].stderr
    assert "dequantized" in answers[4].stderr


def test_a_minimum_has_no_place_in_a_directory() -> None:
    """Q4_1's minima, left out on the way to disk, would shift every weight."""
    packed = Packed(torch.zeros(2, 16, dtype=torch.uint8), torch.ones(2, 1), torch.ones(2, 1), bits=4, group=32)
    with pytest.raises(UsageError, match="minimum"):
        compressed_tensors.tensors_of("a", packed)
