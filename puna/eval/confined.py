"""The program that runs a model's code: locks itself in, then runs what standard input has. Standard library only.

    python -I -S confined.py FOLDER MEMORY SECONDS < program

The program runs in a child that has nothing it could say "passed" with: its parent, which never runs it, ends with the
child's exit status, and that is 0 only where the interpreter came to its own end. Standard output: which walls of the
system stand, a line; then the exception, if there was one.
"""

import ctypes
import os
import resource
import struct
import sys
from contextlib import suppress
from typing import Any

_NAMESPACES = (0x10000000 | 0x40000000 | 0x20000000, 0x10000000 | 0x40000000, 0x40000000)  # user, network, processes
_REFUSED = (
    "os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "subprocess.", "pty.", "socket.",
    "ctypes.", "os.kill", "os.killpg", "signal.pthread_kill", "ftplib.", "urllib.", "http.", "smtplib.", "webbrowser.",
    "os.chown", "os.setxattr", "os.removexattr", "os.link", "os.symlink",
)  # fmt: skip
_CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "os.utime", "os.mkfifo",
            "os.mknod", "shutil.")  # fmt: skip
_ONCE = ("posix", "_posixsubprocess")  # a second import would bring back what was taken away
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main() -> None:
    folder, memory, seconds = os.path.realpath(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    program = sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
    answer = os.dup(1)  # the program's own output goes nowhere
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    alone = _unshare()
    _limit(memory, seconds, alone)
    walls = {"namespaces": alone, "Landlock": _restrict_files(folder)}
    os.write(answer, " ".join(name for name, stands in walls.items() if stands).encode() + b"\n")
    if child := os.fork():  # where alone, the first process of the new namespace: with it all others end
        os.close(answer)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(code if code >= 0 else 128 - code)
    _take_away()
    if failure := _run(program, folder):
        os.write(answer, failure.encode("utf-8", "replace")[:4000])
        raise SystemExit(1)


def _take_away() -> None:
    """What ends this process, or starts another, without an audit event."""

    def refuse(name: str) -> Any:
        def refused(*_: Any) -> None:
            raise PermissionError(f"refused: {name}")

        return refused

    posix: Any = sys.modules["posix"]
    posix._exit = os._exit = refuse("os._exit")  # the last references to the real one
    starts: Any = type(sys)("_posixsubprocess")  # `import asyncio` needs the module, nobody what is in it
    starts.fork_exec = refuse("fork_exec")
    sys.modules["_posixsubprocess"] = starts


def _run(program: str, folder: str) -> str:
    """Why the program failed, or nothing."""
    sys.argv[:] = [""]
    sys.addaudithook(lambda event, arguments: _audit(event, arguments, folder))  # cannot be taken away again
    try:
        exec(compile(program, "answer.py", "exec"), {"__name__": "__main__"})
    except MemoryError:
        return "MemoryError: out of memory"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:2000]
    return ""


def _audit(event: str, arguments: tuple[Any, ...], folder: str) -> None:
    if event == "open":
        _, mode, flags = arguments
        writing = bool((flags or 0) & _WRITES) or any(c in (mode or "") for c in "wax+")
        if writing and not _within(arguments[0], folder):
            raise PermissionError(f"refused: writing {arguments[0]!r}")
    elif event.startswith(_CHANGES):
        paths = [each for each in arguments if isinstance(each, str | bytes | os.PathLike)]
        if not all(_within(path, folder) for path in paths):
            raise PermissionError(f"refused: {event} of {paths[0]!r}")
    elif event == "import" and arguments[0] in _ONCE:
        raise PermissionError(f"refused: a new {arguments[0]}")
    elif event.startswith(_REFUSED):
        raise PermissionError(f"refused: {event}")


def _within(path: Any, folder: str) -> bool:
    if isinstance(path, int):
        return True  # an open file
    name = os.path.realpath(os.fsdecode(path))
    return name == os.devnull or name.startswith(folder + os.sep)


def _limit(memory: int, seconds: int, alone: bool) -> None:
    processes = [(resource.RLIMIT_NPROC, 64)] if alone else []  # else all of the user's count, and threads do, too
    for what, most in (
        *processes,
        (resource.RLIMIT_CPU, seconds + 1),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 1 << 24),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        with suppress(ValueError, OSError):  # macOS knows no limit of address space; the other limits hold
            resource.setrlimit(what, (most, most))


def _unshare() -> bool:
    """Leave the network, and be alone among processes, where the system lets us; whether alone."""
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    for flags in _NAMESPACES:
        if libc.unshare(flags) == 0:
            return flags == _NAMESPACES[0]
    return False


def _restrict_files(folder: str) -> bool:
    """Landlock: nothing is written outside of `folder`, by whatever means. Kernel 5.13 and later; whether it is so."""
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    changes = sum(1 << bit for bit in range(13) if bit not in (0, 2, 3))  # all of ABI 1 but execute and reading
    handled = struct.pack("Q", changes)
    rules = libc.syscall(444, handled, len(handled), 0)
    if rules < 0:
        return False
    place = os.open(folder, os.O_PATH)
    beneath = struct.pack("=Qi", changes, place)
    libc.syscall(445, rules, 1, beneath, 0)
    libc.prctl(38, 1, 0, 0, 0)  # no new privileges
    stands = libc.syscall(446, rules, 0) == 0
    os.close(place)
    os.close(rules)
    return stands


if __name__ == "__main__":
    main()
