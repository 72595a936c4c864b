"""Which process of how many this is, as torchrun and `--nproc` say it in the environment: known without torch."""

import os

from puna.errors import UsageError


def ranks() -> int:
    """Processes that train together; 1 outside of torchrun and `--nproc`."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "MASTER_ADDR" in os.environ else 1


def rank() -> int:
    """This process among `ranks()`. Rank 0 logs, writes the run folder and decides what has to be decided once."""
    return int(os.environ.get("RANK", "0")) if ranks() > 1 else 0


def local_ranks() -> int:
    """How many of them share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if ranks() > 1 else 1


def local_rank() -> int:
    """This process among `local_ranks()`: the number of its device."""
    return int(os.environ.get("LOCAL_RANK", "0")) if ranks() > 1 else 0


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
