"""One run folder for all ranks: the first opens, locks and writes it, all stop and choose together."""

import contextlib
from collections.abc import Iterator

import torch

from puna.config import RecipeConfig
from puna.device import calibrate_threads, keep_freed_memory
from puna.dist.collectives import from_first, largest, on_first, process_group
from puna.ranks import rank, ranks
from puna.run_folder import Run, open_run


@contextlib.contextmanager
def shared_run(config: RecipeConfig) -> Iterator[Run]:
    """`open_run` by rank 0; on the others a Run that writes nothing and has its own ear for signals."""
    with process_group(config.device), on_first(open_run(config)) as run:
        run.from_first = from_first
        with run.stop.listening() if rank() else contextlib.nullcontext():
            yield run


def stop_together(run: Run, what: str) -> None:
    """`run.stop.check(what)` on every rank as soon as a stop was asked of one."""
    run.stop.signal = largest(run.stop.signal)
    run.stop.check(what)


def use_machine(run: Run) -> None:
    """The allocator's setting, and the CPU threads of a rank: calibrated once for each number of ranks a run has had."""
    keep_freed_memory()
    name = "threads" if ranks() == 1 else f"threads_of_{ranks()}_ranks"
    torch.set_num_threads(run.once(name, calibrate_threads))  # all ranks calibrate at the same time
