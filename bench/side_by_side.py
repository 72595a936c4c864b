"""Runs the same work in several libraries, turn by turn, each in a process of its own, and prints what it cost.

Turns: the machine drifts by a tenth between minutes, so a library measured after another is not measured beside it.
Processes: peak memory is a property of a process, and nobody inherits another's threads or allocator.
"""

import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads slow each other down on few cores
Step = Callable[[], float]
"""Does one step of training (or one generation) and returns its loss (or 0)."""
Side = Callable[[], Step]
"""Builds a model and gives back its step."""


def compare(sides: dict[str, Side], units: int, rounds: int, unit: str = "tokens", loss_within: float = 1e-2) -> None:
    """Print a row for each side and the ratio to the second one, its peer.

    Args:
        units: what one step processes.
        loss_within: how far the losses of the first step may lie apart before the work is not the same.
    """
    workers = {name: _Worker(side) for name, side in sides.items()}
    first = {name: worker.step() for name, worker in workers.items()}  # compiles, allocates, warms up
    losses = [loss for _, loss in first.values()]
    if max(losses) - min(losses) > loss_within:
        raise SystemExit(f"not the same work: losses {dict(zip(first, losses, strict=True))}")
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, worker in workers.items():
            times[name].append(worker.step()[0])
    names = list(sides)
    print(f"{'':24} {unit + '/s':>10} {'ratio':>7} {'peak GB':>8} {'first step s':>13} {'loss':>9}")
    for name in names:
        ratios = [b / a for a, b in zip(times[name], times[names[-1]], strict=True)]
        speed = units / statistics.median(times[name])
        peak, (began, loss) = workers[name].peak(), first[name]
        print(f"{name:24} {speed:10.1f} {statistics.median(ratios):7.2f} {peak:8.2f} {began:13.1f} {loss:9.4f}")
    print(f"ratio: to {names[-1]}, median of {rounds} turns; {os.cpu_count()} cores")
    for worker in workers.values():
        worker.end()


class _Worker:
    def __init__(self, side: Side):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(side, other), daemon=True)
        self.process.start()
        if (ready := self.pipe.recv()) != "ready":
            raise SystemExit(ready)

    def step(self) -> tuple[float, float]:
        """(seconds, loss)."""
        return self._ask("step")

    def peak(self) -> float:
        """GB this process ever held."""
        return self._ask("peak")

    def end(self) -> None:
        self.pipe.send("end")
        self.process.join()

    def _ask(self, what: str) -> Any:
        self.pipe.send(what)
        return self.pipe.recv()


def _serve(side: Side, pipe: Any) -> None:
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        step = side()
    except ImportError as error:
        pipe.send(f"a peer is not installed: {error}")
        return
    pipe.send("ready")
    while (asked := pipe.recv()) != "end":
        if asked == "peak":
            scale = 1e9 if sys.platform == "darwin" else 1e6
            pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale)
            continue
        started = time.perf_counter()
        loss = step()
        pipe.send((time.perf_counter() - started, loss))
