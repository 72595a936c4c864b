"""Train a Llama 3 tokenizer: byte-level BPE over Llama 3's split, 256 control ids at the end.

Written as `tokenizer.json` and as tiktoken ranks (`tokenizer.model`), which give the same ids.
"""

from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from puna.errors import DataError
from puna.tokenizer.decoding import byte_of_character
from puna.tokenizer.tiktoken_model import N_SPECIAL, bpe_files, llama3_split, special_tokens


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
    for name, content in bpe_files(ranks, special_tokens()).items():
        (folder / name).write_bytes(content)
