"""Is everything as it was written? Files against their manifest's hashes, or against what their header says."""

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from puna.errors import CheckpointError, DataError, PunaError
from puna.files import MANIFEST, damage, read_manifest

_DATA, _MODEL = {"index.json", "tokenizer.json"}, {"config.json", "adapter_config.json", "params.json"}
_CHECKLIST = "checklist.chk"


class Checked(NamedTuple):
    """A folder or file: how much was looked at, by `hashes` or by its `header` alone, and what is wrong with it."""

    path: str
    files: int
    bytes: int
    by: str
    wrong: list[str]

    @property
    def ok(self) -> bool:
        return not self.wrong

    def line(self) -> str:
        """`ok   runs/a/final  5 files, 12.3 MB`."""
        files = f"{self.files} file" + "s" * (self.files != 1)
        doubt = "" if self.by == "hashes" else "; its header only, it holds no hashes"
        return f"{'BAD' if self.wrong else 'ok':3}  {self.path}  {files}, {self.bytes / 1e6:,.1f} MB{doubt}"


def check(path: Path, open_file: Callable[[Path], Any]) -> list[Checked]:
    """What there is at `path`: a file, a folder, the parts of a run, or all that the folders in it are.

    Args:
        open_file: opens a single file, and raises where its header does not describe it.

    Raises:
        CheckpointError, DataError: nothing to compare it with.
    """
    return [_folder(place) if place.is_dir() else _file(place, open_file) for place in _places(path)]


def refuse_damage(path: Path, found: Sequence[Checked]) -> None:
    """
    Raises:
        CheckpointError, DataError: something of `found` is not as it was written.
    """
    damaged = [checked.path for checked in found if not checked.ok]
    if damaged:
        kinds = {_kind(Path(place)) for place in damaged}
        raise (CheckpointError if CheckpointError in kinds else DataError)(
            f"{len(damaged)} of {len(found)} damaged: " + ", ".join(damaged),
            where=path,
            fix="fetch or make it again; a run that is not finished goes on from its newest whole checkpoint by itself",
        )


def _places(path: Path) -> list[Path]:
    """What there is to check at `path`: itself, the parts of a run, or all that the folders in it are.

    Raises:
        CheckpointError, DataError: nothing to compare it with.
    """
    if path.is_file():
        return [path]
    folders = [path]
    if not _made(path) and not (path / _CHECKLIST).exists():
        inside = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not any(map(_made, inside)):
            raise _kind(path)(
                f"no {MANIFEST}, so nothing tells what its files should be", where=path,
                cause="puna did not make it, or not to its end; a model from elsewhere has no manifest",
                fix="its publisher's hashes, puna verify FILE.safetensors for a file's header, or --against MODEL",
            )  # fmt: skip
        # One that lost its manifest beside others is damage, not somebody's notes.
        folders = [p for p in inside if _made(p) or (_DATA | _MODEL) & {file.name for file in p.iterdir()}]
    places = [place for folder in folders for place in _parts(folder)]
    if not places:
        raise CheckpointError("nothing is saved in this run yet", where=path, fix=f"puna runs show {path}")
    return places


def _made(folder: Path) -> bool:
    """Whether it is a run, or has a manifest."""
    return any((folder / name).exists() for name in (MANIFEST, "resolved.yaml"))


def _parts(folder: Path) -> list[Path]:
    """Every checkpoint and the final model of a run; else the folder itself."""
    if (folder / MANIFEST).exists() or not (folder / "resolved.yaml").exists():
        return [folder]
    steps = [p for p in (folder / "checkpoints").glob("step-*") if p.name[5:].isdigit()]
    return [*sorted(steps, key=lambda p: int(p.name[5:])), *folder.glob("final")]


def _folder(path: Path) -> Checked:
    if (path / _CHECKLIST).exists() and not _made(path):
        return _meta_folder(path)
    sizes = [p.stat().st_size for p in path.rglob("*") if p.is_file() and p != path / MANIFEST]
    try:
        files, wrong = len(read_manifest(path)), damage(path)
    except CheckpointError as error:
        files, wrong = len(sizes), [error.what]
    return Checked(str(path), files, sum(sizes), "hashes", wrong)


def _meta_folder(path: Path) -> Checked:
    """What Meta publishes has a list of MD5 sums: they tell a broken download, not a stranger's file."""
    listed = [line.split() for line in (path / _CHECKLIST).read_text(encoding="utf-8", errors="replace").splitlines()]
    sums = {words[1].lstrip("*"): words[0] for words in listed if len(words) == 2}
    wrong = [f"{_CHECKLIST}: lists nothing"] * (not sums)
    for name, known in sums.items():
        if Path(name).name != name:  # a list may not send us elsewhere
            wrong.append(f"{name}: not a name in this folder")
        elif not (path / name).is_file():
            wrong.append(f"{name}: missing")
        elif _md5(path / name) != known:
            wrong.append(f"{name}: changed or damaged")
    sizes = [(path / name).stat().st_size for name in sums if Path(name).name == name and (path / name).is_file()]
    return Checked(str(path), len(sizes), sum(sizes), "hashes", wrong)


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _file(path: Path, open_file: Callable[[Path], Any]) -> Checked:
    try:
        open_file(path)
        wrong = []
    except CheckpointError as error:
        wrong = [error.what]
    return Checked(str(path), 1, path.stat().st_size, "header", wrong)


def _kind(path: Path) -> type[PunaError]:
    """Of the error: a folder of shards or a tokenizer, and no model, is data."""
    names = {p.name for p in path.glob("*")}
    with contextlib.suppress(CheckpointError):
        names |= read_manifest(path).keys()  # the file that tells may be the one that is missing
    return DataError if _DATA & names and not _MODEL & names else CheckpointError
