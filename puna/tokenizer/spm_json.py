"""A Llama 1/2 vocabulary as `tokenizer.json`, and back: pieces with scores here, merges in order there.

SentencePiece merges the neighbours whose piece has the best score; `tokenizers` merges by the place in a list. Every
way to make a piece of two, best piece first, says the same.
"""

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers

from puna.errors import DataError
from puna.log import log
from puna.tokenizer import sentencepiece_model as sp
from puna.tokenizer.canonical import bos_first, merges_in, texts_in
from puna.tokenizer.checks import leaves
from puna.tokenizer.sentencepiece_model import Piece, Pieces
from puna.tokenizer.tokenizer import Tokenizer, tokenizer_config

_MODEL = "tokenizer.model"
_PREPEND = {"type": "Prepend", "prepend": sp.SPACE}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": sp.SPACE}


def spm_files(vocabulary: Pieces, add_bos: bool = True) -> dict[str, bytes]:
    """tokenizer.json, tokenizer.model (which has the scores) and tokenizer_config.json."""
    pieces = vocabulary.pieces
    unknown = next(p.text for p in pieces if p.kind == sp.UNKNOWN)
    engine = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece.text: i for i, piece in enumerate(pieces)},
            merges=merges_of(pieces),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = [normalizers.Prepend(sp.SPACE)] if vocabulary.add_prefix else []
    engine.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", sp.SPACE)])  # type: ignore[assignment]
    strip = [decoders.Strip(" ", 1, 0)] if vocabulary.add_prefix else []
    engine.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace(sp.SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    for piece in pieces:
        if piece.kind in (sp.UNKNOWN, sp.CONTROL, sp.USER):
            engine.add_tokens([tokenizers.AddedToken(piece.text, special=piece.kind != sp.USER, normalized=False)])
    bos, eos = pieces[vocabulary.bos].text, pieces[vocabulary.eos].text
    if add_bos:
        engine.post_processor = bos_first(bos, vocabulary.bos)  # type: ignore[assignment]
    return {
        "tokenizer.json": engine.to_str(pretty=True).encode(),
        "tokenizer_config.json": tokenizer_config(bos_token=bos, eos_token=eos, unk_token=unknown),
        _MODEL: sp.write_sentencepiece(vocabulary),
    }


def merges_of(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Every way to make a normal piece of two, best piece first."""
    normal = {piece.text: i for i, piece in enumerate(pieces) if piece.kind == sp.NORMAL}
    merges = []
    for text, i in normal.items():
        halves = [(text[:k], text[k:]) for k in range(1, len(text))]
        merges += [(-pieces[i].score, i, normal[a], normal[b], a, b) for a, b in halves if a in normal and b in normal]
    return [(a, b) for *_, a, b in sorted(merges)]


def pieces_of(tokenizer: Tokenizer) -> Pieces | None:
    """The vocabulary of a tokenizer of this family with its scores: those of its tokenizer.model, or made from the
    order of the merges; None where SentencePiece could not give the same ids.

    One difference is told and let pass, for newer files of Hugging Face all have it: their `Metaspace` puts no space
    before a text that begins with one.
    """
    parsed = tokenizer.parsed
    model, texts, prefix = parsed["model"], texts_in(parsed), _adds_prefix(parsed)
    if model["type"] != "BPE" or not model.get("byte_fallback") or texts is None or prefix is None:
        return None
    merges, known = merges_in(parsed), _stored_pieces(tokenizer)
    pieces = _made_pieces(tokenizer, parsed, texts, merges)
    if [p.text for p in known] == texts[: len(known)]:
        pieces[: len(known)] = known
    try:
        eos, bos = tokenizer.eos_id, tokenizer.bos_id
        vocabulary = sp.check(Pieces(pieces, bos, eos, prefix), tokenizer.where)
    except DataError:
        return None
    if not _same_merges(merges, pieces):
        return None
    if prefix and leaves(parsed.get("pre_tokenizer")):
        log.warning("%s: text that begins with a space gets other ids in SentencePiece and GGUF", tokenizer.where)
    return vocabulary


def _made_pieces(
    tokenizer: Tokenizer, parsed: Mapping[str, Any], texts: list[str], merges: list[tuple[str, str]]
) -> list[Piece]:
    """The pieces with the order of the merges for scores."""
    unknown = parsed["model"].get("unk_token") or tokenizer.named_token("unk_token") or "<unk>"
    special = {token["content"]: token["special"] for token in parsed["added_tokens"]}
    bytes_ = set(sp.byte_pieces())
    place: dict[str, int] = {}
    for a, b in merges:
        place.setdefault(a + b, len(place))

    def piece(i: int, text: str) -> Piece:
        if text == unknown:
            return Piece(text, 0.0, sp.UNKNOWN)
        if text in special:
            return Piece(text, 0.0, sp.CONTROL if special[text] else sp.USER)
        if text in bytes_:
            return Piece(text, 0.0, sp.BYTE)
        return Piece(text, float(-place.get(text, len(place) + i)), sp.NORMAL)

    return [piece(i, text) for i, text in enumerate(texts)]


def _same_merges(merges: list[tuple[str, str]], pieces: list[Piece]) -> bool:
    """Whether the list holds every merge, in the order of the scores."""
    rank = {piece.text: (-piece.score, i) for i, piece in enumerate(pieces)}
    order = [rank.get(a + b, (0.0, 0)) for a, b in merges]
    return order == sorted(order) and set(merges) == set(merges_of(pieces))


def _stored_pieces(tokenizer: Tokenizer) -> list[Piece]:
    raw = tokenizer.files.get(_MODEL)
    try:
        return sp.read_sentencepiece(raw, tokenizer.where).pieces if raw else []
    except DataError:
        return []


def _adds_prefix(parsed: Mapping[str, Any]) -> bool | None:
    """Whether a space is put before the text; None where the text is changed or split in other ways, too."""
    steps = leaves(parsed.get("normalizer")) + leaves(parsed.get("pre_tokenizer"))
    if steps in ([_PREPEND, _REPLACE], [_REPLACE]):
        return len(steps) == 2
    if [step["type"] for step in steps] != ["Metaspace"] or steps[0]["replacement"] != sp.SPACE:
        return None
    return None if steps[0].get("split", True) else steps[0].get("prepend_scheme") != "never"
