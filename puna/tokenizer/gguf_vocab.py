"""The vocabulary inside a GGUF file as a tokenizer's files, and a tokenizer as GGUF metadata; every id kept.

GGUF has two families: `llama` (SentencePiece: tokens with scores) and `gpt2` (byte-level BPE: tokens and merges, and
under `pre` the name of a split whose pattern every reader must know).
"""

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from puna.errors import DataError
from puna.tokenizer import sentencepiece_model as sp
from puna.tokenizer.checks import GPT2, MAX_IDS, MAX_MERGES, engine_errors
from puna.tokenizer.sentencepiece_model import Piece, Pieces
from puna.tokenizer.spm_json import pieces_of, spm_files
from puna.tokenizer.tiktoken_model import llama3_split
from puna.tokenizer.tokenizer import Tokenizer, tokenizer_config

_GGML = "tokenizer.ggml."
_NAMED = {
    "bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown", "eot_token": "eot",
    "eom_token": "eom",
}  # fmt: skip
_ENDS = {"eot_token": ("<|eot_id|>", "<|im_end|>"), "eom_token": ("<|eom_id|>",)}


def vocab_files(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json, tokenizer.model (of SentencePiece, for its scores) and
    chat_template.jinja (where there is one) of a GGUF's metadata.

    Raises:
        DataError: neither family, an unknown split, or a vocabulary that contradicts itself.
    """
    family = metadata.get(f"{_GGML}model")
    tokens, kinds = _texts(metadata, "tokens"), _numbers(metadata, "token_type")
    if len(tokens) != len(kinds) or len(set(tokens)) != len(tokens) or len(tokens) > MAX_IDS or not all(tokens):
        raise _wrong("repeated tokens, or a type for not every one")
    ids = _ids(metadata, len(tokens))
    if family == "llama":
        ids = {"bos_token": 1, "eos_token": 2, "unk_token": 0} | ids
        files = _spm_files(metadata, tokens, kinds, ids)
    elif family == "gpt2":
        files = _bpe_files(metadata, tokens, kinds, ids.get("bos_token"))
    else:
        raise _wrong(f"the embedded tokenizer is of the family {family!r}; llama and gpt2 are read", hostile=False)
    files["tokenizer_config.json"] = tokenizer_config(**{ours: tokens[i] for ours, i in ids.items()})
    if template := metadata.get("tokenizer.chat_template"):
        files["chat_template.jinja"] = str(template).encode("utf-8", errors="replace")
    return files


def gguf_fields(tokenizer: Tokenizer, size: int = 0) -> dict[str, Any]:
    """The tokenizer.ggml.* and tokenizer.chat_template metadata that give llama.cpp the same ids.

    Args:
        size: rows of the embedding; what the tokenizer has no token for is filled up as llama.cpp wants it.

    Raises:
        DataError: a tokenizer that GGUF has no words for.
    """
    vocabulary = pieces_of(tokenizer)
    fields = _bpe_fields(tokenizer) if vocabulary is None else _spm_fields(vocabulary)
    tokens: list[str] = fields["tokens"]
    padding = range(len(tokens), size)
    fields["tokens"] = tokens + [_padding(i) for i in padding]
    fields["token_type"] += [sp.UNUSED for _ in padding]
    if "scores" in fields:
        fields["scores"] += [-1e4 for _ in padding]
    for ours, theirs in _NAMED.items():
        ends = [t for t in _ENDS.get(ours, ()) if t in tokenizer.special_tokens]
        if token := tokenizer.named_token(ours) or next(iter(ends), None):
            fields[f"{theirs}_token_id"] = tokens.index(token)
    fields |= {"add_bos_token": tokenizer.adds_bos, "add_eos_token": False}
    template = tokenizer.files.get("chat_template.jinja")
    more = {"tokenizer.chat_template": template.decode("utf-8")} if template else {}
    return {_GGML + name: value for name, value in fields.items()} | more


def _spm_files(
    metadata: Mapping[str, Any], tokens: list[str], kinds: list[int], ids: Mapping[str, int]
) -> dict[str, bytes]:
    scores = [float(x) for x in _list(metadata, "scores", (int, float))]
    if len(scores) != len(tokens):
        raise _wrong("a score for not every token")
    pieces = [Piece(*row) for row in zip(tokens, scores, kinds, strict=True)]
    prefix = bool(metadata.get(f"{_GGML}add_space_prefix", True))
    vocabulary = sp.check(Pieces(pieces, ids["bos_token"], ids["eos_token"], prefix), "GGUF")
    return spm_files(vocabulary, add_bos=bool(metadata.get(f"{_GGML}add_bos_token", True)))


def _spm_fields(vocabulary: Pieces) -> dict[str, Any]:
    texts, scores, kinds = (list(column) for column in zip(*vocabulary.pieces, strict=True))
    return {
        "model": "llama", "pre": "default", "tokens": texts, "scores": scores, "token_type": kinds,
        "add_space_prefix": vocabulary.add_prefix,
    }  # fmt: skip


def _bpe_files(metadata: Mapping[str, Any], tokens: list[str], kinds: list[int], bos: int | None) -> dict[str, bytes]:
    split = str(metadata.get(f"{_GGML}pre", "default"))
    split = _ALIASES.get(split, split)
    if split not in _SPLITS:
        known = ", ".join(_SPLITS)
        raise _wrong(f"the embedded tokenizer splits text by {split!r}; known are {known}", hostile=False)
    halves = [m.partition(" ") for m in _texts(metadata, "merges")]
    merges = [(a, b) for a, _, b in halves]
    if len(merges) > MAX_MERGES or not all(a and b for a, b in merges):
        raise _wrong("merges that are not two tokens each, or too many")
    vocab = {token: i for i, token in enumerate(tokens)}
    with engine_errors("the embedded merges do not fit the vocabulary", "GGUF"):
        engine = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=split == "llama-bpe"))
    engine.pre_tokenizer = _SPLITS[split]()  # type: ignore[assignment]
    engine.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (sp.CONTROL, sp.UNKNOWN, sp.USER):
            engine.add_tokens([tokenizers.AddedToken(token, special=kind != sp.USER, normalized=False)])
    if metadata.get(f"{_GGML}add_bos_token", split == "llama-bpe"):
        if bos is None:
            raise _wrong("a text begins with BOS, and no BOS is named")
        name = tokens[bos]
        engine.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=[name, "$A"], pair=[name, "$A", f"{name}:1", "$B:1"], special_tokens=[(name, bos)]
        )
    return {"tokenizer.json": engine.to_str(pretty=True).encode()}


def _bpe_fields(tokenizer: Tokenizer) -> dict[str, Any]:
    parsed = tokenizer.parsed
    model, added = parsed["model"], {token["content"]: token for token in parsed["added_tokens"]}
    splits = {_state(make()): name for name, make in _SPLITS.items()}
    split = splits.get(_state(tokenizer.pre_tokenizer))
    if model["type"] != "BPE" or split is None or parsed["normalizer"]:
        raise DataError(
            "this tokenizer has no form in GGUF", where=tokenizer.where, cause="GGUF knows splits by name only",
            fix=f"one that splits like {', '.join(_SPLITS)}, or SentencePiece",
        )  # fmt: skip
    ids = {text: token["id"] for text, token in added.items()} | model["vocab"]
    texts = sorted(ids, key=ids.__getitem__)
    if [ids[t] for t in texts] != list(range(len(texts))):
        raise DataError("there are gaps between the ids", where=tokenizer.where)

    def kind(i: int, text: str) -> int:
        if text in added:
            return sp.CONTROL if added[text]["special"] else sp.USER
        return sp.UNUSED if text == _padding(i) else sp.NORMAL

    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    kinds = [kind(i, text) for i, text in enumerate(texts)]
    return {"model": "gpt2", "pre": split, "tokens": texts, "token_type": kinds, "merges": merges}


def _padding(id: int) -> str:
    return f"[PAD{id}]"


def _state(pre_tokenizer: Any) -> bytes:
    return pre_tokenizer.__getstate__() if pre_tokenizer is not None else b""


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _default() -> pre_tokenizers.PreTokenizer:
    """What llama.cpp does for files that name no split."""
    patterns = (r"[\p{P}\$\+<=>\^\~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")
    splits = [pre_tokenizers.Split(tokenizers.Regex(p), behavior="isolated") for p in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_SPLITS = {"llama-bpe": llama3_split, "smollm": _smollm, "gpt-2": _gpt2, "default": _default}
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}


def _ids(metadata: Mapping[str, Any], count: int) -> dict[str, int]:
    """The named ids that are given, by tokenizer_config.json's names."""
    found = {ours: metadata.get(f"{_GGML}{theirs}_token_id") for ours, theirs in _NAMED.items()}
    given = {ours: number for ours, number in found.items() if number is not None}
    for ours, number in given.items():
        if type(number) is not int or not 0 <= number < count:
            raise _wrong(f"{ours} is id {number!r}, the vocabulary has {count}")
    return given


def _texts(metadata: Mapping[str, Any], name: str) -> list[str]:
    return _list(metadata, name, (str,))


def _numbers(metadata: Mapping[str, Any], name: str) -> list[int]:
    return _list(metadata, name, (int,))


def _list(metadata: Mapping[str, Any], name: str, kinds: tuple[type, ...]) -> list[Any]:
    values = metadata.get(_GGML + name)
    if values is None:
        raise _wrong(f"no {_GGML}{name}")
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list) or any(type(v) not in kinds for v in values):
        raise _wrong(f"{_GGML}{name} is not a list of {kinds[0].__name__}")
    return values


def _wrong(what: str, hostile: bool = True) -> DataError:
    return DataError(what, where="GGUF", cause="a damaged or hostile file" if hostile else "another architecture")
