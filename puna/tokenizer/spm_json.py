"""A Llama 1/2 vocabulary as `tokenizer.json`, and back: pieces with scores here, merges in order there.

SentencePiece merges the neighbours whose piece has the best score; `tokenizers` merges by the place in a list. Every
way to make a piece of two, best piece first, says the same.
"""

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, processors

from puna.errors import DataError
from puna.tokenizer import sentencepiece_model as sp
from puna.tokenizer.sentencepiece_model import Piece, Pieces
from puna.tokenizer.tokenizer import Tokenizer, tokenizer_config

_MODEL = "tokenizer.model"


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
        engine.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, vocabulary.bos)]
        )
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
    order of the merges; None where SentencePiece could not give the same ids."""
    parsed = tokenizer.parsed
    model = parsed["model"]
    if model["type"] != "BPE" or not model.get("byte_fallback"):
        return None
    added = {token["content"]: token for token in parsed["added_tokens"]}
    ids = {text: token["id"] for text, token in added.items()} | model["vocab"]
    texts = sorted(ids, key=ids.__getitem__)
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    place: dict[str, int] = {}
    for a, b in merges:
        place.setdefault(a + b, len(place))

    def piece(i: int, text: str) -> Piece:
        if text == model["unk_token"]:
            return Piece(text, 0.0, sp.UNKNOWN)
        if text in added:
            return Piece(text, 0.0, sp.CONTROL if added[text]["special"] else sp.USER)
        if text in byte_texts:
            return Piece(text, 0.0, sp.BYTE)
        return Piece(text, float(-place.get(text, len(place) + i)), sp.NORMAL)

    byte_texts = set(sp.byte_pieces())
    pieces = [piece(i, text) for i, text in enumerate(texts)]
    known = _stored_pieces(tokenizer)
    if [p.text for p in known] == texts[: len(known)]:
        pieces[: len(known)] = known
    try:
        eos, bos = tokenizer.eos_id, tokenizer.bos_id
        vocabulary = sp.check(Pieces(pieces, bos, eos, _adds_prefix(parsed)), tokenizer.where)
    except DataError:
        return None
    gapless = [ids[text] for text in texts] == list(range(len(texts)))
    return vocabulary if gapless and _same_merges(merges, pieces) else None


def _same_merges(merges: list[Any], pieces: list[Piece]) -> bool:
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


def _adds_prefix(parsed: Mapping[str, Any]) -> bool:
    steps = [parsed.get("normalizer") or {}, parsed.get("pre_tokenizer") or {}]
    flat = [part for s in steps for part in s.get("normalizers", s.get("pretokenizers", [s]))]
    return any(
        part.get("type") == "Prepend" or (part.get("type") == "Metaspace" and part.get("prepend_scheme") != "never")
        for part in flat
    )
