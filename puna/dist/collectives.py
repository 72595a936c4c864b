"""What the ranks of a run tell each other, and the run folder they share. With one rank nothing is exchanged."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from puna.config import RecipeConfig
from puna.device import calibrate_threads, keep_freed_memory
from puna.errors import ResourceError, UsageError
from puna.log import log
from puna.ranks import LOST, end_with_launcher, joined, rank, ranks, rows_each, started_as
from puna.run_folder import Run, open_run

T = TypeVar("T")


@contextlib.contextmanager
def process_group(device: str) -> Iterator[None]:
    """Connect the ranks for the length of the block: NCCL between CUDA devices, one a rank, gloo between CPUs.

    Ends the process with code LOST when another rank is gone: that one, or who started them, tells why.

    Raises:
        UsageError: `device` names one device for all ranks, or cannot be connected. ResourceError: fewer devices than ranks.
    """
    here = started_as()
    if here.ranks == 1:
        yield
        return
    end_with_launcher()
    if ":" in device:
        raise UsageError(f"device={device} is one device for {here.ranks} ranks", fix="device=cuda: each takes its own")
    if device == "mps":
        raise UsageError("ranks cannot be connected between mps devices", fix="device=cpu, or without --nproc")
    cuda = device in ("auto", "cuda") and torch.cuda.is_available()
    if cuda and here.local_rank >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ResourceError(f"rank {here.rank} has no device: there are {count}", fix=f"--nproc {count}, or device=cpu")
    if cuda:
        torch.cuda.set_device(here.local_rank)
    # Half an hour: ranks wait while the first one hashes all shards, or writes a large model. One that died is noticed
    # by its closed connection; this is for one that hangs.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
    log.info("ranks: %d (%s)", here.ranks, "nccl" if cuda else "gloo")
    try:
        with joined():
            yield
    except BaseException as error:  # torch's CheckpointException does not derive from Exception
        if any(sign in str(error) for sign in ("Connection closed by peer", "Connection reset by peer", "Broken pipe")):
            log.debug("another rank is gone: %s", error)
            sys.exit(LOST)
        raise
    dist.destroy_process_group()


@contextlib.contextmanager
def shared_run(config: RecipeConfig) -> Iterator[Run]:
    """`open_run` by rank 0, which locks and writes it; on the others a Run that writes nothing and has its own ear for signals."""
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


def total(*values: float) -> list[float]:
    """The sum of each value over all ranks, in fp64."""
    return list(values) if ranks() == 1 else _reduced(values, dist.ReduceOp.SUM)


def largest(value: int) -> int:
    return value if ranks() == 1 else int(_reduced([value], dist.ReduceOp.MAX)[0])


def from_first(function: Callable[..., T], *args: Any) -> T:
    """What `function(*args)` is on rank 0, on every rank; no other rank calls it."""
    if ranks() == 1:
        return function(*args)
    box = [function(*args) if rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def from_each(value: T) -> list[T]:
    """The value of every rank, by rank."""
    if ranks() == 1:
        return [value]
    box: list[Any] = [None] * ranks()
    dist.all_gather_object(box, value)
    return box


@contextlib.contextmanager
def on_first(context: contextlib.AbstractContextManager[T]) -> Iterator[T]:
    """Rank 0 enters `context`, every rank gets what it yields, and rank 0 leaves it when all are done with it."""
    if ranks() == 1:
        with context as value:
            yield value
    elif rank() == 0:
        with context as value:
            yield from_first(lambda: value)
            dist.barrier()
        dist.barrier()  # what leaving does, a rename, is seen by all who go on
    else:
        yield from_first(lambda: None)  # type: ignore[misc]
        dist.barrier()
        dist.barrier()


def part(rows: int) -> slice:
    """This rank's part of a batch of `rows`.

    Raises:
        UsageError: the ranks cannot have equal parts.
    """
    each = rows_each(rows, ranks())
    return slice(rank() * each, (rank() + 1) * each)


def _reduced(values: Any, how: Any) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64)  # on the CPU: a few numbers, and no device waits for them
    dist.all_reduce(tensor, how)
    return tensor.tolist()
