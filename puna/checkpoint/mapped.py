"""A file as memory: its bytes are read when they are looked at, and by all who look at them once."""

from mmap import ACCESS_READ, mmap
from pathlib import Path

from puna.errors import CheckpointError


def mapped(path: Path) -> mmap:
    """The file's own bytes, read-only.

    Raises:
        CheckpointError: not there, empty, or not to be read.
    """
    try:
        with path.open("rb") as file:
            return mmap(file.fileno(), 0, access=ACCESS_READ)
    except FileNotFoundError:
        raise CheckpointError("no such file", where=path) from None
    except ValueError:  # what mmap says of no bytes
        raise CheckpointError("an empty file", where=path, cause="an incomplete copy or download") from None
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error}", where=path) from None
