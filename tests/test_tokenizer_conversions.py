"""Every format of the real vocabularies, in and out: the ids of llama.cpp's vectors, sentencepiece and tiktoken."""

import gzip
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import regex
import sentencepiece
import tiktoken
import transformers
from test_tokenizer_hostile import SPM as SMALL

from puna.checkpoint.gguf.file import open_gguf
from puna.checkpoint.registry import load_tokenizer
from puna.errors import CheckpointError, DataError
from puna.tokenizer.checks import LLAMA3
from puna.tokenizer.formats import llama2c_vocab, sentencepiece_model, tiktoken_ranks, tokenizer_from
from puna.tokenizer.gguf_vocab import gguf_fields, vocab_files
from puna.tokenizer.spm_json import spm_files
from puna.tokenizer.tiktoken_model import Names, read_ranks, write_ranks
from puna.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def llama2(assets: Path) -> Tokenizer:
    return tokenizer_from(assets / "tokenizers/llama2/tokenizer.model")


@pytest.fixture(scope="module")
def llama3(assets: Path) -> Tokenizer:
    return tokenizer_from(assets / "tokenizers/llama3")


@pytest.fixture(scope="module")
def gguf(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The metadata of llama.cpp's vocabularies."""
    folder, packed = assets / "tokenizers/vectors", tmp_path_factory.mktemp("gguf") / "bpe.gguf"
    packed.write_bytes(gzip.decompress((folder / "ggml-vocab-llama-bpe.gguf.gz").read_bytes()))
    paths = {"spm": folder / "ggml-vocab-llama-spm.gguf", "bpe": packed}
    return {family: open_gguf(path).metadata for family, path in paths.items()}


TEMPLATE = "{{ bos_token }}é"


@pytest.fixture(scope="module")
def from_gguf(gguf: dict[str, dict[str, Any]]) -> dict[str, Tokenizer]:
    """llama.cpp's vocabularies as tokenizers, with a template."""
    return {f: Tokenizer(vocab_files({**m, "tokenizer.chat_template": TEMPLATE})) for f, m in gguf.items()}


def without_model(tokenizer: Tokenizer) -> Tokenizer:
    """As if tokenizer.json were all there is: scores and ranks have to come from the order of its merges."""
    return Tokenizer({name: content for name, content in tokenizer.files.items() if name != "tokenizer.model"})


def through_gguf(tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer(vocab_files(gguf_fields(tokenizer)))


def written(content: bytes | None, folder: Path, name: str = "tokenizer.model") -> Tokenizer:
    assert content is not None
    (folder / name).write_bytes(content)
    return tokenizer_from(folder / name)


SPM: dict[str, Callable[[Tokenizer, Any, Path, Path], Tokenizer]] = {
    "SPM": lambda llama2, *_: llama2,
    "SPM in a folder": lambda _, from_gguf, assets, folder: tokenizer_from(assets / "tokenizers/llama2"),
    "SPM -> json -> SPM": lambda llama2, from_gguf, assets, folder: written(
        sentencepiece_model(without_model(llama2)), folder
    ),
    "json -> GGUF": lambda llama2, *_: through_gguf(without_model(llama2)),
    "GGUF": lambda _, from_gguf, *__: from_gguf["spm"],
    "GGUF -> json -> SPM": lambda _, from_gguf, assets, folder: written(sentencepiece_model(from_gguf["spm"]), folder),
    "llama2.c": lambda _, from_gguf, assets, folder: tokenizer_from(assets / "tokenizers/llama2/tokenizer.bin"),
    "json -> llama2.c": lambda llama2, from_gguf, assets, folder: written(
        llama2c_vocab(without_model(llama2)), folder, "tokenizer.bin"
    ),
}
BPE: dict[str, Callable[[Tokenizer, Any, Path], Tokenizer]] = {
    "tiktoken": lambda llama3, *_: llama3,
    "tiktoken -> json -> tiktoken": lambda llama3, _, folder: written(tiktoken_ranks(without_model(llama3)), folder),
    "GGUF": lambda _, from_gguf, __: from_gguf["bpe"],
}


@pytest.fixture(scope="module")
def many() -> list[str]:
    """10,000 texts: random bytes read as UTF-8, random Unicode, and what trips tokenizers."""
    rng = random.Random(0)
    words = [
        " ",
        "  ",
        "   ",
        "\n",
        "\r\n",
        "\t",
        "▁",
        "a",
        "the",
        " the",
        "1",
        "23",
        "'s",
        "é",
        "e\u0301",
        "🦙",
        "日本",
    ]
    words += ["</s>", "<|eot_id|>", "<0x41>", "<unk>", "\x00", "\u200b", "\u3000", "\ufeff"]
    planes = [(0x20, 0x7F), (0x80, 0x3000), (0x3000, 0xD800), (0x1F300, 0x1F700), (0x10000, 0x110000)]
    made = [rng.randbytes(rng.randrange(40)).decode("utf-8", errors="replace") for _ in range(4000)]
    made += ["".join(chr(rng.randrange(*rng.choice(planes))) for _ in range(rng.randrange(24))) for _ in range(3000)]
    return made + ["".join(rng.choices(words, k=rng.randrange(30))) for _ in range(3000)]


@pytest.fixture(scope="module")
def spm_ids(assets: Path, many: list[str]) -> list[list[int]]:
    path = str(assets / "tokenizers/llama2/tokenizer.model")
    return sentencepiece.SentencePieceProcessor(model_file=path).encode(many)


@pytest.fixture(scope="module")
def tiktoken_ids(tiktoken_encoding: tiktoken.Encoding, many: list[str]) -> list[list[int]]:
    return tiktoken_encoding.encode_ordinary_batch(many)


@pytest.fixture(scope="module")
def tiktoken_encoding(assets: Path) -> tiktoken.Encoding:
    ranks = read_ranks((assets / "tokenizers/llama3/tokenizer.model").read_bytes(), "")
    return tiktoken.Encoding("llama3", pat_str=LLAMA3, mergeable_ranks=ranks, special_tokens={})


def vectors(assets: Path, family: str) -> tuple[list[str], list[list[int]]]:
    """llama.cpp's texts and ids."""
    path = assets / f"tokenizers/vectors/ggml-vocab-llama-{family}.gguf"
    texts = Path(f"{path}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    ids = [[int(word) for word in line.split()] for line in Path(f"{path}.out").read_text().splitlines()]
    assert len(ids) == 46
    return texts[:46], ids


@pytest.mark.parametrize("chain", SPM)
def test_llama_2_in_every_form(
    chain: str, llama2: Tokenizer, from_gguf: Any, assets: Path, tmp_path: Path, many: list[str],
    spm_ids: list[list[int]],
) -> None:  # fmt: skip
    """A conversion that moves an id makes a model talk nonsense; here on 46 vectors and 10,000 texts."""
    tokenizer = SPM[chain](llama2, from_gguf, assets, tmp_path)
    given, ids = vectors(assets, "spm")
    assert tokenizer.encode_batch(given) == ids
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.stop_ids, tokenizer.adds_bos) == (32000, 1, [2], True)
    if tokenizer is llama2 or tokenizer.fingerprint != llama2.fingerprint:  # one file has one behaviour
        assert tokenizer.encode_batch(many) == spm_ids
    assert [tokenizer.decode(row) for row in spm_ids[:500]] == [text.replace("▁", " ") for text in many[:500]]


@pytest.mark.parametrize("chain", BPE)
def test_llama_3_in_every_form(
    chain: str, llama3: Tokenizer, from_gguf: Any, assets: Path, tmp_path: Path, many: list[str],
    tiktoken_ids: list[list[int]],
) -> None:  # fmt: skip
    """As with Llama 2, against tiktoken; GGUF files of April have their own names for control tokens."""
    tokenizer = BPE[chain](llama3, from_gguf, tmp_path)
    given, ids = vectors(assets, "bpe")
    assert tokenizer.encode_batch(given) == ids
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (128256, 128000, 128001)
    assert tokenizer.adds_bos
    assert tokenizer.special_tokens["<|eot_id|>"] == 128009
    if chain.startswith("tiktoken"):
        assert tokenizer.files["tokenizer.model"] == (assets / "tokenizers/llama3/tokenizer.model").read_bytes()
    if tokenizer is llama3 or tokenizer.fingerprint != llama3.fingerprint:
        assert tokenizer.encode_batch(many) == tiktoken_ids
    assert [tokenizer.decode(row) for row in tiktoken_ids[:500]] == many[:500]


def test_written_models_equal_the_originals(
    llama2: Tokenizer, from_gguf: Any, assets: Path, many: list[str], spm_ids: list[list[int]], tokenizer_folder: Path
) -> None:
    """The files other programs open: bytes where the format has one spelling, else what sentencepiece says of them."""
    original = (assets / "tokenizers/llama2/tokenizer.model").read_bytes()
    assert sentencepiece_model(llama2) == original
    assert llama2c_vocab(llama2) == (assets / "tokenizers/llama2/tokenizer.bin").read_bytes()
    theirs = sentencepiece.SentencePieceProcessor(model_proto=original)
    made = sentencepiece_model(from_gguf["spm"])
    ours = sentencepiece.SentencePieceProcessor(model_proto=made)
    assert ours.encode(many) == spm_ids
    for same in ("id_to_piece", "is_byte", "is_control", "is_unknown", "is_unused", "get_score"):
        ids = [*range(300), *range(300, 32000, 7), 31999]
        assert [getattr(ours, same)(i) for i in ids] == [getattr(theirs, same)(i) for i in ids], same
    assert (ours.bos_id(), ours.eos_id(), ours.pad_id(), ours.unk_id()) == (1, 2, -1, 0)
    bpe = Tokenizer(tokenizer_folder)
    assert tiktoken_ranks(llama2) is sentencepiece_model(bpe) is None
    with pytest.raises(DataError, match="SentencePiece"):
        llama2c_vocab(bpe)


@pytest.mark.parametrize("family", ["spm", "bpe"])
def test_gguf_metadata_survives(family: str, gguf: Any, from_gguf: dict[str, Tokenizer]) -> None:
    """GGUF -> tokenizer.json -> GGUF: tokens, scores, types, merges and ids as they were."""
    before, after = gguf[family], gguf_fields(from_gguf[family])
    assert after.pop("tokenizer.chat_template") == TEMPLATE
    known = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in before.items() if k.startswith("tokenizer.")}
    assert {key: after[key] for key in known} == known


def test_added_tokens_survive_gguf() -> None:
    """Fine-tunes add tokens at the end, and embeddings are padded beyond them: both have places in GGUF."""
    small = Tokenizer(spm_files(SMALL))
    grown = small.with_tokens(["<|im_start|>", "<|im_end|>"]).with_tokens(["abba"], special=False)
    size = small.vocab_size
    fields = gguf_fields(grown, size + 64)
    assert len(fields["tokenizer.ggml.tokens"]) == len(fields["tokenizer.ggml.scores"]) == size + 64
    assert fields["tokenizer.ggml.token_type"][size : size + 4] == [3, 3, 4, 5]
    again = Tokenizer(vocab_files(fields))
    for text in ("<|im_start|>user", "a abba <|im_end|>", f"[PAD{size + 10}]"):
        assert again.encode(text) == grown.encode(text)
        assert again.encode(text, special=True) == grown.encode(text, special=True)
    assert gguf_fields(again) == fields
    assert again.stop_ids == grown.stop_ids == [2, size + 1]


NAMES: dict[Names, dict[str, int]] = {
    "llama3": {"reserved_special_token_2": 4, "reserved_special_token_250": 255, "reserved_special_token_4": 8},
    "llama3.1": {
        "finetune_right_pad_id": 4, "reserved_special_token_2": 5, "eom_id": 8, "python_tag": 10,
        "reserved_special_token_3": 11, "reserved_special_token_247": 255,
    },
    "meta3.1": {
        "finetune_right_pad_id": 4, "step_id": 5, "eom_id": 8, "python_tag": 10, "image": 11,
        "reserved_special_token_2": 12, "reserved_special_token_245": 255,
    },
}  # fmt: skip


@pytest.mark.parametrize("names", NAMES)
def test_names_of_control_tokens(names: Names, tmp_path: Path) -> None:
    """The ids of Llama 3's control tokens never changed, their names did; April has no token to end a message."""
    (tmp_path / "tokenizer.model").write_bytes(write_ranks({bytes([i]): i for i in range(256)}))
    tokenizer = tokenizer_from(tmp_path, names)
    special = {token.strip("<|>"): id - 256 for token, id in tokenizer.special_tokens.items()}
    common = {"begin_of_text": 0, "end_of_text": 1, "start_header_id": 6, "end_header_id": 7, "eot_id": 9}
    assert {name: special[name] for name in NAMES[names] | common} == NAMES[names] | common
    assert len(special) == 256
    assert tokenizer.stop_ids == [257, 265] + [264] * (names != "llama3")
    assert (tokenizer.named_token("pad_token") is None) == (names == "llama3")


def test_golden_ids(llama2: Tokenizer, llama3: Tokenizer) -> None:
    """Ids published with the models, worked out with Meta's own code."""
    for text, ids in {
        "This is a test sentence.": [2028, 374, 264, 1296, 11914, 13], "Hello, world!": [9906, 11, 1917, 0],
        " Hello world": [22691, 1917], "\n\n": [271], "user": [882], "assistant": [78191], "system": [9125],
        "ipython": [23799, 4690], "12345678": [4513, 10961, 2495], "3.14159": [18, 13, 9335, 2946],
        "It's I'll DON'T": [2181, 596, 358, 3358, 45373, 17773], "🦙🚀": [9468, 99, 247, 9468, 248, 222],
        "привет мир": [8164, 105251, 8341, 115388], "日本語のテスト": [102433, 102158, 16144, 57933, 71634],
        "<|eot_id|>": [27, 91, 68, 354, 851, 91, 29], "a" * 20: [70540, 70540, 29558], "": [],
        "    def f(x):\n        return x + 1\n": [262, 711, 282, 2120, 997, 286, 471, 865, 489, 220, 16, 198],
    }.items():  # fmt: skip
        assert llama3.encode(text) == ids, text
    for text, ids in {
        "This is a test sentence.": [910, 338, 263, 1243, 10541, 29889], "Hello world": [15043, 3186],
        " Hello world": [29871, 15043, 3186], "\n": [29871, 13], " ": [259], "": [],
        "12345678": [29871, 29896, 29906, 29941, 29946, 29945, 29953, 29955, 29947],
        "🦙🚀": [29871, 243, 162, 169, 156, 243, 162, 157, 131], "привет мир": [1695, 7616, 4157, 29927],
        "</s>": [1533, 29879, 29958],
    }.items():  # fmt: skip
        assert llama2.encode(text) == ids, text


def test_a_tokenizer_is_found_in_any_file(assets: Path, llama2: Tokenizer, tmp_path: Path) -> None:
    """`puna tokenizer` takes what a user has: a file of any format, or a vocabulary alone in a GGUF."""
    llama2.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()  # some publish tokenizer.json alone
    folder = assets / "tokenizers"
    for name in (
        folder / "llama2/tokenizer.model", folder / "llama2/tokenizer.bin", tmp_path, tmp_path / "tokenizer.json",
        folder / "vectors/ggml-vocab-llama-spm.gguf",
    ):  # fmt: skip
        found = load_tokenizer(name)
        assert found.fingerprint == llama2.fingerprint
        assert (found.bos_id, found.stop_ids) == (1, [2])
    with pytest.raises(CheckpointError):
        load_tokenizer(assets / "checkpoints/stories260K/stories260K.bin.none")


def test_stories260k_vocabulary(assets: Path) -> None:
    """llama2.c's 512 pieces: the ids of its published sample, bytes for what it has no piece for."""
    stories = tokenizer_from(assets / "checkpoints/stories260K/tok512.bin")
    text = (assets / "checkpoints/stories260K/expected_greedy_200.txt").read_text(encoding="utf-8").strip("\n")
    assert stories.decode(stories.encode(text)) == text
    assert [stories.token(i) for i in stories.encode("Once upon a time")] == ["▁Once", "▁upon", "▁a", "▁time"]
    assert stories.encode("🦙")[-4:] == [3 + byte for byte in "🦙".encode()]
    assert stories.vocab_size == 512


def test_transformers_reads_what_was_converted(llama2: Tokenizer, tmp_path: Path) -> None:
    """The folder opens elsewhere with the same ids, BOS and stop."""
    llama2.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for text in ("  two spaces", "🦙 12345 don't\n\n", "日本"):
        assert theirs(text).input_ids == [1, *llama2.encode(text)]
        assert theirs.decode(llama2.encode(text)) == text
    assert theirs.eos_token_id == llama2.eos_id


@pytest.mark.parametrize("legacy", [True, False])
def test_what_transformers_saves(
    legacy: bool, llama2: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its newer files have another shape (Metaspace, no unknown token, no tokenizer.model) and have to go out too."""
    llama2.save(tmp_path)
    theirs = transformers.LlamaTokenizer.from_pretrained(str(tmp_path), legacy=legacy)
    theirs.save_pretrained(tmp_path / "saved")
    saved = tokenizer_from(tmp_path / "saved")
    assert (saved.bos_id, saved.stop_ids, saved.adds_bos) == (1, [2], True)
    with caplog.at_level("WARNING", "puna"):
        again = through_gguf(saved)
    assert "begins with a space" in caplog.text
    for text in ("Hello world", "\n", "🦙 12345", "don't", ""):
        assert saved.encode(text) == again.encode(text) == llama2.encode(text) == theirs.encode(text)[1:]
        assert saved.decode(saved.encode(text)) == text


@pytest.mark.parametrize("split", ["llama-bpe", "smollm", "gpt-2", "default"])
def test_splits_of_gguf(split: str, tokenizer_folder: Path) -> None:
    """A split that differs from llama.cpp's cuts numbers and punctuation elsewhere than in training."""
    word = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
    steps = {
        "llama-bpe": [LLAMA3], "smollm": [r"\p{N}", word], "gpt-2": [word],
        "default": [r"[\p{P}\$\+<=>\^\~\|]+", word, r"\p{N}+", "[0-9][0-9][0-9]"],
    }  # fmt: skip
    fields = gguf_fields(Tokenizer(tokenizer_folder)) | {"tokenizer.ggml.pre": split}
    tokenizer = Tokenizer(vocab_files(fields))
    assert gguf_fields(tokenizer) == fields
    for text in ("It's 12345 llamas!!  \n\n and $7.50, o.k.?", "x=[1,22];  don't\t", "日本 2024年"):
        parts = [text]
        for pattern in steps[split]:
            parts = [p for part in parts for p in regex.split(f"({pattern})", part) if p]
        cut = [text[a:b] for _, (a, b) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        assert cut == parts


def test_named_tokens_without_an_id_have_none_in_gguf(tokenizer_folder: Path) -> None:
    """Configs name a pad token that the vocabulary lacks, templates are not always UTF-8: the export broke off."""
    files = Tokenizer(tokenizer_folder).files
    config = {**json.loads(files["tokenizer_config.json"]), "pad_token": "[PAD]", "eot_token": "nowhere"}
    odd = {"tokenizer_config.json": json.dumps(config).encode(), "chat_template.jinja": b"\xff{{ x }}"}
    tokenizer = Tokenizer({**files, **odd})
    fields = gguf_fields(tokenizer)
    assert "tokenizer.ggml.padding_token_id" not in fields
    assert fields["tokenizer.ggml.eot_token_id"] == tokenizer.special_tokens["<|eot_id|>"]
    assert fields["tokenizer.chat_template"] == "\ufffd{{ x }}"


SPM_OTHERWISE: dict[str, Callable[[dict[str, Any]], None]] = {
    "lower case": lambda t: t["normalizer"]["normalizers"].append({"type": "Lowercase"}),
    "NFC inside": lambda t: t["normalizer"]["normalizers"].append(
        {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
    ),
    "another prefix": lambda t: t["normalizer"]["normalizers"][0].update(prepend="x"),
    "nothing for a space": lambda t: t["normalizer"]["normalizers"].pop(),
    "a split": lambda t: t.update(pre_tokenizer={"type": "Digits", "individual_digits": True}),
    "words apart": lambda t: t.update(
        normalizer=None,
        pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True},
    ),
}
BPE_OTHERWISE: dict[str, Callable[[dict[str, Any]], None]] = {
    "NFC": lambda t: t.update(normalizer={"type": "NFC"}),
    "a space before": lambda t: t["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
    "what is matched is lost": lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
    "inverted": lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(invert=True),
    "a word that is always one id": lambda t: t["added_tokens"][-1].update(special=False),
}


@pytest.mark.parametrize("name", [*SPM_OTHERWISE, *BPE_OTHERWISE])
def test_no_tokenizer_model_of_what_splits_otherwise(name: str, tokenizer_folder: Path) -> None:
    """A tokenizer.model beside a tokenizer.json that gives other ids: right here, nonsense in Meta's code."""
    spm = name in SPM_OTHERWISE
    tokenizer, write = (
        (Tokenizer(spm_files(SMALL)), sentencepiece_model) if spm else (Tokenizer(tokenizer_folder), tiktoken_ranks)
    )
    assert write(tokenizer)
    changed = tokenizer.parsed
    (SPM_OTHERWISE if spm else BPE_OTHERWISE)[name](changed)
    assert write(Tokenizer({**tokenizer.files, "tokenizer.json": json.dumps(changed).encode()})) is None


@pytest.mark.parametrize("family", ["llama2", "llama3"])
def test_a_million_of_anything(family: str, llama2: Tokenizer, llama3: Tokenizer) -> None:
    """tiktoken overflows its stack on a million spaces, and a quadratic merge would take hours."""
    tokenizer = llama2 if family == "llama2" else llama3
    for unit in (" ", "a", "\n", "7", " \n", "a1! \n🦙"):
        began = time.process_time()
        text = (unit * 1_000_000)[:1_000_000]
        ids = tokenizer.encode(text)
        assert time.process_time() - began < 5, unit
        assert text.encode().startswith(tokenizer.decode_bytes(ids[:1000]))


def test_long_runs_equal_metas_own_cut(llama3: Tokenizer, tiktoken_encoding: tiktoken.Encoding) -> None:
    """Meta's code cuts runs at 25,000 characters because tiktoken cannot take more; up to there ids are equal."""
    rng = random.Random(1)
    for text in (
        " " * 24_999 + "x",
        "a" * 24_999,
        "\n" * 25_000,
        "".join(rng.choices("ab ", k=100_000)),
        "! " * 50_000,
    ):
        assert llama3.encode(text) == tiktoken_encoding.encode_ordinary(text), text[:10]
