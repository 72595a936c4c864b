"""Which files a source of rows names: one, a folder, a pattern, or a dataset of the Hugging Face hub's cache."""

import glob
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path

from puna.checkpoint.hub import cache_folder, find_cached, hub_name
from puna.config import nearest, nearest_path
from puna.data.row_files import SUFFIXES
from puna.errors import DataError, UsageError

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"), **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}  # fmt: skip
_SHARD = re.compile(r"([A-Za-z0-9_.]+?)-\d{5}-of-\d{5}")  # as the hub's own tools name the parts of a split
_ABOUT = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # of datasets' folders


def local_files(path: Path, split: str | None) -> list[Path]:
    """The file, those in a folder and below, or those that match a pattern (`rows/*.jsonl`), by name.

    Raises:
        DataError: none. UsageError: a folder with several splits, and none chosen.
    """
    if path.is_file():
        return [path]
    if path.is_dir():
        return _of_split({p.relative_to(path).as_posix(): p for p in _below(path)}, split, path)
    found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
    if not found:
        raise DataError("no such file" + nearest_path(path), where=path)
    root = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))  # its names tell of no split
    return _of_split({p.relative_to(root).as_posix(): p for p in found}, split, path) if split else found


def cached_files(dataset: str, pattern: str | None, split: str | None) -> list[Path]:
    """The files of a dataset in the hub's cache on this machine; the network is never asked.

    Args:
        dataset: `org/name` or `org/name@revision`.
        pattern: of names in the dataset, such as `main/*.parquet`.

    Raises:
        UsageError: no such name, several splits or subsets and none chosen. DataError: not in the cache.
    """
    name = hub_name(dataset)
    if name is None:
        raise UsageError(f"`{dataset}` is no dataset's name", fix="data.hub=ORG/NAME, or ORG/NAME@REVISION")
    folder = find_cached(name, "datasets")
    if folder is None:
        raise DataError(
            "not in the Hugging Face cache", where=dataset, cause=f"nothing of it in {cache_folder()}",
            fix=f"hf download {name.repo} --repo-type dataset --revision {name.revision}",
        )  # fmt: skip
    named = {p.relative_to(folder).as_posix(): p for p in _below(folder)}
    chosen = {n: p for n, p in named.items() if pattern is None or fnmatchcase(n, pattern)}
    if named and not chosen:
        raise UsageError(f"no file `{pattern}`" + nearest(str(pattern), list(named)), where=dataset, fix=_some(named))
    files = _of_split(chosen, split, Path(dataset))
    folders = sorted({n.rpartition("/")[0] for n, p in chosen.items() if p in files})
    if len(folders) > 1 and pattern is None:
        raise UsageError(f"several parts: {', '.join(folders)}", where=dataset, fix=f"data.file='{folders[-1]}/*'")
    return files


def split_of(name: str) -> str | None:
    """The split a file's name tells: `train` of `data/train-00000-of-00001.parquet`; None where it tells none."""
    if shard := _SHARD.search(name):
        return _SPLITS.get(shard[1], shard[1])
    words = re.split(r"[/._-]", name)
    return next((_SPLITS[word] for word in reversed(words) if word in _SPLITS), None)


def _below(folder: Path) -> Iterator[Path]:
    """Its files of rows in order; none that is hidden, or that only tells about the data."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.name.lower().endswith(SUFFIXES) and path.name not in _ABOUT and not hidden and path.is_file():
            yield path


def _of_split(named: dict[str, Path], split: str | None, where: Path) -> list[Path]:
    if not named:
        raise DataError("no files of rows here", where=where, cause=f"puna reads {', '.join(SUFFIXES)}")
    splits = {name: split_of(name) for name in named}
    # A folder that tells splits apart must not be trained on whole: its test set would be in it.
    known = sorted({found for found in splits.values() if found})
    wanted = _SPLITS.get(split, split) if split else None
    if wanted is None and len(known) > 1:
        raise UsageError(f"it has the splits {', '.join(known)}", where=where, fix=f"data.split={known[-1]}")
    files = [path for name, path in named.items() if wanted is None or splits[name] == wanted]
    if not files:
        raise UsageError(f"no split `{split}`", where=where, fix=f"data.split={' or '.join(known) or 'null'}")
    return files


def _some(names: Sequence[str] | dict[str, Path]) -> str:
    return ", ".join(list(names)[:8])
