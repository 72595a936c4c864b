"""Files are whole or absent, damage is found, a lock goes with its process, a full disk is told plainly."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from puna import files
from puna.errors import CheckpointError, ResourceError, UsageError
from puna.files import (
    MANIFEST,
    MARK,
    atomic_folder,
    hash_file,
    lock,
    require_space,
    sweep,
    temporary_name,
    verify,
    write_json,
    write_text,
)
from puna.log import Metrics, log


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def python(code: str, *args: object, before: Sequence[str] = ()) -> "subprocess.Popen[str]":
    """A process of its own, its output on pipes."""
    words = [*before, sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(code: str, *args: object, before: Sequence[str] = ()) -> tuple[int, str]:
    process = python(code, *args, before=before)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished atomic folder with files at two levels."""
    with atomic_folder(tmp_path / "a" / "whole") as made:
        write_json(made / "config.json", {"a": [1, 2, 3]})
        (made / "part").mkdir()
        (made / "part/weights.bin").write_bytes(random.Random(0).randbytes(500))
        (made / "part/empty").touch()
    return tmp_path / "a" / "whole"


def test_atomic_folder(folder: Path) -> None:
    """A finished folder holds its files and the manifest, stands alone, and matches."""
    assert listing(folder.parent / "whole") == [MANIFEST, "config.json", "part", "part/empty", "part/weights.bin"]
    assert [p.name for p in folder.parent.iterdir()] == ["whole"]
    assert json.loads((folder / MANIFEST).read_text())["files"]["part/weights.bin"]["bytes"] == 500
    verify(folder)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_atomic_folder_fails_whole(tmp_path: Path, error: type[BaseException]) -> None:
    """Half a model under its final name is loaded by the next program."""

    def half() -> None:
        with atomic_folder(tmp_path / "out") as made:
            (made / "half").write_text("x")
            raise error

    with pytest.raises(error):
        half()
    assert listing(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_atomic_folder_overwrites_nothing(tmp_path: Path, kind: str) -> None:
    """Yesterday's model is never written over, and the block does not start."""
    target = tmp_path / "out"
    target.mkdir() if kind == "folder" else target.write_text("old")
    with pytest.raises(UsageError, match="exists already"), atomic_folder(target):
        pytest.fail("the block was entered")
    assert listing(tmp_path) == ["out"]


def test_leftovers(tmp_path: Path) -> None:
    """A killed process leaves its temporary folder: the next writer sweeps it. A live one's is its own."""
    code = """
import os, signal, sys
from pathlib import Path
from puna.files import atomic_folder
with atomic_folder(Path(sys.argv[1])) as made:
    (made / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    status, errors = finished(code, tmp_path / "dead")
    assert status == -signal.SIGKILL, errors
    (left,) = listing(tmp_path)[:1]
    assert left.startswith(f".dead{MARK}")
    live, unrelated = tmp_path / f".x{MARK}{os.getppid()}", tmp_path / f".notes{MARK}old"
    live.mkdir()
    unrelated.mkdir()
    (tmp_path / f".config.json{MARK}999999999").write_text("half")
    with atomic_folder(tmp_path / "out") as made:
        write_text(made / "file", "x")
    assert {p.name for p in tmp_path.iterdir()} == {live.name, unrelated.name, "out"}


def test_leftover_with_our_own_number(tmp_path: Path) -> None:
    """In a container every start has the same process number: its own crash must not lock it out for ever."""
    left = temporary_name(tmp_path / "out")
    left.mkdir()
    (left / "half").write_text("x")
    with atomic_folder(tmp_path / "out") as made:
        write_text(made / "file", "x")
    assert listing(tmp_path / "out") == [MANIFEST, "file"]


def test_sweep_leaves_other_files(tmp_path: Path) -> None:
    """Only names this protocol makes are its own to remove."""
    for name in (
        "out",
        ".lock",
        f"a{MARK}999999999",
        ".tmp-x",
        f".a{MARK}",
        f".a{MARK}12x",
        ".a.puna-tmp-elsewhere-999999999",
    ):
        (tmp_path / name).touch()
    before = listing(tmp_path)
    sweep(tmp_path)
    assert listing(tmp_path) == before


def test_sweep_of_a_place_that_is_held(tmp_path: Path) -> None:
    """A container has another host name at each start: what crashed in it was left for good."""
    for name in ("out", ".lock", ".notes.puna-tmp-old", ".a.puna-tmp-elsewhere-999999999", f".b{MARK}{os.getpid()}"):
        (tmp_path / name).touch()
    sweep(tmp_path, held=True)
    assert listing(tmp_path) == [".lock", ".notes.puna-tmp-old", "out"]


def test_write_text(tmp_path: Path) -> None:
    """Content and encoding are as given, and nothing else stays behind."""
    file = tmp_path / "f.json"
    write_text(file, "old")
    write_json(file, {"é": "👍\n"})
    assert json.loads(file.read_bytes()) == {"é": "👍\n"}
    assert listing(tmp_path) == ["f.json"]


def test_write_text_that_fails_keeps_the_old(tmp_path: Path) -> None:
    """A lone surrogate cannot be encoded: the old content stays, no temporary file does."""
    file = tmp_path / "f"
    write_text(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "new " * 10_000 + "\ud800")
    assert file.read_text() == "old"
    assert listing(tmp_path) == ["f"]


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    """A reader beside a writer sees one whole version or another."""
    code = """
import sys
from pathlib import Path
from puna.files import write_text
for i in range(100):
    write_text(Path(sys.argv[1]), str(i % 10) * 100_000)
"""
    file = tmp_path / "f"
    write_text(file, "0" * 100_000)
    writer = python(code, file)
    seen = set()
    while writer.poll() is None:
        text = file.read_text()
        assert text == text[0] * 100_000
        seen.add(text[0])
    assert writer.wait() == 0, writer.communicate()
    writer.communicate()
    assert seen


def test_verify_names_what_is_wrong(folder: Path) -> None:
    """`damaged` without a name leaves the user to guess among a hundred files."""
    (folder / "config.json").unlink()
    (folder / "part/weights.bin").write_bytes(b"short")
    (folder / "part/new").touch()
    with pytest.raises(CheckpointError) as caught:
        verify(folder)
    message = str(caught.value)
    for part in ("config.json: missing", "part/weights.bin: changed", "part/new: not in the manifest", str(folder)):
        assert part in message
    assert "empty" not in message


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"format": 1, "files": []}'])
def test_verify_without_a_usable_manifest(folder: Path, content: str | None) -> None:
    """No manifest, half of one, or one without a list proves nothing, so it is an error."""
    (folder / MANIFEST).unlink() if content is None else (folder / MANIFEST).write_text(content)
    with pytest.raises(CheckpointError, match="whole"):
        verify(folder)


def test_verify_knows_its_format(folder: Path) -> None:
    """A manifest of a later format, or one whose format was damaged, must not be read as today's."""
    manifest = json.loads((folder / MANIFEST).read_text())
    write_json(folder / MANIFEST, {**manifest, "format": 3})
    with pytest.raises(CheckpointError, match="format"):
        verify(folder)


def test_verify_finds_any_flipped_bit(folder: Path) -> None:
    """One bit of a weight is a wrong model with a healthy face."""
    draw = random.Random(1)
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size]
    for _ in range(50):
        file = draw.choice(files)
        good = file.read_bytes()
        bad = bytearray(good)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        file.write_bytes(bad)
        with pytest.raises(CheckpointError):
            verify(folder)
        file.write_bytes(good)
    verify(folder)


def test_verify_names_what_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad sector in the newest checkpoint ended the resume, though the one before it was whole."""

    def broken(path: Path) -> str:
        if path.name == "weights.bin":
            raise OSError(5, "Input/output error")
        return hash_file(path)

    monkeypatch.setattr(files, "hash_file", broken)
    with pytest.raises(CheckpointError, match=r"part/weights\.bin: cannot be read: Input/output error"):
        verify(folder)


def test_a_damaged_row_is_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One flipped bit in a row of metrics ended every later start; dropped without a word it would be a silent hole."""
    rows = Metrics(tmp_path / "metrics.jsonl")
    for step in range(4):
        rows.write(step=step, loss=1.0)
    lines = rows.path.read_bytes().splitlines(keepends=True)
    lines[1], lines[2] = lines[1].replace(b"{", b"["), lines[2].replace(b"step", b"rtep")
    rows.path.write_bytes(b"".join(lines) + b'{"st')
    log.addHandler(caplog.handler)  # the command line's setup cuts the way to the root
    try:
        assert [row["step"] for row in rows.read()] == [0, 3]
    finally:
        log.removeHandler(caplog.handler)
    assert [f"metrics.jsonl:{n}: left out a damaged row" in caplog.text for n in (2, 3)] == [True, True]


def test_verify_covers_a_manifest_further_down(tmp_path: Path) -> None:
    """A folder copied with its own manifest into another is content like any other."""
    with atomic_folder(tmp_path / "outer") as made:
        (made / "inner").mkdir()
        write_json(made / "inner" / MANIFEST, {"format": 1, "files": {}})
    verify(tmp_path / "outer")
    (tmp_path / "outer" / "inner" / MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match="inner"):
        verify(tmp_path / "outer")


HOLD = """
import sys, time
from pathlib import Path
from puna.files import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_lock(tmp_path: Path) -> None:
    """Two runs in one folder mix their checkpoints; a lock that outlives a killed run blocks its resume."""
    holder = python(HOLD, tmp_path)
    try:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ResourceError, match=f"process {holder.pid}") as caught, lock(tmp_path):
            pytest.fail("two holders")
        assert str(tmp_path) in str(caught.value)
        assert caught.value.fix
    finally:
        holder.kill()
        holder.communicate()
    with lock(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
        status, errors = finished(HOLD, tmp_path)
        assert (status, f"process {os.getpid()}" in errors) == (1, True)
    with lock(tmp_path):
        pass


def test_require_space(tmp_path: Path) -> None:
    """A checkpoint that cannot fit is refused before the old one is touched."""
    require_space(tmp_path, 1)
    with pytest.raises(ResourceError, match="GB"):
        require_space(tmp_path, shutil.disk_usage(tmp_path).free)


Full = tuple[Path, list[str]]


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Full]:
    """A folder with old content and no room, and how to start a process that meets it.

    A full tmpfs; for a user who may not mount, a limit on the size of files, which fails the same calls.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)]
    may = os.getuid() == 0 and shutil.which("mount") is not None
    mounted = may and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        write_text(disk / "state.json", "old")
        if mounted:
            fill(disk / "filler")
        yield disk, [] if mounted else ["sh", "-c", 'ulimit -f 0 && exec "$@"', "sh"]
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)


def fill(file: Path) -> None:
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as stream:
        while stream.write(bytes(4096)):
            pass


WRITES = {
    "text": "write_text(disk / 'state.json', 'new' * 100_000)",
    "folder": """
with atomic_folder(disk / "model") as made:
    (made / "weights.bin").write_bytes(bytes(100_000))""",
}


@pytest.mark.parametrize("what", WRITES)
def test_full_disk(full: Full, what: str) -> None:
    """A full disk is exit code 6 and a plain sentence; what was there is intact, nothing half-written stays."""
    disk, before_it = full
    before = listing(disk)
    code = f"""
import sys
from pathlib import Path
from puna.errors import PunaError
from puna.files import atomic_folder, write_text
disk = Path(sys.argv[1])
try:
    {WRITES[what].strip().replace(chr(10), chr(10) + "    ")}
except PunaError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""
    status, errors = finished(code, disk, before=before_it)
    assert status == 6, errors
    assert "the disk is full" in errors
    assert str(disk) in errors
    assert (disk / "state.json").read_text() == "old"
    assert listing(disk) == before


def test_full_disk_on_the_command_line(full: Full) -> None:
    """A verb that meets a full disk says so with exit code 6, not `a bug in puna`, and leaves no empty file."""
    disk, before_it = full
    before = listing(disk)
    words = [*before_it, sys.executable, "-m", "puna", "cp", "debug", str(disk / "mine.yaml")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 6, done.stderr
    assert "disk is full" in done.stderr
    assert listing(disk) == before
