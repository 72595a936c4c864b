"""Which process of how many this is, as torchrun and `--nproc` say it in the environment: known without torch."""

import os


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
