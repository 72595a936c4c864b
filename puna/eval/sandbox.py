"""Runs code that a model wrote. What it may do is little, and it ends in time.

A process of its own in an empty folder, without environment, input or output; limits on CPU, memory, file sizes and
open files; a time limit after which the whole process group is killed. Inside, audit hooks refuse to start processes,
to touch files elsewhere, and to open connections. On Linux the system refuses the same once more, where it allows: a
network namespace without devices, a process namespace that dies with its first process, Landlock for files.
Files of the user can be read: code that finds a key cannot send it anywhere, but it can print it into an answer.
This stops accidents and the usual mischief. It is no wall against an attacker: use a virtual machine for that. Nor can
a pass be proven where code and test share a process: an answer that equals everything passes any test, and code that
rewrites the interpreter around it may. Ending early, by whatever exit, is no pass.
"""

import os
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from puna.errors import UsageError
from puna.eval import confined
from puna.log import log

SECONDS = 5.0
MEMORY = 1 << 30
_SAID = 2000  # characters of a failure that are kept


class Outcome(NamedTuple):
    """Whether a program ran to its end, and if not, why: its exception, or `timed out`, or how it was killed."""

    passed: bool
    why: str = ""


def run_code(program: str, seconds: float = SECONDS, memory: int = MEMORY) -> Outcome:
    """Run a Python program.

    Args:
        seconds: of wall clock; also of CPU.
        memory: most bytes of address space.

    Raises:
        UsageError: a system without process groups and limits.
    """
    if os.name != "posix":
        raise UsageError("code of a model runs only where processes can be limited", cause="not a POSIX system",
                         fix="Linux, macOS or WSL")  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="puna-") as folder:
        limits = (str(memory), str(max(1, round(seconds))))
        command = [sys.executable, "-I", "-S", confined.__file__, folder, *limits]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={"PATH": "/usr/bin:/bin", "HOME": folder}, cwd=folder, start_new_session=True,
        )  # fmt: skip
        try:
            out, _ = process.communicate(program.encode("utf-8", "surrogatepass"), timeout=seconds)
        except subprocess.TimeoutExpired:
            return Outcome(False, f"timed out after {seconds:g} s")
        finally:
            _end(process)
            _may_be_removed(Path(folder))
    walls, _, said = out.decode("utf-8", "replace").partition("\n")
    _tell_missing(walls.split())
    if process.returncode == 0 and not said:
        return Outcome(True)
    return Outcome(False, _why(said, process.returncode))


def run_all(programs: list[str], seconds: float = SECONDS, memory: int = MEMORY, workers: int = 2) -> list[Outcome]:
    """Several programs, a few at a time."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda program: run_code(program, seconds, memory), programs))


@cache
def warn_missing(name: str) -> None:
    log.warning("code of a model runs without %s: only Python itself refuses what it must not do", name)


def _tell_missing(walls: list[str]) -> None:
    for name in ("namespaces", "Landlock"):
        if name not in walls:
            warn_missing(name)


def _end(process: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError, PermissionError):  # it is gone, or nothing but zombies is left of it
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()


def _may_be_removed(folder: Path) -> None:
    """A folder that the program has locked would outlive it."""
    for path, _, _ in os.walk(folder):
        os.chmod(path, 0o700)


def _why(said: str, code: int) -> str:
    if said:
        return said[:_SAID]
    if code < 0 or code > 128:
        return f"killed: {signal.strsignal(-code if code < 0 else code - 128) or code}"
    return f"ended early, exit {code}"
