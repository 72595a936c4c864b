"""Encoded conversations on disk: flat arrays that are mapped, not read, with an index of fixed-size entries.

folder/index.json   counts, dtype, names of the sources, fingerprint, what the rows were made from
folder/ids.bin      ids of all rows, end to end (uint16, or uint32 above 65,536 ids)
folder/trained.bin  a bit an id: whether it is trained
folder/rows.bin     an ENTRY a row
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from puna.data.encode import Chunk, chunk_of
from puna.errors import DataError
from puna.files import write_json
from puna.tokenizer.chat.format import Encoded

_FORMAT = 1
ENTRY = np.dtype([("store", "u1"), ("source", "<u2"), ("length", "<i4"), ("start", "<i8"), ("draw", "<f8")])
"""Where a row lies, the number of its source's name, and what decides on its side of a split."""


class Store(NamedTuple):
    """The ids of rows end to end, and a bit for each."""

    ids: np.ndarray
    trained: np.ndarray  # uint8: eight ids each, the first one's bit the highest


class Rows(Sequence[Encoded]):
    """Encoded rows. What is taken from them, or joined to them, shares their arrays; only entries are copied."""

    def __init__(
        self,
        stores: Sequence[Store],
        entries: np.ndarray,
        names: Sequence[str],
        fingerprint: str,
        counts: Mapping[str, int] | None = None,
        folder: Path | None = None,
        selection: Mapping[str, Any] | None = None,
    ):
        self.stores, self.entries, self.names, self.fingerprint = list(stores), entries, list(names), fingerprint
        self.counts = dict(counts or {})
        """Of the conversations encoded: how many stayed whole, were cut, were dropped; and ids trained."""
        self.folder = folder
        self.selection = dict(selection or {})
        """What `select` kept and dropped of the conversations; empty where it drops nothing."""

    @classmethod
    def of(cls, rows: Sequence[Encoded], source: str = "") -> "Rows":
        """Rows in memory, of one source."""
        return cls.joining([chunk_of(rows, [source] * len(rows), {"whole": len(rows)})])

    @classmethod
    def joining(cls, chunks: Iterable[Chunk]) -> "Rows":
        """The rows of all chunks, in memory."""
        chunks = list(chunks) or [chunk_of([], [], {})]
        tally = _Tally()
        entries = np.concatenate([tally.add(chunk) for chunk in chunks])
        trained = np.concatenate([chunk.trained for chunk in chunks])
        store = Store(np.concatenate([chunk.ids for chunk in chunks]), np.packbits(trained))
        return cls([store], entries, list(tally.names), tally.fingerprint, tally.counts)

    @classmethod
    def open(cls, folder: Path) -> "Rows":
        """The rows that a RowWriter left in `folder`, mapped.

        Raises:
            DataError: they are not there, or not whole.
        """
        try:
            index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
            if index["format"] != _FORMAT:
                raise DataError(f"format {index['format']}, this version reads {_FORMAT}", where=folder)
            ids = _mapped(folder / "ids.bin", np.dtype(index["dtype"]).newbyteorder("<"), index["ids"])
            trained = _mapped(folder / "trained.bin", np.dtype("u1"), -(-index["ids"] // 8))
            entries = _mapped(folder / "rows.bin", ENTRY, index["rows"])
            told = index["names"], index["fingerprint"], index["counts"]
            return cls([Store(ids, trained)], entries, *told, folder, index["made_from"]["selection"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"no encoded rows: {error}", where=folder, cause="damage", fix="remove it") from None

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        ids, trained = self.read(range(len(self))[index])
        return Encoded(ids.tolist(), trained.tolist())

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids int64, trained bool) of a row."""
        entry = self.entries[index]
        ids, bits = self.stores[entry["store"]]
        start, end = int(entry["start"]), int(entry["start"]) + int(entry["length"])
        trained = np.unpackbits(bits[start // 8 : -(-end // 8)])[start % 8 :][: end - start]
        return ids[start:end].astype(np.int64), trained.astype(bool)

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) ids of each."""
        return np.ascontiguousarray(self.entries["length"])

    def taken(self, mask: np.ndarray) -> "Rows":
        """The rows where `mask` is true."""
        fingerprint = _hash(self.fingerprint, np.packbits(mask).tobytes())
        return Rows(self.stores, self.entries[mask], self.names, fingerprint, folder=self.folder)

    def joined(self, more: "Rows") -> "Rows":
        """These rows and then `more`."""
        names = list(dict.fromkeys([*self.names, *more.names]))
        entries = np.concatenate([self.entries, more.entries])
        numbers = np.array([names.index(name) for name in more.names], dtype=np.uint16)
        added = entries[len(self) :]
        added["source"] = numbers[added["source"]]
        added["store"] += len(self.stores)
        fingerprint = _hash(self.fingerprint, more.fingerprint.encode())
        return Rows([*self.stores, *more.stores], entries, names, fingerprint, folder=self.folder)


def split_rows(rows: Rows, share: float) -> tuple[Rows, Rows]:
    """(training, held out) by the hash of their ids: equal rows are on one side, and more rows move none."""
    held_out = rows.entries["draw"] < share
    return rows.taken(~held_out), rows.taken(held_out)


class RowWriter:
    """Writes chunks into `folder`, which nobody reads before `close`."""

    def __init__(self, folder: Path, vocab_size: int):
        self.folder, self.dtype = folder, np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._files = {name: (folder / f"{name}.bin").open("wb") for name in ("ids", "trained", "rows")}
        self._rest = np.empty(0, dtype=bool)  # of the trained bits: those that do not fill a byte yet
        self.tally = _Tally()

    def add(self, chunk: Chunk) -> None:
        chunk.ids.astype(self.dtype).tofile(self._files["ids"])
        self.tally.add(chunk).tofile(self._files["rows"])
        bits = np.concatenate([self._rest, chunk.trained])
        whole = len(bits) // 8 * 8
        np.packbits(bits[:whole]).tofile(self._files["trained"])
        self._rest = bits[whole:]

    def close(self, made_from: Mapping[str, Any]) -> None:
        """Write the index; `made_from` tells what the rows were encoded from and by."""
        np.packbits(self._rest).tofile(self._files["trained"])
        for file in self._files.values():
            file.close()
        tally = self.tally
        found = {"rows": tally.rows, "ids": tally.ids, "dtype": self.dtype.name, "names": list(tally.names)}
        more = {"counts": tally.counts, "fingerprint": tally.fingerprint, "made_from": dict(made_from)}
        write_json(self.folder / "index.json", {"format": _FORMAT, **found, **more})


class _Tally:
    """What is known of rows after some chunks of them; nothing depends on how they were cut into chunks."""

    def __init__(self) -> None:
        self.rows = self.ids = 0
        self.counts: Counter[str] = Counter(whole=0, cut=0, dropped=0, trained=0)
        self.names: dict[str, int] = {}
        self._hashes = [hashlib.sha256() for _ in range(4)]

    def add(self, chunk: Chunk) -> np.ndarray:
        """The entries of the chunk's rows."""
        entries = np.zeros(len(chunk.lengths), dtype=ENTRY)
        entries["length"], entries["draw"] = chunk.lengths, chunk.draws
        entries["start"] = self.ids + np.cumsum(chunk.lengths, dtype=np.int64) - chunk.lengths
        entries["source"] = [self.names.setdefault(name, len(self.names)) for name in chunk.sources]
        self.rows, self.ids = self.rows + len(entries), self.ids + len(chunk.ids)
        self.counts.update({**chunk.fates, "trained": int(chunk.trained.sum())})
        said = "".join(f"{name}\n" for name in chunk.sources).encode()
        streams = chunk.ids.astype("<u4"), chunk.trained.astype("u1"), chunk.lengths.astype("<i4")
        for digest, content in zip(self._hashes, (*(s.tobytes() for s in streams), said), strict=True):
            digest.update(content)
        return entries

    @property
    def fingerprint(self) -> str:
        """Of ids, trained bits, lengths and sources."""
        return _hash(*(digest.digest() for digest in self._hashes))


def _mapped(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    if path.stat().st_size != count * dtype.itemsize:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not {count * dtype.itemsize}")
    return np.memmap(path, dtype=dtype, mode="r") if count else np.empty(0, dtype)


def _hash(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return "sha256:" + digest.hexdigest()
