"""Token shards on disk: flat little-endian ids, document offsets and provenance beside them, memory-mapped.

folder/index.json              dtype, tokenizer, fingerprint, the shards of each split with their counts
folder/train-00000.bin         ids of all documents, end to end (uint16, or uint32 above 65,536 ids)
folder/train-00000.offsets     int64, documents + 1 numbers: document i is ids[offsets[i]:offsets[i + 1]]
folder/train-00000.docs.jsonl  a row a document: name and bytes of its text
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from puna.config import nearest_path
from puna.errors import DataError
from puna.files import hash_file, write_json
from puna.log import log

_FORMAT = 1
INDEX = "index.json"


class ShardWriter:
    """Writes one split into `folder`. Takes ids; knows nothing of where they come from."""

    def __init__(self, folder: Path, split: str, vocab_size: int, shard_tokens: int = 1 << 28):
        self.folder, self.split, self.vocab_size, self.shard_tokens = folder, split, vocab_size, shard_tokens
        self.dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self.bytes = 0
        self._shards: list[dict[str, Any]] = []
        self._sources: list[dict[str, Any]] = []
        self._offsets: list[int] = []
        self._open: list[Any] = []

    def add(self, ids: Sequence[int], name: str, size: int) -> None:
        """Append a document of `size` bytes of text."""
        values = np.asarray(ids, dtype=np.int64)
        if values.size and not (values.min() >= 0 and values.max() < self.vocab_size):
            raise DataError(f"an id is outside 0..{self.vocab_size - 1}", where=name)
        if not self._open or self._offsets[-1] >= self.shard_tokens:
            self._next()
        values.astype(self.dtype).tofile(self._open[0])
        self._open[1].write(json.dumps({"name": name, "bytes": size}, ensure_ascii=False) + "\n")
        self._offsets.append(self._offsets[-1] + values.size)
        self.bytes += size
        if not self._sources or self._sources[-1]["name"] != source_of(name):
            self._sources.append({"name": source_of(name), "tokens": 0})
        self._sources[-1]["tokens"] += values.size

    def close(self) -> dict[str, Any]:
        """Finish the files; return the split's entry for the index."""
        self._end()
        counts = {k: sum(s[k] for s in self._shards) for k in ("tokens", "documents")}
        return {**counts, "bytes": self.bytes, "sources": self._sources, "shards": self._shards}

    def _next(self) -> None:
        self._end()
        stem = self.folder / f"{self.split}-{len(self._shards):05}"
        self._offsets = [0]
        self._open = [stem.with_suffix(".bin").open("wb"), stem.with_suffix(".docs.jsonl").open("w", encoding="utf-8")]

    def _end(self) -> None:
        if not self._open:
            return
        for file in self._open:
            file.close()
        stem = Path(self._open[0].name).with_suffix("")
        np.asarray(self._offsets, dtype="<i8").tofile(stem.with_suffix(".offsets"))
        digest = hash_file(stem.with_suffix(".bin"))
        self._shards.append(
            {"name": stem.name, "tokens": self._offsets[-1], "documents": len(self._offsets) - 1, "hash": digest}
        )
        self._open = []


def source_of(name: str) -> str:
    """The source of a document: the package or folder its name begins with, "text" for one at the top."""
    return name.partition("/")[0] if "/" in name else "text"


def write_index(folder: Path, writers: Sequence[ShardWriter], tokenizer: str) -> dict[str, Any]:
    """Close the writers and write index.json; `tokenizer` is the fingerprint of what made the ids."""
    splits = {w.split: w.close() for w in writers}
    hashes = [s["hash"] for split in splits.values() for s in split["shards"]]
    index = {
        "format": _FORMAT,
        "dtype": writers[0].dtype.name,
        "vocab_size": writers[0].vocab_size,
        "tokenizer": tokenizer,
        "fingerprint": "sha256:" + hashlib.sha256("\n".join([tokenizer, *hashes]).encode()).hexdigest(),
        "splits": splits,
    }
    write_json(folder / INDEX, index)
    return index


def read_index(folder: Path) -> dict[str, Any]:
    """index.json of a shard folder.

    Raises:
        DataError: no index, or one of another format.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except OSError:
        raise DataError(
            "no token shards here" + nearest_path(folder),
            where=folder,
            fix="puna run data sources.path=TEXTS output=FOLDER",
        ) from None
    except ValueError as error:
        raise DataError(f"damaged: {error}", where=folder / INDEX) from None
    if index.get("format") != _FORMAT:
        raise DataError(f"format {index.get('format')}, this version reads {_FORMAT}", where=folder / INDEX)
    return index


class Shards:
    """One split, seen as a single long array of ids."""

    def __init__(self, folder: Path, split: str):
        index = read_index(folder)
        if split not in index["splits"]:
            raise DataError(f"no split `{split}`", where=folder, cause=f"it has {', '.join(index['splits'])}")
        entry = index["splits"][split]
        self.folder, self.fingerprint, self.vocab_size = folder, index["fingerprint"], index["vocab_size"]
        self.tokens, self.documents, self.bytes = entry["tokens"], entry["documents"], entry["bytes"]
        self.sources = [(s["name"], s["tokens"]) for s in entry.get("sources", [])] or [("text", self.tokens)]
        """(name, tokens) of the stretches the split is made of, in order."""
        self.tells_sources = "sources" in entry  # shards of older versions do not
        self._hashes = {s["name"]: s["hash"] for s in entry["shards"]}
        self._names = [s["name"] for s in entry["shards"]]
        self._ids = [self._map(s, np.dtype(index["dtype"]).newbyteorder("<")) for s in entry["shards"]]
        self._starts = np.cumsum([0, *(len(ids) for ids in self._ids)])

    def read(self, start: int, length: int) -> np.ndarray:
        """ids[start : start + length] as int64, across shard borders."""
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts = []
        while length > 0:
            offset = start - self._starts[shard]
            parts.append(self._ids[shard][offset : offset + length])
            start, length, shard = start + len(parts[-1]), length - len(parts[-1]), shard + 1
        return np.concatenate(parts).astype(np.int64)

    def verify(self, up_to: int = 2_000_000_000) -> None:
        """Compare the shards' bytes with the hashes in the index; beyond `up_to` bytes only their sizes are known.

        Raises:
            DataError: naming the shard that changed.
        """
        if sum(ids.nbytes for ids in self._ids) > up_to:
            log.info("shards: sizes checked, content not (over %.0f GB)", up_to / 1e9)
            return
        for name, digest in self._hashes.items():
            if hash_file(self.folder / f"{name}.bin") != digest:
                raise DataError("changed since it was written", where=self.folder / f"{name}.bin", cause="damage")

    def document(self, index: int) -> tuple[dict[str, Any], np.ndarray]:
        """Provenance row and ids of the document with this number in the split."""
        if not 0 <= index < self.documents:
            raise DataError(f"no document {index}", where=self.folder, cause=f"the split has {self.documents}")
        number = index
        for name, ids in zip(self._names, self._ids, strict=True):
            offsets = np.fromfile(self.folder / f"{name}.offsets", dtype="<i8")
            if index < len(offsets) - 1:
                with (self.folder / f"{name}.docs.jsonl").open(encoding="utf-8") as rows:
                    row = next(line for i, line in enumerate(rows) if i == index)
                return json.loads(row), ids[offsets[index] : offsets[index + 1]].astype(np.int64)
            index -= len(offsets) - 1
        raise DataError(f"no document {number}", where=self.folder, cause="an index that contradicts itself")

    def _map(self, shard: dict[str, Any], dtype: np.dtype) -> np.ndarray:
        path = self.folder / f"{shard['name']}.bin"
        try:
            ids = np.memmap(path, dtype=dtype, mode="r") if shard["tokens"] else np.empty(0, dtype)
        except (OSError, ValueError) as error:
            raise DataError(f"cannot be mapped: {error}", where=path) from None
        if len(ids) != shard["tokens"]:
            raise DataError(
                f"holds {len(ids)} ids, the index says {shard['tokens']}", where=path, cause="a truncated shard"
            )
        return ids
