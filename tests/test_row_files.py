"""Files of rows: every kind read alike, none whole in memory, and what is wrong in one told with file:line."""

import contextlib
import csv
import gzip
import json
import random
import subprocess
import sys
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from puna.data.row_files import read_rows
from puna.errors import DataError

ROWS = [
    {"prompt": 'Say "a, b"', "completion": "a;\nb\r\n\tc"},
    {"prompt": "Größe 🦙", "completion": ""},
    {"prompt": "x" * 200_000, "completion": "long"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """`rows` as a file of the kind its name says."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "arrow":
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    elif kind in ("csv", "tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) if kind == "jsonl" else f"[{', '.join(lines)}]", encoding="utf-8")
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(path.read_bytes()))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "arrow", "jsonl.gz", "json.gz", "csv.gz"])
def test_every_kind_of_file_holds_the_same_rows(kind: str, tmp_path: Path) -> None:
    """Quotes, line ends in a cell, another script, a cell longer than csv's own limit: lost or cut in one format."""
    found = list(read_rows(write(tmp_path / f"rows.{kind}", ROWS)))
    assert [row for _, row in found] == ROWS
    assert all(where.startswith(f"{tmp_path}/rows.{kind}:") for where, _ in found)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_turn_s_date_is_text(kind: str, tmp_path: Path) -> None:
    """Chats with a timestamp in each turn were read until processes encode: no date can be sent to them."""
    turn = {"role": "user", "content": "Hi", "at": datetime(2023, 4, 9, 12, 30), "cost": Decimal("0.10"), "cut": None}
    path = write(tmp_path / f"a.{kind}", [{"messages": [turn], "day": date(2023, 4, 9)}])
    (_, row), *_ = read_rows(path)
    told = {"role": "user", "content": "Hi", "at": "2023-04-09 12:30:00", "cost": "0.10"}
    assert json.loads(json.dumps(row)) == {"messages": [told], "day": "2023-04-09"}


def test_json_in_every_layout(tmp_path: Path) -> None:
    """A `.json` of one object a line was one object to read; a pretty one, and one with a byte order mark, none."""
    rows = [{"a": i, "b": ["]", "{", {"c": '\\"'}]} for i in range(3)]
    lines, file = "\n".join(map(json.dumps, rows)), tmp_path / "rows.json"
    for text in (json.dumps(rows), json.dumps(rows, indent=4), lines, "\ufeff" + lines, f"\n{lines}\n\n"):
        file.write_text(text, encoding="utf-8")
        assert [row for _, row in read_rows(file)] == rows
    (tmp_path / "one.json").write_text(json.dumps(rows[0], indent=1))
    assert [row for _, row in read_rows(tmp_path / "one.json")] == rows[:1]
    for nothing in ("[]", "", " \n"):
        file.write_text(nothing)
        assert list(read_rows(file)) == []


def test_json_wherever_its_pieces_are_cut(tmp_path: Path) -> None:
    """A row, an escape or a character that lies over the border of two reads must not become another one."""
    for shift in (65_530, 65_535, 65_536, 131_071):
        rows = [{"a": "x" * shift}, {"a": 'é🦙\\"\n'}, {"a": 1234}, {"a": -1.5e-3, "b": True}]
        file = tmp_path / "rows.json"
        for text in (json.dumps(rows, ensure_ascii=False), json.dumps(rows), "\n".join(map(json.dumps, rows))):
            file.write_text(text, encoding="utf-8")
            assert [row for _, row in read_rows(file)] == rows


def test_semicolons_separate_where_commas_do_not(tmp_path: Path) -> None:
    """Spreadsheets of half the world write semicolons: the whole line was one column."""
    (tmp_path / "rows.csv").write_text("prompt;completion\r\n1,5;x\r\n\r\n", encoding="utf-8-sig")
    assert [row for _, row in read_rows(tmp_path / "rows.csv")] == [{"prompt": "1,5", "completion": "x"}]


@pytest.mark.parametrize(
    ("name", "content", "where", "what"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', ":2", "byte 0xff at place 8"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\x00"}\n', ":2", "a NUL byte"),
        ("a.jsonl", b'{"a": 1}\n{"a": 1\n', ":2", "not JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', ":2", "a row is list"),
        ("a.jsonl", b"[" * 200_000, ":1", "not JSON"),
        ("a.jsonl", b'\n{"a": ' + b"9" * 5000 + b"}", ":2", "not JSON"),
        ("a.jsonl", b"x" * (17 << 20), ":1", "a line of more than 16 MB"),
        ("a.jsonl", "é".encode("utf-16"), ":1", "a NUL byte"),
        ("a.json", b'[\n{"a": 1},\n{"a": "\xff"}]', ":3", "not UTF-8"),
        ("a.json", b'[\n{"a": 1},\n{"a": "\x00"}]', ":3", "a NUL byte"),
        ("a.json", b'[\n{"a": 1},\n{"a" 1}]', ":3", "not JSON"),
        ("a.json", b'[\n{"a": 1},\n', ":3", "cut short"),
        ("a.json", b'[\n{"a": 1},\n{"a": "x', ":3", "not JSON"),
        ("a.json", b'[\n{"a": 1},\n]', ":3", "a comma before the end"),
        ("a.json", b'[{"a": 1}\n{"a": 2}]', ":2", "no comma"),
        ("a.json", b'[{"a": 1}]\n{"a": 2}', ":2", "after the end"),
        ("a.json", b'{"a": 1}\n, {"a": 2}', ":2", "not JSON"),
        ("a.json", b"[" + b"[" * 200_000, ":1", "not JSON"),
        ("a.json", b'["a"]', ":1", "a row is str"),
        ("a.json", b'{"a": "' + b"x" * (17 << 20), ":1", "a row of more than 16 MB"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", ":3", "3 cells where the first line names 2"),
        ("a.csv", b'a,b\n"x\ny",2\n1\n', ":4", "1 cells"),
        ("a.csv", b'a,b\n1,2\n"x,2\n', ":3", "not CSV"),
        ("a.csv", b'a,b\n"x"y,2\n', ":2", "not CSV"),
        ("a.csv", b"a,b\n1,\xff\n", ":2", "not UTF-8"),
        ("a.csv", b"a,a\n1,2\n", ":1", "does not name every column once"),
        ("a.csv", b"a,\n1,2\n", ":1", "does not name every column once"),
        ("a.jsonl.gz", b"not gzip", "", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 1000)[:-20], "", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b"x" * (40 << 20)), ":1", "a line of more than 16 MB"),
        ("a.parquet", b"PAR1 nothing", "", "cannot be read"),
        ("a.arrow", b"ARROW1 nothing", "", "cannot be read"),
        ("a.arrow", b"nothing", "", "cannot be read"),
        ("a.xlsx", b"PK", "", "not a file of rows"),
        ("absent.jsonl", None, "", "cannot be read"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(
    name: str, content: bytes | None, where: str, what: str, tmp_path: Path
) -> None:
    """A traceback out of a reader, a row that is silently another, a file that eats all memory."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as told:
        list(read_rows(tmp_path / name))
    assert told.value.where == f"{tmp_path / name}{where}"
    assert what in told.value.what


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "arrow", "jsonl.gz"])
def test_damage_is_an_error_or_other_rows(kind: str, tmp_path: Path) -> None:
    """Whatever bytes a download broke: no traceback, no hang, no crash of the process."""
    file, draw = write(tmp_path / f"rows.{kind}", [{"a": f"x{i}", "b": 'y, "z"'} for i in range(5)]), random.Random(0)
    whole = file.read_bytes()
    for _ in range(150):
        raw = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
        file.write_bytes(raw[: draw.choice([len(raw), draw.randrange(len(raw))])])
        with contextlib.suppress(DataError):
            assert all(isinstance(row, dict) for _, row in read_rows(file))


_MEASURE = """
import sys
from pathlib import Path
from puna.data.row_files import read_rows
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
small, large = map(Path, sys.argv[1:])
list(read_rows(small))
idle = most = resident()
for number, _ in enumerate(read_rows(large)):
    if number % 500 == 0:
        most = max(most, resident())
print(number + 1, most - idle)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_a_file_of_200_mb_is_read_in_50(kind: str, tmp_path: Path) -> None:
    """A list of JSON, or a row group that is the whole table, used to be in memory at once."""
    small, large = tmp_path / f"small.{kind}", tmp_path / f"large.{kind}"
    rows = [{"prompt": f"{i} " + "ab cd " * 170, "completion": "ef gh " * 170} for i in range(100)]
    write(small, rows)
    if kind == "parquet":
        table = pyarrow.Table.from_pylist(rows)
        whole = pyarrow.concat_tables([table] * 1000).combine_chunks()
        pyarrow.parquet.write_table(whole, large, compression="none", use_dictionary=False, row_group_size=10**9)
    else:
        lines = [json.dumps(row) for row in rows]
        with large.open("w") as file:
            file.write("[" * (kind == "json"))
            for i in range(1000):
                file.write(
                    (",\n" * (i > 0) if kind == "json" else "") + (",\n" if kind == "json" else "\n").join(lines)
                )
                file.write("\n" * (kind == "jsonl"))
            file.write("]" * (kind == "json"))
    assert large.stat().st_size > 200e6
    done = subprocess.run([sys.executable, "-c", _MEASURE, small, large], capture_output=True, text=True, check=True)
    large.unlink()
    count, above = map(int, done.stdout.split())
    assert count == 100_000
    assert above < 50e6
