"""Train a Llama 1/2 tokenizer: SentencePiece BPE, digits split, bytes as fallback (LLaMA 1 section 2.1).

Written as SentencePiece's own `tokenizer.model` and as `tokenizer.json`, which gives the same ids.
"""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from puna.errors import DataError
from puna.tokenizer.sentencepiece_model import read_sentencepiece
from puna.tokenizer.spm_json import spm_files


def train_spm(texts: Iterable[str], vocab_size: int) -> bytes:
    """A serialized SentencePiece model with the settings of Llama 1 and 2.

    Raises:
        DataError: the text is too small for that many ids.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.99995,
            split_digits=True,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentencepiece_length=16,
            max_sentence_length=1 << 24,
            unk_surface=" \u2047 ",
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(
            f"SentencePiece cannot make {vocab_size} pieces of this text",
            cause=str(error).rpartition("] ")[2].strip(),
            fix="a vocab_size between 300 and what the text holds",
        ) from None
    return model.getvalue()


def save_spm(model: bytes, folder: Path) -> None:
    """Write tokenizer.model, tokenizer.json and tokenizer_config.json."""
    files = spm_files(read_sentencepiece(model, "tokenizer.model"))
    for name, content in (files | {"tokenizer.model": model}).items():
        (folder / name).write_bytes(content)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from (line for line in text.split("\n") if line)
