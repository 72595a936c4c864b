"""`--nproc N`: the same command as N ranks on this machine, ended together, with one message and one exit code."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

from puna.device import cores
from puna.errors import ResourceError
from puna.ranks import LOST, PIPE

_GRACE = 10.0  # seconds for the others to notice that one has failed


def launch(nproc: int, command: Sequence[str]) -> int:
    """Run `command` as ranks 0 to nproc - 1 and return the run's exit code; rank 0 has this terminal.

    Raises:
        ResourceError: a rank was killed.
    """
    common = {
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // nproc))),
    }
    if sys.platform == "linux":  # else gloo listens on whatever the host's name leads to
        common["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    with contextlib.ExitStack() as stack:
        said = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(1, nproc)]
        processes: list[subprocess.Popen[bytes]] = []
        heard = stack.enter_context(_signals_passed_on(processes))
        alive, held = os.pipe()  # `held` is this process's alone: however it ends, the kernel closes it
        stack.callback(os.close, alive)
        stack.callback(os.close, held)
        common[PIPE] = str(alive)
        for rank, out in enumerate([None, *said]):
            env = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            # A session of its own: Ctrl-C comes through here alone, once, or it would count as a second one.
            started = subprocess.Popen(
                command, env=env, stdout=out, stderr=out, start_new_session=True, pass_fds=[alive]
            )
            processes.append(started)
        ended = _wait(processes)
        blamed = _blamed(ended)
        if blamed > 0:
            said[blamed - 1].seek(0)
            print(said[blamed - 1].read(), end="", file=sys.stderr)
    code = ended[blamed]
    if code == LOST or (code < 0 and not heard):
        raise ResourceError(
            f"rank {blamed} of {nproc} was killed by signal {-code}" if code < 0 else "the ranks lost each other",
            cause="not enough memory for all ranks" if code < 0 else "",
            fix="the same command goes on from the newest checkpoint; a smaller batch_size takes less memory",
        )
    return 128 + heard[0] if code < 0 else code


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Exit codes; LOST for a rank that had to be ended because another failed and it did not notice."""
    deadline, ended = float("inf"), set()
    while running := [p for p in processes if p.poll() is None]:
        if any(p.returncode for p in processes):
            deadline = min(deadline, time.monotonic() + _GRACE)
        if time.monotonic() > deadline:
            for process in running:
                process.kill()
                ended.add(process.pid)
        time.sleep(0.02)
    return [LOST if p.pid in ended else p.returncode for p in processes]


def _blamed(codes: Sequence[int]) -> int:
    """The rank whose end explains the others': killed, else failed by itself, else any that did not end well.

    A rank that loses another may abort (gloo's threads end it), so that one comes after those that failed by themselves.
    """
    kinds = (
        lambda code: code < 0 and code != -signal.SIGABRT,
        lambda code: code not in (0, LOST, -signal.SIGABRT),
        bool,
        lambda code: True,
    )
    return next(rank for kind in kinds for rank, code in enumerate(codes) if kind(code))


@contextlib.contextmanager
def _signals_passed_on(processes: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """SIGINT and SIGTERM go to every rank, SIGHUP (a closed terminal) as SIGTERM; yields what was passed on.

    No rank outlives the block.
    """
    heard: list[int] = []

    def pass_on(number: int, _frame: object) -> None:
        heard.append(signal.SIGTERM if number == signal.SIGHUP else number)
        for process in processes:
            process.send_signal(heard[-1])

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup asked for a run that outlives its terminal
        numbers.remove(signal.SIGHUP)
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield heard
    finally:
        for process in processes:
            process.kill()  # nothing happens to one that has ended
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
