"""Which process of how many this is, known without torch.

torchrun and `--nproc` say it in the environment, and so do pods and job schedulers for reasons of their own: a process
that has connected to no other would take itself for rank 1 and leave its files to a rank 0 that does not exist. What
the environment says holds inside of `joined` alone.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import NamedTuple

from puna.errors import UsageError

LOST = 75
"""Exit code of a rank that ended because another was gone; between ranks and `dist.launch` only."""
PIPE = "PUNA_LAUNCHER"
"""Names the end of a pipe that a rank of `--nproc` reads; nothing is ever written to it."""


class Place(NamedTuple):
    """A process among those that train together, and among those of them that share its machine."""

    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    local_ranks: int = 1


_here = Place()


def started_as() -> Place:
    """What torchrun or `--nproc` started this process as; rank 0 of 1 without them."""
    known = os.environ
    if "MASTER_ADDR" not in known or int(known.get("WORLD_SIZE", "1")) == 1:
        return Place()
    names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return Place(*(int(known.get(name, default)) for name, default in names.items()))


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """The block in which the ranks are connected (dist/collectives.py)."""
    global _here
    before, _here = _here, started_as()
    try:
        yield
    finally:
        _here = before


def ranks() -> int:
    """Processes that train together."""
    return _here.ranks


def rank() -> int:
    """This process among `ranks()`. Rank 0 writes the run folder and decides what has to be decided once."""
    return _here.rank


def local_ranks() -> int:
    """How many of them share this machine."""
    return _here.local_ranks


def local_rank() -> int:
    """This process among `local_ranks()`: the number of its device."""
    return _here.local_rank


def rows_each(rows: int, count: int) -> int:
    """Of a batch of `rows`, how many each of `count` ranks has.

    Raises:
        UsageError: they cannot have equal parts.
    """
    if rows % count:
        near = rows - rows % count or count
        raise UsageError(
            f"batch_size={rows} cannot be divided among {count} ranks", fix=f"batch_size={near}, or another --nproc"
        )
    return rows // count


def end_with_launcher() -> None:
    """Send this rank a SIGTERM, at which it saves and ends, when the process that started it is gone, even killed."""
    if PIPE in os.environ:
        threading.Thread(target=_ask_to_end, args=[int(os.environ.pop(PIPE))], daemon=True).start()


def _ask_to_end(pipe: int) -> None:
    os.read(pipe, 1)  # returns at the end of the file alone
    os.kill(os.getpid(), signal.SIGTERM)
