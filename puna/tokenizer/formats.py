"""Every tokenizer a Llama came with, in and out: the file's content says which one it is, never its name.

Inside, there is one runtime and one form, tokenizer.json; everything else is converted here with every id kept.
"""

import re
from pathlib import Path

from puna.errors import DataError
from puna.tokenizer.llama2c_vocab import read_llama2c_vocab, write_llama2c_vocab
from puna.tokenizer.sentencepiece_model import read_sentencepiece, write_sentencepiece
from puna.tokenizer.spm_json import pieces_of, spm_files
from puna.tokenizer.tiktoken_model import Names, bpe_files, ranks_of, read_ranks, special_tokens, write_ranks
from puna.tokenizer.tokenizer import FILES, Tokenizer, read_file

_MODEL = "tokenizer.model"
_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s")


def tokenizer_from(path: Path, names: Names = "llama3.1") -> Tokenizer:
    """The tokenizer of a folder with tokenizer.json or tokenizer.model, or of one such file, or of a llama2.c .bin.

    Args:
        names: what the control tokens of tiktoken ranks are called (the file does not say): as in llama3 (April 2024),
            llama3.1 and later on Hugging Face, or meta3.1, the same in Meta's code.

    Raises:
        DataError: none of these, or damaged.
    """
    if path.name == "tokenizer.json":
        path = path.parent
    if not path.is_dir():
        return Tokenizer(_files_of(read_file(path), path, names))
    if (path / "tokenizer.json").exists() or not (path / _MODEL).exists():
        return Tokenizer(path)
    beside = {name: read_file(path / name) for name in FILES if (path / name).is_file()}
    return Tokenizer(_files_of(beside[_MODEL], path / _MODEL, names) | beside)


def is_tokenizer(path: Path) -> bool:
    """Whether `path` is something that `tokenizer_from` reads; a .bin is opened, for llama2.c's models end so too."""
    if path.is_dir():
        return any((path / name).is_file() for name in ("tokenizer.json", _MODEL))
    return path.name == "tokenizer.json" or path.suffix == ".model" or (path.suffix == ".bin" and _is_llama2c(path))


def sentencepiece_model(tokenizer: Tokenizer) -> bytes | None:
    """The tokenizer.model of a Llama 1/2 tokenizer: its own, or made from tokenizer.json; None for other families."""
    vocabulary = pieces_of(tokenizer)
    if vocabulary is None:
        return None
    own = tokenizer.files.get(_MODEL, b"")
    try:
        same = read_sentencepiece(own, tokenizer.where).pieces == vocabulary.pieces
    except DataError:
        same = False
    return own if same else write_sentencepiece(vocabulary)


def tiktoken_ranks(tokenizer: Tokenizer) -> bytes | None:
    """The tokenizer.model of a Llama 3 tokenizer, made from tokenizer.json; None for those tiktoken would disagree
    with."""
    ranks = ranks_of(tokenizer)
    return None if ranks is None else write_ranks(ranks)


def llama2c_vocab(tokenizer: Tokenizer) -> bytes:
    """The tokenizer.bin of llama2.c.

    Raises:
        DataError: not a Llama 1/2 tokenizer.
    """
    vocabulary = pieces_of(tokenizer)
    if vocabulary is None:
        raise DataError("llama2.c reads SentencePiece vocabularies only", where=tokenizer.where)
    return write_llama2c_vocab(vocabulary)


def _is_llama2c(path: Path) -> bool:
    try:
        read_llama2c_vocab(read_file(path), path)
    except DataError:
        return False
    return True


def _files_of(raw: bytes, where: Path, names: Names) -> dict[str, bytes]:
    if _RANK_LINE.match(raw):
        return bpe_files(read_ranks(raw, where), special_tokens(names))
    if raw[1:4] == b"\0\0\0":  # the longest piece's length; a SentencePiece model has its first piece's there
        return spm_files(read_llama2c_vocab(raw, where))
    return spm_files(read_sentencepiece(raw, where)) | {_MODEL: raw}
