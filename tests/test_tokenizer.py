"""Trained tokenizers against tiktoken and sentencepiece, and control strings as text."""

import base64
import json
import random
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import transformers
from conftest import TEXT
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.errors import DataError
from puna.recipes import run
from puna.tokenizer.bpe import save_bpe, train_bpe
from puna.tokenizer.checks import LLAMA3 as SPLIT
from puna.tokenizer.decoding import byte_of_character
from puna.tokenizer.tiktoken_model import special_tokens
from puna.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def bpe(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer(tokenizer_folder)


@pytest.fixture(scope="module")
def spm(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    output = tmp_path_factory.mktemp("spm") / "tokenizer"
    words = {"sources.path": texts, "kind": "sentencepiece", "vocab_size": 400}
    return Tokenizer(run("tokenizer", output=output, **words))


@pytest.fixture(scope="module")
def ranks(bpe: Tokenizer) -> tiktoken.Encoding:
    """tiktoken on the ranks file we wrote."""
    lines = bpe.files["tokenizer.model"].splitlines()
    table = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    return tiktoken.Encoding("trained", pat_str=SPLIT, mergeable_ranks=table, special_tokens={})


def strings(count: int) -> list[str]:
    """Random text of what trips tokenizers: spaces, digits, contractions, broken and rare Unicode."""
    rng = random.Random(0)
    pieces = [
        *TEXT.split(),
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "'S",
        "don't",
        "12345",
        "é",
        "🦙",
        "日本",
        "\u0301",
        "\x00",
        "▁",
    ]
    return ["".join(rng.choice(pieces) for _ in range(rng.randint(0, 12))) for _ in range(count)]


def test_bpe_ids_equal_tiktoken(bpe: Tokenizer, ranks: tiktoken.Encoding) -> None:
    """Two readers of one folder that disagree on ids is a silent change of model."""
    for text in strings(3000):
        assert bpe.encode(text) == ranks.encode_ordinary(text), repr(text)


def test_spm_ids_equal_sentencepiece(spm: Tokenizer) -> None:
    """tokenizer.json and tokenizer.model of one folder must give the same ids."""
    theirs = sentencepiece.SentencePieceProcessor(model_proto=spm.files["tokenizer.model"])
    for text in strings(3000):
        assert spm.encode(text) == theirs.encode(text), repr(text)


def test_spm_follows_llama_2(spm: Tokenizer) -> None:
    """Digits are single, unknown characters become bytes, <s> </s> are 1 and 2."""
    assert (spm.bos_id, spm.eos_id, spm.stop_ids, spm.adds_bos) == (1, 2, [2], True)
    assert [spm.token(i) for i in spm.encode("345")][-3:] == ["3", "4", "5"]
    assert [spm.token(i) for i in spm.encode("🦙")][-4:] == ["<0xF0>", "<0x9F>", "<0xA6>", "<0x99>"]


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_bytes_round_trip(bpe: Tokenizer, text: str) -> None:
    """A byte-level tokenizer loses nothing, whatever the text."""
    assert bpe.decode(bpe.encode(text)) == text


def test_control_strings_are_text(bpe: Tokenizer, spm: Tokenizer) -> None:
    """Typed control strings that become control ids are an injected turn."""
    for tokenizer, string in ((bpe, "<|eot_id|>"), (bpe, "<|begin_of_text|>"), (spm, "</s>")):
        ids = tokenizer.encode(f"a{string}b")
        assert not set(ids) & set(tokenizer.special_tokens.values())
        assert tokenizer.decode(ids) == f"a{string}b"
        assert tokenizer.special_tokens[string] in tokenizer.encode(string, special=True)
        assert tokenizer.special_tokens[string] not in tokenizer.encode(string)  # the switch does not stick


def test_the_special_block_is_llama_3s(bpe: Tokenizer) -> None:
    """256 control ids after the text ids, in Llama 3.1's order."""
    base = bpe.vocab_size - 256
    at = {
        name: bpe.special_tokens[f"<|{name}|>"] - base for name in ("begin_of_text", "end_of_text", "eom_id", "eot_id")
    }
    assert at == {"begin_of_text": 0, "end_of_text": 1, "eom_id": 8, "eot_id": 9}
    assert special_tokens()[2:6] == [
        "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>",
    ]  # fmt: skip
    assert special_tokens()[255] == "<|reserved_special_token_247|>"
    assert bpe.stop_ids == [base + 1, base + 9, base + 8]


def test_transformers_reads_both(bpe: Tokenizer, spm: Tokenizer) -> None:
    """The folder has to give the same ids, BOS included, to those who open it with transformers."""
    for tokenizer in (bpe, spm):
        theirs = transformers.AutoTokenizer.from_pretrained(str(tokenizer.where))
        for text in (TEXT, "  two spaces", "🦙"):
            assert theirs(text).input_ids == [tokenizer.bos_id, *tokenizer.encode(text)]
        assert theirs.eos_token_id == tokenizer.eos_id


def test_training_is_deterministic() -> None:
    """Two trainings of one text that differ make every later artefact unrepeatable."""
    assert train_bpe([TEXT] * 3, 560) == train_bpe([TEXT] * 3, 560)


def test_too_many_ids_for_the_text_is_an_error() -> None:
    """A silently smaller vocabulary would surprise whoever sized a model for it."""
    with pytest.raises(DataError, match="vocab_size="):
        train_bpe(["abc"], 5000)
    with pytest.raises(DataError, match="too small"):
        train_bpe([TEXT], 400)


def test_damaged_files_name_themselves(bpe: Tokenizer, tmp_path: Path) -> None:
    """A tokenizer that cannot be read names the file."""
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)
    bpe.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)
    bpe.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<nope>"}))
    with pytest.raises(DataError, match="<nope>"):
        _ = Tokenizer(tmp_path).bos_id


def test_byte_alphabet_is_a_bijection() -> None:
    """256 bytes, 256 characters."""
    assert sorted(byte_of_character().values()) == list(range(256))


def test_real_llama_3_ranks(assets: Path, tmp_path: Path) -> None:
    """The golden ids of the real Llama 3 vocabulary, through the JSON we write from its ranks."""
    lines = (assets / "tokenizers/llama3/tokenizer.model").read_bytes().splitlines()
    save_bpe({base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}, tmp_path)
    real = Tokenizer(tmp_path)
    assert real.encode("It's I'll DON'T") == [2181, 596, 358, 3358, 45373, 17773]
    assert real.encode("12345678") == [4513, 10961, 2495]
    assert real.encode("日本語のテスト") == [102433, 102158, 16144, 57933, 71634]
    assert real.encode("<|eot_id|>") == [27, 91, 68, 354, 851, 91, 29]
    assert (real.bos_id, real.stop_ids) == (128000, [128001, 128009, 128008])
