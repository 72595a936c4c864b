"""Train a Llama 1/2 tokenizer: SentencePiece BPE, digits split, bytes as fallback (LLaMA 1 section 2.1).

Written as SentencePiece's own `tokenizer.model` and as `tokenizer.json`, which gives the same ids.
"""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, processors

from puna.errors import DataError
from puna.tokenizer.tokenizer import Tokenizer

_SPACE = "▁"


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
    (folder / "tokenizer.model").write_bytes(model)
    pieces = sentencepiece.SentencePieceProcessor()
    pieces.LoadFromSerializedProto(model)
    names = [pieces.IdToPiece(i) for i in range(len(pieces))]
    engine = tokenizers.Tokenizer(
        models.BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=_merges(pieces, names),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    engine.normalizer = normalizers.Sequence(  # type: ignore[assignment]
        [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
    )
    engine.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    engine.add_special_tokens(
        [tokenizers.AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")]
    )
    engine.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    engine.save(str(folder / "tokenizer.json"))
    Tokenizer.write_config(folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from (line for line in text.split("\n") if line)


def _merges(pieces: sentencepiece.SentencePieceProcessor, names: list[str]) -> list[tuple[str, str]]:
    """Every way to make a normal piece of two, best piece first: SentencePiece always merges the best-scored pair."""
    normal = {n: i for i, n in enumerate(names) if not (pieces.IsControl(i) or pieces.IsUnknown(i) or pieces.IsByte(i))}
    merges = []
    for name, i in normal.items():
        halves = [(name[:k], name[k:]) for k in range(1, len(name))]
        merges += [(-pieces.GetScore(i), normal[a], normal[b], a, b) for a, b in halves if a in normal and b in normal]
    return [(a, b) for *_, a, b in sorted(merges)]
