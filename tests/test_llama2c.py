"""llama2.c's files: a real model's golden text, every version there and back, and hostile headers."""

import shutil
import struct
from pathlib import Path

import llamacpp
import numpy as np
import pytest
import torch
from fuzz import damaged, ends_at_once, fuzz
from test_model import BASE, build

import puna
from puna.checkpoint.convert import convert
from puna.checkpoint.gguf.model import open_gguf_model
from puna.checkpoint.gguf.write import write_gguf
from puna.checkpoint.llama2c import open_llama2c, write_llama2c
from puna.checkpoint.registry import open_model
from puna.checkpoint.stored import Stored, Weight
from puna.errors import CheckpointError, DataError, UsageError
from puna.model.config import ModelConfig, RopeScaling

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stories(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K, a trained model, with its tokenizer beside it, in a folder of its own."""
    folder = tmp_path_factory.mktemp("stories")
    for name in ("stories260K.bin", "tok512.bin"):
        shutil.copy(assets / "checkpoints/stories260K" / name, folder)
    return folder / "stories260K.bin"


def test_stories260k_tells_its_golden_story(stories: Path, assets: Path) -> None:
    """200 greedy steps of llama2.c from BOS, byte for byte: row order, theta, epsilon and tokenizer at once."""
    llama = puna.load(stories, dtype="fp32")
    bos = llama.tokenizer.bos_id
    ids = llama.continue_ids([[bos]], 200)[0]
    text = llama.tokenizer.decode_after([bos], ids)
    expected = (assets / "checkpoints/stories260K/expected_greedy_200.txt").read_bytes()
    assert text.encode() == expected


def test_the_same_story_in_llama_cpp(stories: Path, assets: Path, tmp_path: Path) -> None:
    """.bin -> GGUF -> another program: names, rows of q and k, and the SentencePiece vocabulary all survive."""
    write_gguf(open_llama2c(stories), tmp_path / "m.gguf", "F16", {}, lambda name: None)
    ids = llamacpp.greedy(tmp_path / "m.gguf", [1], 200)["ids"]
    text = open_gguf_model(tmp_path / "m.gguf").read_tokenizer().decode_after([1], ids)
    assert text.encode() == (assets / "checkpoints/stories260K/expected_greedy_200.txt").read_bytes()


def random_model(**changed: object) -> Stored:
    """A random model in memory; a .bin has no tokenizer inside, so it needs none."""
    model = build(ModelConfig(**{**BASE, "norm_eps": 1e-5, "n_kv_heads": 2, **changed})).eval()
    tied = model.config.tie_embeddings
    weights = {
        name: Weight(tuple(p.shape), p.dtype, p.detach)
        for name, p in model.named_parameters()
        if not (tied and name.startswith("lm_head"))
    }
    return Stored(Path("memory"), "hf", model.config, weights, "F32", [], lambda: pytest.fail("not asked for"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("version", [0, 1, 2])
def test_every_version_comes_back(version: int, tied: bool, tmp_path: Path) -> None:
    """Seven ints and weights in an order of their own: any two swapped still load."""
    stored = random_model(tie_embeddings=tied)
    done: list[str] = []
    write_llama2c(stored, tmp_path / "m.bin", version, done.append)
    again = open_llama2c(tmp_path / "m.bin")
    assert again.config == stored.config
    assert sorted(done) == sorted(stored.weights)
    assert not again.problems()
    for name, weight in stored.weights.items():
        original, found = weight.read(), again.weights[name].read()
        if version == 2 and original.dim() == 2:
            assert 0 < (original - found).abs().max() <= original.abs().max() / 127 / 2 * 1.001
        else:
            assert torch.equal(original, found), name
    tokens = torch.randint(0, 97, (1, 20), generator=torch.Generator().manual_seed(0))
    ours, theirs = (m.load(torch.float64, CPU)(tokens) for m in (stored, again))
    assert (ours - theirs).abs().max() <= (0.2 if version == 2 else 1e-9)


def test_what_was_converted_can_be_talked_with(stories: Path, tmp_path: Path) -> None:
    """The export had no tokenizer, and puna asked for one that its source had; nor did it say where it came from."""
    for name in ("a", "b"):  # the second finds a file of the first's name, with the same in it
        convert(stories, tmp_path / f"{name}.bin")
    (tmp_path / "tok512.bin").write_bytes(b"of another model")
    again = open_model(tmp_path / "a.bin")
    ours, theirs = (stored.read_tokenizer().encode("Once upon a time") for stored in (again, open_model(stories)))
    assert ours == theirs
    assert again.lineage["recipe"] == "convert"
    assert again.lineage["parents"][0]["path"] == str(stories)
    assert (tmp_path / "a.tokenizer.bin").read_bytes() == stories.with_name("tok512.bin").read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        convert(stories, tmp_path / "a.bin")


def test_layout_is_the_published_one(stories: Path, tmp_path: Path) -> None:
    """What we write of a real file is that file; versions 1 and 2 are read here by offsets written out by hand."""
    stored = open_llama2c(stories)
    write_llama2c(stored, tmp_path / "0.bin", 0, lambda name: None)
    original, ours = stories.read_bytes(), (tmp_path / "0.bin").read_bytes()
    config = stored.config
    tables = 4 * config.max_seq_len * config.head_dim
    assert ours[:-tables] == original[:-tables]  # tables are computed in another precision, and never read
    d, ffn, kv, layers, vocab = config.dim, config.ffn_dim, 32, config.n_layers, config.vocab_size
    norm = stored.weights["norm.weight"].read().numpy()
    for version, wo_of_layer_1 in (
        (1, 256 + 4 * (2 * layers * d + d + vocab * d + layers * (d * d + 2 * kv * d) + d * d)),
        (2, 256 + 4 * (2 * layers * d + d) + (vocab * d + layers * (d * d + 2 * kv * d) + d * d) // 4 * 8),
    ):
        write_llama2c(stored, tmp_path / "n.bin", version, lambda name: None)
        raw = (tmp_path / "n.bin").read_bytes()
        head = struct.unpack_from("<4si7iB", raw)
        assert head == (b"24ka", version, d, ffn, layers, 8, 4, vocab, config.max_seq_len, 1)
        assert np.array_equal(np.frombuffer(raw, "<f4", d, 256 + 4 * 2 * layers * d), norm)
        wo = stored.weights["layers.1.self_attn.o_proj.weight"].read().numpy().reshape(-1)
        if version == 1:
            assert np.array_equal(np.frombuffer(raw, "<f4", d * d, wo_of_layer_1), wo)
        else:
            q = np.frombuffer(raw, "i1", d * d, wo_of_layer_1).astype(np.float32)
            scales = np.frombuffer(raw, "<f4", d * d // 4, wo_of_layer_1 + d * d)
            assert struct.unpack_from("<i", raw, 37) == (4,)  # rows of 172
            assert np.abs(q * scales.repeat(4) - wo).max() <= scales.max() / 2 * 1.001


def test_what_llama2c_does_not_compute_is_refused(tmp_path: Path) -> None:
    """Its programs have theta and epsilon built in: a file of another model would run and talk nonsense."""
    scaling = RopeScaling(factor=8, original_max_seq_len=32)
    odd = {"norm_eps": 1e-6, "rope_theta": 5e5, "rope_scaling": scaling, "head_dim": 16}
    for key, value in odd.items():
        stored = random_model(**{key: value})
        with pytest.raises(UsageError, match=key):
            write_llama2c(stored, tmp_path / "m.bin", 0, lambda name: None)
    with pytest.raises(UsageError, match="versions"):
        write_llama2c(random_model(), tmp_path / "m", 3, print)


def test_a_missing_tokenizer_says_where_it_belongs(stories: Path, tmp_path: Path) -> None:
    """The weights open without it, and the error names the file to put there."""
    shutil.copy(stories, tmp_path / "m.bin")
    stored = open_llama2c(tmp_path / "m.bin")
    with pytest.raises(DataError, match=r"tok512\.bin"):
        stored.read_tokenizer()
    for name in ("tok_a.bin", "tok_b.bin"):
        shutil.copy(stories.with_name("tok512.bin"), tmp_path / name)
    with pytest.raises(DataError, match=r"tok_a\.bin, tok_b\.bin"):
        stored.read_tokenizer()
    (tmp_path / "tok_b.bin").unlink()
    assert stored.read_tokenizer().vocab_size == 512


def header(*sizes: int, more: bytes = b"") -> bytes:
    return struct.pack("<7i", *sizes) + more


def new(version: int, *sizes: int, tied: int = 1, group: int = 64) -> bytes:
    return struct.pack("<Ii7iBi", 0x616B3432, version, *sizes, tied, group).ljust(256, b"\0")


SIZES = (64, 128, 2, 8, 4, 512, 64)
HOSTILE = {
    "empty": b"",
    "short": b"\1\0\0\0",
    "zeros": bytes(28),
    "another format": b"GGUF" + bytes(300),
    "no weights": header(*SIZES),
    "huge": header(*[(1 << 31) - 1] * 7),
    "negative layers": header(64, 128, -2, 8, 4, 512, 64),
    "many layers": header(2, 2, (1 << 31) - 1, 1, 1, 2, 2),
    "no heads": header(64, 128, 2, 0, 4, 512, 64),
    "heads do not share": header(64, 128, 2, 8, 3, 512, 64),
    "odd heads": header(72, 128, 2, 8, 4, 512, 64),
    "least vocabulary": header(64, 128, 2, 8, 4, -(1 << 31), 64),
    "version 3": new(3, *SIZES),
    "version -1": new(-1, *SIZES),
    "cut header": new(1, *SIZES)[:100],
    "no weights 1": new(1, *SIZES),
    "no weights 2": new(2, *SIZES),
    "group 0": new(2, *SIZES, group=0),
    "group negative": new(2, *SIZES, group=-64),
    "group huge": new(2, *SIZES, group=(1 << 31) - 1),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_end_at_once(case: str, tmp_path: Path) -> None:
    """Seven ints are all there is: sizes are compared with the file before anything is allocated."""
    ends_at_once(open_llama2c, tmp_path / "hostile.bin", HOSTILE[case])


def test_a_scale_that_is_not_finite_is_named(tmp_path: Path) -> None:
    """It would make every logit NaN, far from its cause."""
    stored = random_model()
    write_llama2c(stored, tmp_path / "m.bin", 2, lambda name: None)
    raw = bytearray((tmp_path / "m.bin").read_bytes())
    raw[-4:] = struct.pack("<f", float("inf"))
    (tmp_path / "m.bin").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight(.|\n)*not finite"):
        open_llama2c(tmp_path / "m.bin").load(torch.float32, CPU)


@pytest.mark.parametrize("version", [0, 1, 2])
def test_mutated_files_raise_nothing_else(version: int, tmp_path: Path) -> None:
    """Any bytes may be wrong: the error is ours, or the file still makes sense. PUNA_TEST_FUZZ=60 searches longer."""
    small = {"dim": 8, "n_heads": 2, "n_kv_heads": 1, "head_dim": 4, "ffn_dim": 8, "vocab_size": 5, "max_seq_len": 4}
    stored = random_model(**small)
    write_llama2c(stored, tmp_path / "m.bin", version, lambda name: None)
    raw, path = (tmp_path / "m.bin").read_bytes(), tmp_path / "damaged.bin"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            open_llama2c(path).load(torch.float32, CPU)
        except (CheckpointError, DataError):
            return

    fuzz(check, damaged(raw, 64))
