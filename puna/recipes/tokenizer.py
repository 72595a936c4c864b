"""Train a tokenizer: text -> tokenizer folder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from puna.config import RecipeConfig, UserPath
from puna.data.documents import SourceConfig, read_documents, split_documents
from puna.errors import DataError
from puna.files import atomic_folder
from puna.lineage import lineage, write_lineage
from puna.log import Progress, log
from puna.tokenizer.bpe import save_bpe, train_bpe
from puna.tokenizer.spm import save_spm, train_spm
from puna.tokenizer.tokenizer import Tokenizer


class Config(RecipeConfig):
    """Train a tokenizer on the training side of the sources."""

    recipe: Literal["tokenizer"] = "tokenizer"  # type: ignore[assignment]
    output: UserPath = Path("runs/tokenizer")
    """Folder to write: tokenizer.json, tokenizer.model, tokenizer_config.json."""
    sources: SourceConfig = SourceConfig()
    kind: Literal["bpe", "sentencepiece"] = "bpe"
    """bpe: Llama 3, byte-level, ends with 256 control ids. sentencepiece: Llama 1 and 2."""
    vocab_size: int = 4096
    """Ids in all. More: shorter sequences, a larger embedding. Llama 2 has 32,000, Llama 3 128,256."""
    max_bytes: int = 200_000_000
    """Text to learn from, at most; the first documents are taken. Merges settle long before this."""


def main(config: Config) -> Path:
    """Train, write, and report how well the tokenizer compresses."""
    with atomic_folder(config.output) as folder:
        with Progress("documents", None) as progress:
            texts = _texts(config, progress)
            if config.kind == "bpe":
                save_bpe(train_bpe(texts, config.vocab_size), folder)
            else:
                save_spm(train_spm(texts, config.vocab_size), folder)
        write_lineage(folder, lineage("tokenizer", config=config.model_dump(mode="json")))
    tokenizer = Tokenizer(config.output)
    log.info("tokenizer: %d ids in %s", tokenizer.vocab_size, config.output)
    return config.output


def _texts(config: Config, progress: Progress) -> Iterator[str]:
    size = count = 0
    for split, document in split_documents(read_documents(config.sources), config.sources):
        if split != "train":
            continue
        if size >= config.max_bytes:
            break
        size, count = size + len(document.text.encode()), count + 1
        progress.update(count, f"{size / 1e6:.1f} MB")
        yield document.text
    if not size:
        raise DataError("the sources hold no training text", where=config.sources.path or config.sources.packages)
    log.info("learning %d ids from %.1f MB in %d documents", config.vocab_size, size / 1e6, count)
