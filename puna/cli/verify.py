"""`puna verify`: is everything as it was written? With --against: do two models say the same?"""

import contextlib
import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from puna.cli.output import Json, print_json
from puna.errors import CheckpointError, DataError, PunaError, UsageError
from puna.files import MANIFEST, as_path, damage, read_manifest

_DATA, _MODEL = {"index.json", "tokenizer.json"}, {"config.json", "adapter_config.json", "params.json"}
_CHECKLIST = "checklist.chk"
_DTYPES = ("fp32", "fp64", "bf16")


class Checked(NamedTuple):
    """A folder or file: how much was looked at, by `hashes` or by its `header` alone, and what is wrong with it."""

    path: str
    files: int
    bytes: int
    by: str
    wrong: list[str]

    def line(self) -> str:
        """`ok   runs/a/final  5 files, 12.3 MB`."""
        files = f"{self.files} file" + "s" * (self.files != 1)
        doubt = "" if self.by == "hashes" else "; its header only, it holds no hashes"
        return f"{'BAD' if self.wrong else 'ok':3}  {self.path}  {files}, {self.bytes / 1e6:,.1f} MB{doubt}"


def register(app: typer.Typer) -> None:
    app.command("verify")(verify)


def verify(
    name: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="A run, model, adapter, shard or tokenizer folder, one of several of them, or a file."
        ),
    ],
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Compare what PATH and MODEL say, of any formats.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="With --against: what to ask, one a line.")] = None,
    text: Annotated[Path | None, typer.Option(help="With --against: a UTF-8 text for the perplexities.")] = None,
    budget: Annotated[
        float | None, typer.Option(help="Largest difference of a logit; by default it depends on what is compared.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most ids in an answer.", min=1)] = 32,
    dtype: Annotated[str, typer.Option(help="What both compute in: fp32, fp64 or bf16.")] = "fp32",
    as_json: bool = Json,
) -> None:
    """Compare every file with the hash it was written with; with --against, what two models say.

    Exit code 4 for a damaged model, 3 for damaged data, 5 for models that differ by more than the budget.
    """
    if against is not None:
        if dtype not in _DTYPES:
            raise UsageError(f"`{dtype}` is not a dtype", fix=f"--dtype {', '.join(_DTYPES)}")
        from puna.cli.compare import compare

        options = {"budget": budget, "max_tokens": max_tokens, "dtype": dtype}
        if not compare(name, against, as_json, prompts, text, **options):
            raise typer.Exit(5)
        return
    if prompts or text or budget is not None:
        raise UsageError("nothing to compare it with", fix=f"puna verify {name} --against MODEL")
    path = _found(name)
    found = [_folder(place) if place.is_dir() else _file(place) for place in _places(path)]
    if as_json:
        print_json([checked._asdict() for checked in found])
    else:
        for checked in found:
            print("\n".join([checked.line(), *(f"     {wrong}" for wrong in checked.wrong)]))
    if damaged := [checked.path for checked in found if checked.wrong]:
        kinds = {_kind(Path(place)) for place in damaged}
        raise (CheckpointError if CheckpointError in kinds else DataError)(
            f"{len(damaged)} of {len(found)} damaged: " + ", ".join(damaged),
            where=path,
            fix="fetch or make it again; a run that is not finished goes on from its newest whole checkpoint by itself",
        )


def _found(name: str) -> Path:
    """Where it lies: a path, or else what other verbs call a model.

    Raises:
        CheckpointError: nothing there.
    """
    if (path := as_path(name)).exists():
        return path
    from puna.checkpoint.registry import find_model

    if not (path := find_model(name)).exists():
        raise CheckpointError("no such file or folder", where=path, fix="puna runs ls")
    return path


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


def _file(path: Path) -> Checked:
    try:
        _reader(path)(path)
        wrong = []
    except CheckpointError as error:
        wrong = [error.what]
    return Checked(str(path), 1, path.stat().st_size, "header", wrong)


def _reader(path: Path) -> Callable[[Path], Any]:
    """Opens a file and checks that its header describes it: every tensor lies within.

    Raises:
        UsageError: nothing is known of such a file.
    """
    from puna.checkpoint.gguf.file import is_gguf, open_gguf
    from puna.checkpoint.llama2c import open_llama2c
    from puna.checkpoint.safetensors_file import read_header
    from puna.checkpoint.torch_file import open_torch_file
    from puna.tokenizer.formats import is_tokenizer

    if is_gguf(path) or path.suffix == ".gguf":
        return open_gguf
    if path.suffix == ".safetensors":
        return read_header
    if path.suffix in (".pth", ".pt") or zipfile.is_zipfile(path):
        return open_torch_file
    if path.suffix == ".bin" and not is_tokenizer(path):
        return open_llama2c
    fix = "the folder it is in, or puna verify A --against B of two models"
    raise UsageError("nothing to compare this file with: it holds no hashes", where=path, fix=fix)


def _kind(path: Path) -> type[PunaError]:
    """Of the error: a folder of shards or a tokenizer, and no model, is data."""
    names = {p.name for p in path.glob("*")}
    with contextlib.suppress(CheckpointError):
        names |= read_manifest(path).keys()  # the file that tells may be the one that is missing
    return DataError if _DATA & names and not _MODEL & names else CheckpointError
