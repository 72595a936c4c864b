"""Runs the same work in several libraries, turn by turn, each in a process of its own, and prints what it cost.

Turns: the machine drifts by a tenth between minutes, so a library measured after another is not measured beside it.
Processes: peak memory is a property of a process, and nobody inherits another's threads or allocator.
The work is the same: equal losses of the first step, and gradients no further from an fp32 reference than the peer's.
"""

import contextlib
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from puna.device import keep_freed_memory

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads slow each other down on few cores


class Work(NamedTuple):
    """What a library was made to do."""

    step: Callable[[], float]
    """One step of training (or one generation); its loss (or 0)."""
    gradients: Callable[[], dict[str, Any]] | None = None
    """Gradients of some weights at the start, under the same names in every library."""


Side = Callable[[], Work]
_SIDE, _REPEATS = 2048, 10
_PRODUCTS = 2.0 * _SIDE**3 * _REPEATS
"""FLOPs of a step of `_products`."""


def compare(
    sides: dict[str, Side],
    units: int,
    rounds: int,
    unit: str = "tokens",
    loss_within: float = 1e-2,
    gradients_within: float = 1.2,
    reference: Side | None = None,
    device: str = "cpu",
    flops: float | None = None,
) -> dict[str, float]:
    """Print a row for each side and its ratio to the best of the peers (all but the first); units/s of each.

    Args:
        units: what one step processes.
        loss_within: how far the losses of the first step may lie apart before the work is not the same.
        gradients_within: how many times as far from the reference as a peer's ours may be. Orders of bf16 rounding that
            are all right differ by a tenth in a deep model.
        device: whose memory is meant: the process's on a CPU, the allocator's on a CUDA device.
        flops: of the matrix products that a unit needs; the bound that they set on this machine is then measured.
        reference: the same work in fp32; the first side's gradients have to be about as close to it as a peer's.
    """
    workers = {name: _Worker(side) for name, side in sides.items()}
    if reference is not None:
        _check_gradients(workers, reference, gradients_within)
    first = {name: worker.step() for name, worker in workers.items()}  # compiles, allocates, warms up
    losses = [loss for _, loss in first.values()]
    if max(losses) - min(losses) > loss_within:
        raise SystemExit(f"not the same work: losses {dict(zip(first, losses, strict=True))}")
    times: dict[str, list[float]] = {name: [] for name in sides}
    products = _Worker(_products) if flops else None
    product_times = []
    for _ in range(rounds):
        for name, worker in workers.items():
            times[name].append(worker.step()[0])
        if products is not None:
            product_times.append(products.step()[0])
    ours, *peers = sides
    best = min(peers, key=lambda name: statistics.median(times[name])) if peers else ours
    speeds = {}
    print(f"{'':24} {unit + '/s':>10} {'ratio':>7} {'peak GB':>8} {'first step s':>13} {'loss':>9}")
    for name, worker in workers.items():
        ratios = [b / a for a, b in zip(times[name], times[best], strict=True)]
        speed = units / statistics.median(times[name])
        peak, (began, loss) = worker.peak(device), first[name]
        speeds[name] = speed
        print(f"{name:24} {speed:10.1f} {statistics.median(ratios):7.2f} {peak:8.2f} {began:13.1f} {loss:9.4f}")
    print(f"ratio: to {best}, median of {rounds} turns; {os.cpu_count()} cores")
    if products is not None and flops:
        rate = _PRODUCTS / statistics.median(product_times)
        bound = rate / flops
        shares = ", ".join(f"{name} reaches {speed / bound:.0%}" for name, speed in speeds.items())
        print(f"matrix products in bf16: {rate / 1e9:.0f} GFLOP/s here, so at most {bound:.1f} {unit}/s; {shares}")
        products.end()
    for worker in workers.values():
        worker.end()
    return speeds


def _products() -> Work:
    """Large products in bf16: no training step of the same arithmetic is faster."""
    import torch

    x, y = torch.randn(2, _SIDE, _SIDE).bfloat16().unbind()

    def step() -> float:
        for _ in range(_REPEATS):
            x @ y
        return 0.0

    return Work(step)


def _check_gradients(workers: dict[str, "_Worker"], reference: Side, within: float) -> None:
    worker = _Worker(reference)
    exact = worker.gradients()
    worker.end()
    found = [w.gradients() for w in workers.values()]
    shared = [name for name in exact if all(name in gradients for gradients in found)]
    ours, *peers = [_distance(gradients, exact, shared) for gradients in found]
    print("distance of the gradients to fp32: " + ", ".join(f"{d:.2%}" for d in (ours, *peers)))
    if ours > within * max(peers):
        raise SystemExit("not the same work: gradients are further from fp32 than every peer's")


def _distance(found: dict[str, Any], exact: dict[str, Any], names: list[str]) -> float:
    """Mean relative distance over the tensors of these names."""
    return statistics.fmean(float((found[n] - exact[n]).norm() / exact[n].norm()) for n in names)


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

    def gradients(self) -> dict[str, Any]:
        """fp32 tensors by name."""
        import torch

        return {name: torch.from_numpy(value) for name, value in self._ask("gradients").items()}

    def peak(self, device: str) -> float:
        """GB this process ever held."""
        return self._ask("peak on a card" if device.startswith("cuda") else "peak")

    def end(self) -> None:
        self.pipe.send("end")
        self.process.join()

    def _ask(self, what: str) -> Any:
        self.pipe.send(what)
        return self.pipe.recv()


def _serve(side: Side, pipe: Any) -> None:
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    keep_freed_memory()  # puna's recipes do it; every side gets it
    try:
        work = side()
    except ImportError as error:
        pipe.send(f"a peer is not installed: {error}")
        return
    except Exception as error:  # told by the parent, which would wait for a process that is gone
        pipe.send(f"{type(error).__name__}: {error}")
        return
    pipe.send("ready")
    with contextlib.suppress(EOFError):  # the parent said why it ended
        _answer(work, pipe)


def _answer(work: Work, pipe: Any) -> None:
    import torch

    while (asked := pipe.recv()) != "end":
        if asked == "peak":
            scale = 1e9 if sys.platform == "darwin" else 1e6
            pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale)
        elif asked == "peak on a card":
            pipe.send(torch.cuda.max_memory_allocated() / 1e9)
        elif asked == "gradients":
            assert work.gradients is not None
            pipe.send({name: value.float().numpy() for name, value in work.gradients().items()})
        else:
            started = time.perf_counter()
            loss = work.step()
            pipe.send((time.perf_counter() - started, loss))
