"""Tokenizers that nobody made in good faith: a DataError at once, never a panic, a hang or a crash."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TEXT
from fuzz import resident_mib
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.errors import DataError
from puna.tokenizer.checks import KNOWN_PATTERNS, MAX_BYTES, MAX_IDS, engine_errors
from puna.tokenizer.formats import tokenizer_from
from puna.tokenizer.gguf_vocab import gguf_fields, vocab_files
from puna.tokenizer.llama2c_vocab import read_llama2c_vocab, write_llama2c_vocab
from puna.tokenizer.sentencepiece_model import Piece, Pieces, byte_pieces, read_sentencepiece, write_sentencepiece
from puna.tokenizer.spm_json import spm_files
from puna.tokenizer.tiktoken_model import read_ranks, write_ranks
from puna.tokenizer.tokenizer import Tokenizer

WORDS = ["▁", "a", "b", "c", "▁a", "ab", "▁ab", "abc", "▁abc"]
SPM = Pieces(
    [Piece("<unk>", 0.0, 2), Piece("<s>", 0.0, 3), Piece("</s>", 0.0, 3)]
    + [Piece(text, 0.0, 6) for text in byte_pieces()]
    + [Piece(text, float(-i), 1) for i, text in enumerate(WORDS)]
)
RANKS = {token: rank for rank, token in enumerate([*(bytes([b]) for b in range(256)), b"ab", b"abc", b" a"])}
Json = dict[str, Any]


def in_a_second(action: Callable[[], Any], mib: float = 64) -> None:
    """A DataError in a second of CPU and 64 MiB, those of the engine among them."""

    def refused() -> None:
        with pytest.raises(DataError):
            action()

    began = time.process_time()
    held = resident_mib(refused)
    assert time.process_time() - began < 1
    assert held < mib


def split(pattern: str) -> Json:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def added(id: Any, content: Any, special: bool = True) -> Json:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": id, "content": content, "special": special, **flags}


def replaced(what: str, by: str) -> Json:
    return {"type": "Replace", "pattern": {"String": what}, "content": by}


def sequence(name: str, *steps: Json) -> Json:
    return {"type": "Sequence", name: list(steps)}


def template(times: int, ids: int, texts: int = 1) -> Json:
    text, pair = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    tokens = {"A": {"id": "A", "ids": [1] * ids, "tokens": ["<s>"] * ids}}
    single = [{"SpecialToken": {"id": "A", "type_id": 0}}] * times + [text] * texts
    return {"type": "TemplateProcessing", "single": single, "pair": [text, pair], "special_tokens": tokens}


HOSTILE: dict[str, Callable[[Json], Any]] = {
    "nested quantifiers": lambda t: t.update(pre_tokenizer=split(r"(\s+)+$|(a|aa)+b")),
    "adjacent quantifiers": lambda t: t.update(pre_tokenizer=split(r"\s*\s*\s*x")),
    "quadratic": lambda t: t.update(pre_tokenizer=split(r"a+b")),
    "optional parts": lambda t: t.update(pre_tokenizer=split("a?" * 30 + "a{30}")),
    "bounded repeats": lambda t: t.update(pre_tokenizer=split("a{0,99}a{0,99}aaaaaaaa[^a]")),
    "a long tail": lambda t: t.update(pre_tokenizer=split("a?" + "a" * 5000 + "[^a]")),
    "many branches": lambda t: t.update(pre_tokenizer=split("|".join(["a{0,9}aaaa[^a]"] * 500))),
    "back reference": lambda t: t.update(pre_tokenizer=split(r"(.*)\1")),
    "a regex in the normalizer": lambda t: t.update(
        normalizer={"type": "Replace", "pattern": {"Regex": "(a+)+b"}, "content": ""}
    ),
    "not a regex": lambda t: t.update(pre_tokenizer=split("(")),
    "one id for two tokens": lambda t: t["model"]["vocab"].update({"zz": 3}),
    "a negative id": lambda t: t["model"]["vocab"].update({"zz": -1}),
    "a huge id": lambda t: t["model"]["vocab"].update({"zz": 1 << 40}),
    "an id of another type": lambda t: t["model"]["vocab"].update({"zz": 1.5}),
    "an id that is a word": lambda t: t["model"]["vocab"].update({"zz": "7"}),
    "an added id of another": lambda t: t["added_tokens"].append(added(5, "<|x|>")),
    "an added token's own id twice": lambda t: t["added_tokens"].extend([added(900, "<|x|>"), added(900, "<|y|>")]),
    "an added token twice": lambda t: t["added_tokens"].extend([added(900, "<|x|>"), added(901, "<|x|>")]),
    "an added token with another id": lambda t: t["added_tokens"].append(added(900, "<s>")),
    "a negative added id": lambda t: t["added_tokens"].append(added(-5, "<|x|>")),
    "an added id far away": lambda t: t["added_tokens"].append(added(MAX_IDS - 1, "<|x|>")),
    "an added token of nothing": lambda t: t["added_tokens"].append(added(900, "")),
    "a control token that is a word": lambda t: t["added_tokens"].append(added(900, "the")),
    "a control token of words": lambda t: t["added_tokens"].append(added(900, " of the ")),
    "a merge of strangers": lambda t: t["model"]["merges"].append(["q", "r"]),
    "a merge of one": lambda t: t["model"]["merges"].append(["ab"]),
    "a million merges": lambda t: t["model"].update(merges=["a b"] * 1_000_001),
    "a million pairs": lambda t: t["model"].update(merges=[["a", "b"]] * 1_000_001),
    "as many lists as are parsed": lambda t: t["model"].update(merges=[[]] * 1_990_000),
    "as many mappings as are parsed": lambda t: t["model"].update(merges=[{}] * 1_990_000),
    "dropout": lambda t: t["model"].update(dropout=0.5),
    "a bomb of a normalizer": lambda t: t.update(
        normalizer={"type": "Sequence", "normalizers": [replaced("a", "aa")] * 30}
    ),
    "a bomb inside a sequence": lambda t: t.update(
        normalizer=sequence("normalizers", sequence("normalizers", *[replaced("a", "aa")] * 30))
    ),
    "much before every text": lambda t: t.update(
        normalizer=sequence("normalizers", {"type": "Prepend", "prepend": "x y" * 1000})
    ),
    "much before every part of a word": lambda t: t["model"].update(continuing_subword_prefix="p" * 1000),
    "much after every word": lambda t: t["model"].update(end_of_word_suffix="p" * 1000),
    "a template of many ids": lambda t: t.update(post_processor=template(2000, 5000)),
    "a template of many ids inside a sequence": lambda t: t.update(
        post_processor=sequence("processors", template(2000, 5000))
    ),
    "templates that repeat the text": lambda t: t.update(
        post_processor=sequence("processors", *[template(0, 0, texts=9)] * 9)
    ),
    "another decoder": lambda t: t.update(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}),
    "no decoder": lambda t: t.update(decoder=None),
    "no model": lambda t: t.pop("model"),
    "a list for a model": lambda t: t.update(model=[]),
    "no vocabulary": lambda t: t["model"].pop("vocab"),
    "a list of added tokens that is none": lambda t: t.update(added_tokens={"a": 1}),
    "another model": lambda t: t["model"].update(type="Oracle"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_json(name: str) -> None:
    """The engine hangs, panics or silently gives wrong ids on these."""
    files = spm_files(SPM)
    parsed = json.loads(files["tokenizer.json"])
    HOSTILE[name](parsed)
    raw = json.dumps(parsed).encode()
    # as many items as the largest published tokenizer has take what its own take
    mib = 160 if raw.count(b",") > 900_000 else 64
    in_a_second(lambda: Tokenizer({**files, "tokenizer.json": raw}).encode(TEXT + "a" * 50_000), mib)


def test_files_that_are_no_json(tmp_path: Path) -> None:
    """Broken, deep, binary and endless files."""
    files = spm_files(SPM)
    for raw in (b"", b"{", b"[]", b"null", b"1", b"\xff\xfe", b"[" * 1_000_000, b'{"model": ' * 100_000):
        in_a_second(lambda raw=raw: Tokenizer({**files, "tokenizer.json": raw}))
    for raw in (b"", b"{", b"[]", b"null", b"[1, 2]"):
        if raw != b"[]":  # an empty list of pairs is an empty config
            in_a_second(lambda raw=raw: Tokenizer({**files, "tokenizer_config.json": raw}))
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # a sparse file: nothing is written, nothing may be read
    in_a_second(lambda: Tokenizer(tmp_path))
    path.rename(tmp_path / "tokenizer.model")
    in_a_second(lambda: tokenizer_from(tmp_path / "tokenizer.model"))
    in_a_second(lambda: tokenizer_from(tmp_path / "nothing.model"))


CONFIGS: list[Json] = [
    {"bos_token": 5}, {"bos_token": ["a"]}, {"eos_token": {"x": 1}}, {"eot_token": {"content": {}}},
    {"pad_token": True}, {"chat_template": [{"name": [], "template": "x"}]}, {"chat_template": "\ud800"},
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_hostile_config(config: Json) -> None:
    """A TypeError or KeyError long after loading, from whatever asks for BOS first."""
    files = spm_files(SPM)
    in_a_second(lambda: Tokenizer({**files, "tokenizer_config.json": json.dumps(config).encode()}))
    fine = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "pad_token": None}
    tokenizer = Tokenizer({**files, "tokenizer_config.json": json.dumps(fine).encode()})
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.named_id("pad_token")) == (1, 2, None)


def test_a_post_processor_that_panics_is_told() -> None:
    """Three parts of one template are more than the engine's next one can take: a panic, and no Exception."""
    files = spm_files(SPM)
    parsed = json.loads(files["tokenizer.json"])
    parsed["post_processor"] = sequence("processors", *[template(2, 1)] * 2)
    tokenizer = Tokenizer({**files, "tokenizer.json": json.dumps(parsed).encode()})
    with pytest.raises(DataError, match="post-processor"):
        _ = tokenizer.adds_bos


def test_a_token_inside_another_is_fine() -> None:
    """`<|x|>` inside `<|x|>y` is legal; the longest wins, and neither is made from text."""
    tokenizer = Tokenizer(spm_files(SPM)).with_tokens(["<|x|>", "<|x|>y", "[<|x|>"])
    size = len(SPM.pieces)
    assert tokenizer.encode("<|x|>y", special=True) == [size + 1]
    assert tokenizer.encode("[<|x|>y", special=True)[0] == size + 2
    assert not {size, size + 1, size + 2} & set(tokenizer.encode("<|x|>y[<|x|>"))


def test_panics_and_broken_text_are_told() -> None:
    """The engine's panics do not derive from Exception; half a surrogate pair is no text."""
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(DataError, match="onig"), engine_errors("this text", "here"):
        raise panic("onig: retry-limit-in-match over")
    with pytest.raises(KeyboardInterrupt), engine_errors("this text", "here"):
        raise KeyboardInterrupt
    with pytest.raises(DataError, match="cannot be encoded"):
        Tokenizer(spm_files(SPM)).encode("a\ud800b")


WORST = "a?a{0,9}" + "a" * 15 + "[^a]"  # of what is let through
OTHERS = [r"\p{N}", r"\w+|[^\w\s]+", r" ?\d{1,3}|[\r\n]+", r"\s", WORST]


@pytest.mark.parametrize("pattern", [*sorted(KNOWN_PATTERNS), *OTHERS])
def test_harmless_patterns_pass(pattern: str) -> None:
    """A guard that refuses what people use would be switched off."""
    files = spm_files(SPM)
    parsed = json.loads(files["tokenizer.json"])
    parsed["pre_tokenizer"] = split(pattern)
    began = time.process_time()
    ids = Tokenizer({**files, "tokenizer.json": json.dumps(parsed).encode()}).encode(
        TEXT + " " * 300_000 + "a" * 300_000
    )
    assert len(ids) > 300
    assert time.process_time() - began < 3


GGUF: dict[str, Callable[[Json], Any]] = {
    "a token twice": lambda m: m["tokens"].__setitem__(262, "a"),
    "an empty token": lambda m: m["tokens"].__setitem__(260, ""),
    "a byte below zero": lambda m: m["tokens"].__setitem__(5, "<0x-1>"),
    "a byte in small letters": lambda m: m["tokens"].__setitem__(13, "<0x0a>"),
    "a byte missing": lambda m: m["token_type"].__setitem__(5, 1),
    "a byte too many": lambda m: m["token_type"].__setitem__(262, 6),
    "a type that is none": lambda m: m["token_type"].__setitem__(262, 99),
    "types for some": lambda m: m.update(token_type=m["token_type"][:-1]),
    "scores for some": lambda m: m.update(scores=m["scores"][:-1]),
    "a score without end": lambda m: m["scores"].__setitem__(262, float("inf")),
    "a score that is no number": lambda m: m["scores"].__setitem__(262, float("nan")),
    "scores of words": lambda m: m.update(scores=["1"] * len(m["tokens"])),
    "tokens of numbers": lambda m: m.update(tokens=list(range(len(m["tokens"])))),
    "no tokens": lambda m: m.pop("tokens"),
    "no list": lambda m: m.update(tokens="abc"),
    "a negative BOS": lambda m: m.update(bos_token_id=-1),
    "a huge EOS": lambda m: m.update(eos_token_id=1 << 40),
    "a BOS of true": lambda m: m.update(bos_token_id=True),
    "two unknowns": lambda m: m["token_type"].__setitem__(262, 2),
    "another family": lambda m: m.update(model="bert"),
    "an unknown split": lambda m: m.update(model="gpt2", pre="surprise", merges=[]),
    "no merges": lambda m: m.update(model="gpt2", pre="smollm"),
    "a merge of one": lambda m: m.update(model="gpt2", pre="smollm", merges=["ab"]),
    "a merge of strangers": lambda m: m.update(model="gpt2", pre="smollm", merges=["q r"]),
    "no BOS to begin with": lambda m: (m.pop("bos_token_id"), m.update(model="gpt2", pre="llama-bpe", merges=[])),
    "a split that is a list": lambda m: m.update(model="gpt2", pre=["smollm"], merges=[]),
}


@pytest.mark.parametrize("name", GGUF)
def test_a_hostile_gguf_vocabulary(name: str) -> None:
    """llama.cpp crashed on `<0x-1>`; lists of unequal length read beyond their end."""
    fields = gguf_fields(Tokenizer(spm_files(SPM)))
    inner = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    GGUF[name](inner)
    in_a_second(lambda: Tokenizer(vocab_files({f"tokenizer.ggml.{key}": value for key, value in inner.items()})))


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_models_are_errors(data: st.DataObject) -> None:
    """Bytes changed, cut or added in any place: a DataError or a vocabulary that is whole, nothing else."""
    valid = {
        read_sentencepiece: write_sentencepiece(SPM), read_llama2c_vocab: write_llama2c_vocab(SPM),
        read_ranks: write_ranks(RANKS),
    }  # fmt: skip
    read, raw = data.draw(st.sampled_from(list(valid.items())))
    changed = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed) - 1))
        end = data.draw(st.integers(at, min(at + 8, len(changed))))
        changed[at:end] = data.draw(st.binary(max_size=8))
    try:
        found = read(bytes(changed), "file")
    except DataError:
        return
    if isinstance(found, Pieces):
        assert len({p.text for p in found.pieces}) == len(found.pieces)


def test_the_models_are_whole() -> None:
    """What the mutations start from has to be readable, or they prove nothing."""
    assert read_sentencepiece(write_sentencepiece(SPM), "") == SPM
    assert read_llama2c_vocab(write_llama2c_vocab(SPM), "") == SPM
    assert read_ranks(write_ranks(RANKS), "") == RANKS


@pytest.mark.parametrize("field", [41, 42])
def test_an_id_of_the_wrong_wire_type(field: int) -> None:
    """BOS or EOS as bytes: a TypeError from a comparison."""
    tag = bytes([(field << 3 | 2) & 0x7F | 0x80, field >> 4])
    trainer = tag + b"\x01x"
    in_a_second(lambda: read_sentencepiece(write_sentencepiece(SPM) + bytes([0x12, len(trainer)]) + trainer, "file"))
