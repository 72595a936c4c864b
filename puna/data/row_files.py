"""Files of rows as people have them (JSONL, JSON, Parquet, Arrow, CSV, TSV), read row by row, never whole."""

import codecs
import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from puna.data.json_stream import read_values
from puna.errors import DataError

_LINES, _VALUES, _CELLS = (".jsonl", ".ndjson"), (".json",), (".csv", ".tsv")
_TEXT = (*_LINES, *_VALUES, *_CELLS)
SUFFIXES = (*_TEXT, *(f"{suffix}.gz" for suffix in _TEXT), ".parquet", ".arrow")
_LONGEST = 16 << 20  # bytes of a row: one of a million tokens has four, and a file without line ends is no rows
Row = tuple[str, Mapping[str, Any]]
"""Where it stands (`file:line`, or the row's number in JSON, Parquet and Arrow), and its values by name."""


def read_rows(file: Path) -> Iterator[Row]:
    """The rows of one file, of which about the longest row is in memory at a time.

    A `.json` file may be a list of objects, or objects one after another.

    Raises:
        DataError: another kind of file, or one that is damaged, not UTF-8, or holds something else than objects.
    """
    kind = file.name.lower().removesuffix(".gz")
    read = _read_parquet if kind.endswith(".parquet") else _read_arrow if kind.endswith(".arrow") else None
    if not file.name.lower().endswith(SUFFIXES):
        raise DataError("not a file of rows", where=file, cause=f"puna reads {', '.join(SUFFIXES)}")
    try:
        if read:
            yield from _objects(enumerate(read(file), 1), file)
            return
        opened: Any = gzip.open if file.name.lower().endswith(".gz") else open
        with opened(file, "rb") as stream:
            if kind.endswith(_CELLS):
                yield from _objects(_read_cells(stream, file, kind.endswith(".tsv")), file)
            elif kind.endswith(_LINES):
                yield from _objects(_read_lines(stream, file), file)
            else:
                yield from _objects(enumerate(read_values(stream, str(file), _LONGEST), 1), file)
    except (OSError, EOFError, ValueError, zlib.error) as error:  # Arrow's errors are ValueErrors and OSErrors
        raise DataError(f"cannot be read: {error}", where=file, cause="a damaged or unreadable file") from None


def _objects(rows: Iterator[tuple[int, Any]] | enumerate[Any], file: Path) -> Iterator[Row]:
    for number, row in rows:
        if not isinstance(row, Mapping):
            raise DataError(f"a row is {type(row).__name__}, not an object", where=f"{file}:{number}")
        yield f"{file}:{number}", row


def parse_json(text: str, where: str) -> Any:
    """The value that `text` writes.

    Raises:
        DataError: none, or one nested beyond reason.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}", where=where) from None


def _read_lines(stream: BinaryIO, file: Path) -> Iterator[tuple[int, Any]]:
    for number, line in _decoded_lines(stream, file):
        if line.strip():
            yield number, parse_json(line, f"{file}:{number}")


def _decoded_lines(stream: BinaryIO, file: Path) -> Iterator[tuple[int, str]]:
    number = 0
    while line := stream.readline(_LONGEST + 1):
        number += 1
        if len(line) > _LONGEST:
            raise DataError(f"a line of more than {_LONGEST >> 20} MB", where=f"{file}:{number}", cause="no line ends")
        yield number, _decode(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, f"{file}:{number}")


def _decode(line: bytes, where: str) -> str:
    if 0 in line:
        raise DataError("a NUL byte", where=where, cause="a binary or damaged file, or UTF-16")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8: byte 0x{line[error.start]:02x} at place {error.start + 1}", where=where,
            cause="another encoding, such as Latin-1", fix="iconv -f latin1 -t utf-8",
        )  from None  # fmt: skip


def _read_cells(stream: BinaryIO, file: Path, tabs: bool) -> Iterator[tuple[int, Any]]:
    """Rows by the names of the first line; a quoted cell may hold line ends."""
    csv.field_size_limit(_LONGEST)  # of the whole process, there is no other; csv's own is a short conversation
    lines = (line for _, line in _decoded_lines(stream, file))
    first = next(lines, "")
    mark = "\t" if tabs else ";" if ";" in first and "," not in first else ","
    reader, start = csv.reader(chain([first], lines), delimiter=mark, strict=True), 1
    try:
        names = next(reader, [])
        if not all(names) or len(set(names)) < len(names):
            what = "the first line does not name every column once"
            raise DataError(what, where=f"{file}:1", cause=f"it is {first[:100].strip()!r}")
        start = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(names):
                what = f"{len(cells)} cells where the first line names {len(names)} columns"
                raise DataError(what, where=f"{file}:{start}", cause="a comma or quote in a cell without quotes")
            if cells:
                yield start, dict(zip(names, cells, strict=True))
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"not CSV: {error}", where=f"{file}:{start}", cause="a quote that is never closed") from None


def _read_parquet(file: Path) -> Iterator[Any]:
    import pyarrow.parquet

    # Streamed by pages: the default reads ahead a whole row group, which may be the whole file.
    table = pyarrow.parquet.ParquetFile(
        file, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True
    )  # fmt: skip
    for batch in table.iter_batches(batch_size=64, use_threads=False):
        yield from map(_own, batch.to_pylist())


def _read_arrow(file: Path) -> Iterator[Any]:
    """What `save_to_disk` of datasets writes: a stream, or a file with an index."""
    import pyarrow

    with pyarrow.OSFile(str(file)) as stream:
        indexed = stream.read(6) == b"ARROW1"
        stream.seek(0)
        if indexed:
            table = pyarrow.ipc.open_file(stream)
            batches = (table.get_batch(i) for i in range(table.num_record_batches))
        else:
            batches = iter(pyarrow.ipc.open_stream(stream))
        for batch in batches:
            for start in range(0, batch.num_rows, 64):
                yield from map(_own, batch.slice(start, 64).to_pylist())


def _own(value: Any) -> Any:
    """Less the fields without a value: Arrow gives every object the fields of all rows. Dates and decimals as text."""
    if isinstance(value, Mapping):
        return {name: _own(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_own(inner) for inner in value]
    return value if value is None or isinstance(value, str | int | float | bytes) else str(value)
