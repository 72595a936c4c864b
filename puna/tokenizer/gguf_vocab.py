"""The byte-level BPE vocabulary inside a GGUF file as a tokenizer's files, every id kept."""

import json
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from puna.errors import DataError
from puna.tokenizer.bpe import llama3_split

_CONTROL, _USER = 3, 4


def vocab_files(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja (where there is one) of a GGUF's metadata.

    Raises:
        DataError: not a byte-level BPE of a known split, or a vocabulary that contradicts itself.
    """
    family, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if family != "gpt2" or split not in _SPLITS:
        raise DataError(f"the embedded tokenizer ({family}, {split}) is not read yet", where="GGUF")
    tokens, kinds = _list(metadata, "tokens"), _list(metadata, "token_type")
    if len(tokens) != len(kinds) or len(set(tokens)) != len(tokens):
        raise DataError("the embedded vocabulary has repeated tokens or a type for not every one", where="GGUF")
    merges = [tuple(m.split(" ", 1)) for m in _list(metadata, "merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=split == "llama-bpe")
    except Exception as error:  # a merge of tokens that do not exist
        raise DataError(f"the embedded merges do not fit the vocabulary: {error}", where="GGUF") from None
    engine = tokenizers.Tokenizer(model)
    engine.pre_tokenizer = _SPLITS[split]()  # type: ignore[assignment]
    engine.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (_CONTROL, _USER):
            special = bool(kind == _CONTROL)
            add = engine.add_special_tokens if special else engine.add_tokens
            add([tokenizers.AddedToken(token, special=special, normalized=False)])
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for ours, theirs in (
        ("bos_token", "bos"),
        ("eos_token", "eos"),
        ("pad_token", "padding"),
        ("unk_token", "unknown"),
    ):
        number = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if isinstance(number, int) and number < len(tokens):
            config[ours] = tokens[number]
    if metadata.get("tokenizer.ggml.add_bos_token", split == "llama-bpe"):
        bos = (config["bos_token"], vocab[config["bos_token"]])
        engine.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]}:1 $B:1", special_tokens=[bos]
        )
    files = {"tokenizer.json": engine.to_str(), "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}
    if template := metadata.get("tokenizer.chat_template"):
        files["chat_template.jinja"] = str(template)
    return {name: text.encode() for name, text in files.items()}


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


_SPLITS = {"smollm": _smollm, "llama-bpe": llama3_split}


def _list(metadata: Mapping[str, Any], name: str) -> list[Any]:
    values = metadata.get(f"tokenizer.ggml.{name}")
    if values is None:
        raise DataError(f"no tokenizer.ggml.{name}", where="GGUF")
    return [v if isinstance(v, str) else int(v) for v in values]
