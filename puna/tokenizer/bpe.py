"""Train a Llama 3 tokenizer: byte-level BPE over Llama 3's split, 256 control ids at the end.

Written as `tokenizer.json` and as tiktoken ranks (`tokenizer.model`: a base64 token and its rank a line). Both give
the same ids: the merges in the JSON are all ways to make a token out of two, which is how tiktoken merges.
"""

import base64
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from puna.errors import DataError
from puna.tokenizer.tokenizer import Tokenizer

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Llama 3's pre-tokenizer pattern."""

_NAMED = {
    0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id", 7: "end_header_id",
    8: "eom_id", 9: "eot_id", 10: "python_tag",
}  # fmt: skip
N_SPECIAL = 256


def special_tokens() -> list[str]:
    """The 256 control tokens of Llama 3.1 and later, in id order (Hugging Face's names for the reserved ones)."""
    reserved = iter(range(N_SPECIAL))
    return [f"<|{_NAMED[i] if i in _NAMED else f'reserved_special_token_{next(reserved)}'}|>" for i in range(N_SPECIAL)]


def train_bpe(texts: Iterable[str], vocab_size: int) -> dict[bytes, int]:
    """Ranks of a byte-level BPE with `vocab_size` ids, the control ids included.

    Raises:
        DataError: the text is too small for that many ids.
    """
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = llama3_split()  # type: ignore[assignment]
    size = vocab_size - N_SPECIAL
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if size < len(alphabet):
        raise DataError(
            f"vocab_size={vocab_size} is too small",
            fix=f"vocab_size={N_SPECIAL + 256} or more: 256 bytes + 256 control ids",
        )
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    engine.train_from_iterator(texts, trainer)
    spelling = byte_of_character()
    ranks = {bytes(spelling[c] for c in token): rank for token, rank in engine.get_vocab().items()}
    if len(ranks) < size:
        raise DataError(
            f"the text has material for {len(ranks) + N_SPECIAL} ids, {vocab_size} were asked for",
            fix=f"vocab_size={len(ranks) + N_SPECIAL} or less, or more text",
        )
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def save_bpe(ranks: dict[bytes, int], folder: Path) -> None:
    """Write tokenizer.json, tokenizer.model (tiktoken ranks) and tokenizer_config.json."""
    specials = special_tokens()
    engine = tokenizers.Tokenizer(_bpe_model(ranks))
    engine.pre_tokenizer = llama3_split()  # type: ignore[assignment]
    engine.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    engine.add_special_tokens([tokenizers.AddedToken(s, special=True, normalized=False) for s in specials])
    bos = (specials[0], engine.token_to_id(specials[0]))
    engine.post_processor = processors.Sequence(  # type: ignore[assignment]
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]}:1 $B:1", special_tokens=[bos]
            ),
        ]
    )
    engine.save(str(folder / "tokenizer.json"))
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (folder / "tokenizer.model").write_text("".join(lines), encoding="ascii")
    Tokenizer.write_config(folder, bos_token=specials[0], eos_token=specials[1], pad_token="<|finetune_right_pad_id|>")


def byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-in of every byte, inverted."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(moved)}


def llama3_split() -> pre_tokenizers.PreTokenizer:
    """Llama 3's pre-tokenizer: the pattern, then bytes as printable characters."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _bpe_model(ranks: dict[bytes, int]) -> models.BPE:
    character = {b: c for c, b in byte_of_character().items()}
    spell = {token: "".join(character[b] for b in token) for token in ranks}
    merges = []
    for token in ranks:
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(ranks[a], ranks[b], spell[a], spell[b]) for a, b in halves if a in ranks and b in ranks]
        merges += [(a, b) for _, _, a, b in sorted(known)]
    return models.BPE(vocab={spell[t]: r for t, r in ranks.items()}, merges=merges, ignore_merges=True)
