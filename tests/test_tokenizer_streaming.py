"""Ids back to bytes and text: whole, one by one, and broken."""

import codecs
import random
from pathlib import Path

import pytest
import sentencepiece
from conftest import TEXT
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.recipes import run
from puna.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module", params=["bpe", "sentencepiece"])
def tokenizer(
    request: pytest.FixtureRequest, texts: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    if request.param == "bpe":
        return Tokenizer(tokenizer_folder)
    words = {"sources.path": texts, "kind": "sentencepiece", "vocab_size": 400}
    return Tokenizer(run("tokenizer", output=tmp_path_factory.mktemp("spm") / "tokenizer", **words))


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_stream_is_the_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Half a character on a terminal, or a text that is lost or doubled between two pieces."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    special = data.draw(st.booleans())
    ids += tokenizer.encode(data.draw(st.text(max_size=12)))
    stream = tokenizer.stream(special=special)
    pieces = [stream.feed(i) for i in ids]
    assert "".join(pieces) + stream.end() == tokenizer.decode(ids, special=special)


def test_a_stream_never_splits_a_character(tokenizer: Tokenizer) -> None:
    """Valid text has no replacement character in any piece, and comes as early as it can."""
    text = f"{TEXT} 🦙🚀 日本語 é ñ"
    stream, seen = tokenizer.stream(), b""
    for i in tokenizer.encode(text):
        seen += stream.feed(i).encode()
        assert text.encode().startswith(seen)
        assert "\ufffd" not in seen.decode()
    assert seen.decode() == text
    assert stream.end() == ""


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    """What a model read has to be what was written; SentencePiece writes its space sign for a space."""
    came = tokenizer.decode(tokenizer.encode(text))
    assert came == text if "▁" not in text or came == text else came == text.replace("▁", " ")
    assert tokenizer.decode_bytes(tokenizer.encode(text)) == came.encode()


def test_bytes_are_kept_and_broken_ones_read_as_the_family_does(tokenizer: Tokenizer) -> None:
    """Ids of single bytes give back any bytes; what is no UTF-8 is replaced as sentencepiece and tiktoken do it."""
    rng = random.Random(0)
    byte_level = "<|eot_id|>" in tokenizer.special_tokens
    first = {tokenizer.decode_bytes([i]): i for i in reversed(range(tokenizer.vocab_size))}
    ids = {b: first[bytes([b])] if byte_level else 3 + b for b in range(256)}
    for _ in range(300):
        raw = rng.randbytes(rng.randrange(12))
        given = [ids[b] for b in raw]
        assert tokenizer.decode_bytes(given) == raw
        if byte_level:
            assert tokenizer.decode(given) == codecs.decode(raw, "utf-8", "replace")
        else:
            model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.files["tokenizer.model"])
            assert tokenizer.decode(given) == model.decode(given)


def test_ids_of_nothing(tokenizer: Tokenizer) -> None:
    """Rows of an embedding padded beyond the vocabulary can be sampled; they say nothing."""
    assert tokenizer.decode([tokenizer.vocab_size, 10**6]) == tokenizer.piece(tokenizer.vocab_size) == ""
