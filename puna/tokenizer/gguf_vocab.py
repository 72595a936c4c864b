"""The vocabulary inside a GGUF file as a tokenizer's files, and a tokenizer as GGUF metadata; every id kept.

GGUF has two families: `llama` (SentencePiece: tokens with scores) and `gpt2` (byte-level BPE: tokens and merges, and
under `pre` the name of a split whose pattern every reader must know).
"""

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from puna.errors import DataError
from puna.log import log
from puna.tokenizer import sentencepiece_model as sp
from puna.tokenizer.canonical import bos_first, merges_in, state, texts_in
from puna.tokenizer.checks import GPT2, LLAMA_CPP, MAX_IDS, MAX_MERGES, engine_errors
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
        named = (tokenizer.named_id(ours), *(tokenizer.special_tokens.get(end) for end in _ENDS.get(ours, ())))
        if (id := next((i for i in named if i is not None), None)) is not None:
            fields[f"{theirs}_token_id"] = id
    fields |= {"add_bos_token": tokenizer.adds_bos, "add_eos_token": False}
    template = tokenizer.files.get("chat_template.jinja")
    more = {"tokenizer.chat_template": template.decode("utf-8", errors="replace")} if template else {}
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
        engine.post_processor = bos_first(tokens[bos], bos)  # type: ignore[assignment]
    return {"tokenizer.json": engine.to_str(pretty=True).encode()}


def _bpe_fields(tokenizer: Tokenizer) -> dict[str, Any]:
    parsed = tokenizer.parsed
    model, added = parsed["model"], {token["content"]: token for token in parsed["added_tokens"]}
    splits = {state(make()): name for name, make in _SPLITS.items()}
    split = splits.get(state(tokenizer.pre_tokenizer))
    if model["type"] != "BPE" or split is None or parsed.get("normalizer"):
        raise DataError(
            "this tokenizer has no form in GGUF", where=tokenizer.where, cause="GGUF knows splits by name only",
            fix=f"one that splits like {', '.join(_SPLITS)}, or SentencePiece",
        )  # fmt: skip
    if bool(model.get("ignore_merges")) != (split == "llama-bpe"):
        log.warning(
            "%s: llama.cpp will%s merge words that are one token", tokenizer.where, " not" * (split == "llama-bpe")
        )
    if (texts := texts_in(parsed)) is None:
        raise DataError("there are gaps between the ids", where=tokenizer.where)

    def kind(i: int, text: str) -> int:
        if text in added:
            return sp.CONTROL if added[text]["special"] else sp.USER
        return sp.UNUSED if text == _padding(i) else sp.NORMAL

    kinds = [kind(i, text) for i, text in enumerate(texts)]
    merges = [" ".join(pair) for pair in merges_in(parsed)]
    return {"model": "gpt2", "pre": split, "tokens": texts, "token_type": kinds, "merges": merges}


def _padding(id: int) -> str:
    return f"[PAD{id}]"


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _default() -> pre_tokenizers.PreTokenizer:
    """What llama.cpp does for files that name no split."""
    patterns = (LLAMA_CPP, GPT2, r"\p{N}+", "[0-9][0-9][0-9]")
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
