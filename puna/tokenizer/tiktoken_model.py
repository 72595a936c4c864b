"""Llama 3's `tokenizer.model`: tiktoken ranks (a base64 token and its rank a line), and its tables of control tokens.

The ids of the 256 control tokens never changed, their names did. Ranks give the same ids as `tokenizer.json` when the
merges there are all ways to make a token out of two, lowest rank first, which is how tiktoken merges.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Literal

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from puna.errors import DataError
from puna.tokenizer.canonical import bos_first, merges_in, state
from puna.tokenizer.checks import LLAMA3
from puna.tokenizer.decoding import byte_of_character
from puna.tokenizer.tokenizer import Tokenizer, tokenizer_config

Names = Literal["llama3", "llama3.1", "meta3.1"]
N_SPECIAL = 256
_PAD = "<|finetune_right_pad_id|>"
_COMMON = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
_LATER = {**_COMMON, 4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}
_NAMED: dict[Names, dict[int, str]] = {
    "llama3": _COMMON,  # April 2024
    "llama3.1": _LATER,  # as Hugging Face has 3.1 and later
    "meta3.1": {**_LATER, 5: "step_id", 11: "image"},  # as Meta's own code has them
}


def special_tokens(names: Names = "llama3.1") -> list[str]:
    """Llama 3's 256 control tokens in id order."""
    named, reserved = _NAMED[names], iter(range(N_SPECIAL))
    return [f"<|{named[i] if i in named else f'reserved_special_token_{next(reserved)}'}|>" for i in range(N_SPECIAL)]


def read_ranks(raw: bytes, where: object) -> dict[bytes, int]:
    """
    Raises:
        DataError: not such a file, or ranks that are not 0, 1, 2 ... with every byte among them.
    """
    try:
        rows = [line.split() for line in raw.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in rows}
    except (ValueError, binascii.Error):
        raise DataError("not tiktoken ranks", where=where, cause="another format, or damaged") from None
    if len(ranks) != len(rows) or sorted(ranks.values()) != list(range(len(ranks))):
        raise DataError("repeated tokens, or ranks that are not 0, 1, 2 ...", where=where, cause="a damaged file")
    if b"" in ranks or any(bytes([b]) not in ranks for b in range(256)):
        raise DataError("not every byte has a rank", where=where, cause="a damaged file")
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def write_ranks(ranks: Mapping[bytes, int]) -> bytes:
    """A base64 token and its rank a line."""
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


def bpe_files(ranks: Mapping[bytes, int], specials: Sequence[str]) -> dict[str, bytes]:
    """tokenizer.json, tokenizer.model and tokenizer_config.json; `specials` follow the ranks, BOS and EOS first."""
    character = {b: c for c, b in byte_of_character().items()}
    vocab = {"".join(character[b] for b in token): rank for token, rank in ranks.items()}
    engine = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges_of(ranks), ignore_merges=True))
    engine.pre_tokenizer = llama3_split()  # type: ignore[assignment]
    engine.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    engine.add_special_tokens([tokenizers.AddedToken(s, special=True, normalized=False) for s in specials])
    engine.post_processor = processors.Sequence(  # type: ignore[assignment]
        [processors.ByteLevel(trim_offsets=False), bos_first(specials[0], len(ranks))]
    )
    named = {"bos_token": specials[0], "eos_token": specials[1]}
    if _PAD in specials:
        named["pad_token"] = _PAD
    return {
        "tokenizer.json": engine.to_str(pretty=True).encode(),
        "tokenizer_config.json": tokenizer_config(**named),
        "tokenizer.model": write_ranks(ranks),
    }


def llama3_split() -> pre_tokenizers.PreTokenizer:
    """Llama 3's pre-tokenizer: the pattern, then bytes as printable characters."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(LLAMA3), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[str, str]]:
    """Every way to make a token of two, lowest rank first, in the spelling of tokenizer.json."""
    character = {b: c for c, b in byte_of_character().items()}
    spelled = {rank: "".join(character[b] for b in token) for token, rank in ranks.items()}
    merges = []
    for token in ranks:
        halves = ((ranks.get(token[:i]), ranks.get(token[i:])) for i in range(1, len(token)))
        known = sorted((a, b) for a, b in halves if a is not None and b is not None)
        merges += [(spelled[a], spelled[b]) for a, b in known]
    return merges


def ranks_of(tokenizer: Tokenizer) -> dict[bytes, int] | None:
    """The ranks of a tokenizer whose ids tiktoken would give; None where it would not."""
    parsed = tokenizer.parsed
    model, alphabet = parsed["model"], byte_of_character()
    if model["type"] != "BPE" or not model.get("ignore_merges"):
        return None
    if parsed.get("normalizer") or state(tokenizer.pre_tokenizer) != state(llama3_split()):
        return None
    added = {token["content"]: token["special"] for token in parsed["added_tokens"]}
    if not all(added.values()):  # a word that is always one id, which tiktoken has no way to say
        return None
    spelled = {text: rank for text, rank in model["vocab"].items() if text not in added}
    if any(c not in alphabet for text in spelled for c in text):
        return None
    ranks = {bytes(alphabet[c] for c in text): rank for text, rank in spelled.items()}
    merges = merges_in(parsed)
    ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
    made = [spelled.get(a + b, -1) for a, b in merges]
    whole = list(ranks.values()) == list(range(len(ranks))) and all(bytes([b]) in ranks for b in range(256))
    return ranks if whole and made == sorted(made) and set(merges) == set(merges_of(ranks)) else None
