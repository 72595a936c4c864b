"""Encode text into token shards: text + tokenizer -> shard folder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from puna.config import RecipeConfig, UserPath
from puna.data.documents import Document, SourceConfig, read_documents, split_documents
from puna.data.shards import ShardWriter, write_index
from puna.errors import DataError
from puna.files import atomic_folder
from puna.lineage import lineage, write_lineage
from puna.log import Progress, log
from puna.tokenizer.tokenizer import Tokenizer


class Config(RecipeConfig):
    """Encode the sources into train and valid shards."""

    recipe: Literal["data"] = "data"  # type: ignore[assignment]
    output: UserPath = Path("runs/data")
    """Folder to write: shards, index, and a copy of the tokenizer."""
    tokenizer: UserPath = Path("runs/tokenizer")
    """A tokenizer or model folder."""
    sources: SourceConfig = SourceConfig()


def main(config: Config) -> Path:
    """Write BOS + text + EOS of every document to its split."""
    tokenizer = Tokenizer(config.tokenizer)
    with atomic_folder(config.output) as folder:
        writers = {split: ShardWriter(folder, split, tokenizer.vocab_size) for split in ("train", "valid")}
        with Progress("documents", None) as progress:
            for count, (split, document, ids) in enumerate(_encoded(config.sources, tokenizer), 1):
                size = len(document.text.encode())
                writers[split].add([tokenizer.bos_id, *ids, tokenizer.eos_id], document.name, size)
                progress.update(count, f"{sum(w.bytes for w in writers.values()) / 1e6:.1f} MB")
        index = write_index(folder, list(writers.values()), tokenizer.fingerprint)
        if not index["splits"]["train"]["tokens"]:
            raise DataError("the sources hold no training text", where=config.sources.path or config.sources.packages)
        (folder / "tokenizer").mkdir()
        tokenizer.save(folder / "tokenizer")
        made_of = {"config": config.model_dump(mode="json"), "data": index["fingerprint"]}
        write_lineage(folder, lineage("data", [config.tokenizer], **made_of))
    for split, entry in index["splits"].items():
        ratio = entry["bytes"] / max(1, entry["tokens"])
        log.info(
            "%s: %s documents, %s tokens, %.2f bytes each",
            split,
            f"{entry['documents']:,}",
            f"{entry['tokens']:,}",
            ratio,
        )
    if not index["splits"]["valid"]["tokens"]:
        log.warning(
            "nothing is held out, so training cannot be validated; for another split: "
            "sources.valid_fraction=0.2, or sources.hold_out=[NAME], and another output=..."
        )
    return config.output


def _encoded(sources: SourceConfig, tokenizer: Tokenizer) -> Iterator[tuple[str, Document, list[int]]]:
    pairs = split_documents(read_documents(sources), sources)
    while group := list(_group(pairs)):
        encoded = tokenizer.encode_batch([document.text for _, document in group])
        yield from ((split, document, ids) for (split, document), ids in zip(group, encoded, strict=True))


def _group(pairs: Iterator[tuple[str, Document]], size: int = 4_000_000) -> Iterator[tuple[str, Document]]:
    """Documents of about `size` characters together: enough work for all cores, little memory."""
    for split, document in pairs:
        yield split, document
        size -= len(document.text)
        if size <= 0:
            return
