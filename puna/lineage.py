"""Lineage: what an artefact was made from, as the puna.json beside it.

It has no time and no machine in it: the same run gives the same bytes, whether or not it was interrupted.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from puna import __version__
from puna.files import MANIFEST, hash_file, write_json

LINEAGE = "puna.json"
_HEAD = 65536  # bytes of a foreign file that are hashed: its header, and so names, shapes and offsets of its tensors
_LARGEST = 2_000_000  # bytes of a puna.json: JSON of `[]` grows 25-fold in memory
_INSIDE = {"tokenizer": "tokenizer.json", "template": "chat_template.jinja"}


def lineage(recipe: str, parents: Iterable[str | Path | Mapping[str, Any]] = (), **more: Any) -> dict[str, Any]:
    """What a puna.json says.

    Args:
        recipe: the recipe or verb that makes it.
        parents: what it is made from: files and folders, or what is known of one that is neither.
        more: config, data (a fingerprint), metrics and the like.
    """
    named = [dict(p) if isinstance(p, Mapping) else parent(p) for p in parents]
    made_by = {"format": 1, "puna": __version__, "code": code_version(), "recipe": recipe}
    return {**made_by, "parents": named, **more}


def write_lineage(folder: Path, made_from: Mapping[str, Any]) -> None:
    """puna.json in an artefact's folder, with the hashes of the tokenizer and the chat template that lie there."""
    hashes = {key: hash_file(folder / name) for key, name in _INSIDE.items() if (folder / name).is_file()}
    write_json(folder / LINEAGE, {**made_from, **hashes})


def parent(name: str | Path, found: Path | None = None) -> dict[str, Any]:
    """A parent by its name and what it was at the time; `found` is where it lies, if its name is not its place."""
    return {"path": str(name), "fingerprint": fingerprint(found or Path(name))}


def fingerprint(path: Path) -> str | None:
    """Tells whether something is still what it was, in milliseconds also for 100 GB; None where nothing is.

    With a manifest it is that one's hash, so any bit of any file counts. Else names, sizes and beginnings of the files.
    """
    if (path / MANIFEST).is_file():
        return hash_file(path / MANIFEST)
    files = [path] if path.is_file() else sorted(p for p in path.glob("*") if p.is_file() and p.name[0] != ".")
    if not files:
        return None
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            head = opened.read(_HEAD)
        found.update(f"{file.name} {file.stat().st_size} {hashlib.sha256(head).hexdigest()}\n".encode())
    return "heads:sha256:" + found.hexdigest()


def parents_of(made_from: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parents that a puna.json names; early ones are names alone."""
    listed = made_from.get("parents")
    named = [{"path": p} if isinstance(p, str) else p for p in (listed if isinstance(listed, list) else [])]
    return [p for p in named if isinstance(p, dict) and isinstance(p.get("path"), str)]


def read_lineage(folder: Path) -> dict[str, Any]:
    """What a folder's puna.json says; nothing where there is none, or none that can be read."""
    return read_lineage_file(folder / LINEAGE)


def read_lineage_file(file: Path) -> dict[str, Any]:
    """`read_lineage` of a file with another name."""
    try:
        return parse_lineage(file.read_bytes() if file.is_file() and file.stat().st_size <= _LARGEST else b"")
    except OSError:
        return {}


def parse_lineage(raw: Any) -> dict[str, Any]:
    """What the content of a puna.json says; nothing where it is damaged, hostile, or no text at all."""
    try:
        found = json.loads(raw) if len(raw) <= _LARGEST else {}
    except (ValueError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


@cache
def code_version() -> str | None:
    """The commit of the checkout that this package lies in; None where it is installed: the version says it all."""
    git = Path(__file__).parents[1] / ".git"
    try:
        if git.is_file():  # a second work tree
            git = (git.parent / git.read_text().removeprefix("gitdir:").strip()).resolve()
        head = (git / "HEAD").read_text().strip()
        return head if not head.startswith("ref:") else _commit(git, head.removeprefix("ref:").strip())
    except OSError:
        return None


def _commit(git: Path, ref: str) -> str | None:
    shared = git / "commondir"
    common = (git / shared.read_text().strip()).resolve() if shared.exists() else git
    if (common / ref).is_file():
        return (common / ref).read_text().strip()
    packed = (common / "packed-refs").read_text().splitlines() if (common / "packed-refs").exists() else []
    return next((line.split()[0] for line in packed if line.endswith(f" {ref}")), None)
