"""Which device, which compute dtype, how many threads. Every automatic choice says why."""

import contextlib
import ctypes
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from puna.errors import NumericError, ResourceError, UsageError
from puna.log import log
from puna.ranks import local_ranks, ranks

if TYPE_CHECKING:
    import torch

_QUOTA = "/sys/fs/cgroup/cpu.max"
_MEMORY = "/proc/meminfo"
_CGROUP = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # mallopt's numbers of them


def choose_device(name: str = "auto") -> "torch.device":
    """`auto` takes cuda, then mps (alone: nothing connects ranks between mps devices), then cpu.

    Raises:
        UsageError: not a device name torch knows.
        ResourceError: the device is not on this machine.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if name == "mps" and ranks() > 1:
            log.info("device: cpu (%d ranks cannot be connected between mps devices)", ranks())
            name = "cpu"
    try:
        device = torch.device(name)
        mps = int(torch.backends.mps.is_available())
        count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": mps}[device.type]
    except (RuntimeError, KeyError):
        raise UsageError(f"`{name}` is not a device", fix="device=auto, cpu, cuda, cuda:1 or mps") from None
    if (device.index or 0) >= count:
        raise ResourceError(f"there is no {name} here", cause=f"torch sees {count} {device.type} devices")
    return device


def choose_dtype(name: str, device: "torch.device", tell: bool = True) -> "torch.dtype":
    """The compute dtype. `auto` is bf16 only where bf16 is native: emulated bf16 is slower than fp32 by far.

    Args:
        tell: say what `auto` chose, and why.
    """
    import torch

    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
    if name != "auto":
        return named[name]
    native, why = _native_bf16(device)
    if tell:
        log.info("compute dtype: %s (%s)", "bf16" if native else "fp32", why)
    return torch.bfloat16 if native else torch.float32


def cast(tensor: "torch.Tensor", dtype: "torch.dtype", name: str) -> "torch.Tensor":
    """`tensor` in `dtype`, as it is told in an error by `name`.

    Raises:
        NumericError: a number that becomes infinite: fp16 ends at 65504.
    """
    narrow = tensor.to(dtype)
    if narrow.dtype != tensor.dtype and not _finite(narrow) and _finite(tensor):
        short = str(dtype).removeprefix("torch.")
        raise NumericError(f"{name}: a weight too large for {short} becomes infinite", fix="bf16 or fp32")
    return narrow


def _finite(tensor: "torch.Tensor") -> bool:
    return not tensor.numel() or all(end.isfinite().item() for end in tensor.aminmax())  # no mask of its size is made


def _native_bf16(device: "torch.device") -> tuple[bool, str]:
    import torch

    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return native, f"{torch.cuda.get_device_name(device)} has {'' if native else 'no '}native bf16"
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        found = [name for name in ("amx_bf16", "avx512_bf16", "bf16") if has.get(name)]
        return bool(found), f"CPU has {found[0]}" if found else "CPU has no native bf16"
    return False, f"bf16 on {device.type} is not measured yet"


def require_memory(size: int, device: "torch.device") -> None:
    """Refuse before anything is read when `device` has less than 1.1 x `size` bytes free, where that can be known.

    Raises:
        ResourceError: it has less.
    """
    import torch

    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory().available
    if free is not None and free < 1.1 * size:
        raise ResourceError(
            f"{size / 1e9:.2f} GB of weights do not fit into {free / 1e9:.2f} GB of free memory",
            fix="a machine with more, or a smaller model",
        )


class Memory(NamedTuple):
    """Of the machine, in bytes."""

    total: int
    available: int | None
    """What can be had without swapping, within `limit`; None where no system tells."""
    limit: int | None
    """The container's, where there is one."""


def memory() -> Memory:
    """What this process may hope for."""
    lines = (line.split() for line in _text(_MEMORY).splitlines())
    known = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) > 1 and words[1].isdigit()}
    total = known.get("MemTotal") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [int(text) for text in map(_text, _CGROUP) if text.isdigit()]
    limit = min((size for size in limits if size < total), default=None)
    told = [size for size in (known.get("MemAvailable"), limit) if size is not None]
    return Memory(total, min(told, default=None), limit)


def peak_memory(device: "torch.device") -> int:
    """Bytes that were in use at most: of a CUDA device by tensors, elsewhere by this process (its resident set)."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    for line in _text("/proc/self/status").splitlines():
        if line.startswith("VmHWM:"):  # getrusage's number begins with that of the process that started this one
            return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def generators(device: "torch.device") -> dict[str, "torch.Tensor"]:
    """The states of the generators that dropout on `device` may draw from, by type of device: cpu, and its own."""
    import torch

    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_generators(device: "torch.device", states: dict[str, "torch.Tensor"]) -> None:
    """What `generators` gave, put back; what is of another kind of device than `device` is left out."""
    import torch

    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def calibrate_threads() -> int:
    """The number of CPU threads that multiplies matrices fastest now.

    More threads than free cores collapse to a tenth of the speed of one (OpenMP spins), so it is measured: once a
    run, because the count also decides the order of floating-point sums and so has to be the same on resume.
    """
    import torch

    best, rates = 1, {}
    x = torch.randn(512, 512)
    for count in _candidates(max(1, cores() // local_ranks())):
        torch.set_num_threads(count)
        times = []
        for _ in range(8):
            start = time.perf_counter()
            torch.mm(x, x)
            times.append(time.perf_counter() - start)
        rates[count] = 1 / sorted(times)[len(times) // 2]
        if rates[count] > 1.05 * rates[best]:  # a tie goes to fewer threads
            best = count
    log.info("threads: %d (measured %s matmul/s)", best, ", ".join(f"{c}: {r:.0f}" for c, r in rates.items()))
    return best


def keep_freed_memory() -> None:
    """Ask glibc to reuse big blocks instead of returning each to the system; other allocators are left alone.

    A training step frees and takes the same tensors again and again, and every new page of one costs a fault: a fifth
    of the time of elementwise work was measured in a virtual machine. What the user set for malloc stays.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc: macOS, musl, Windows
        libc = ctypes.CDLL(None)
        if libc.mallopt(_MMAP_MAX, 0) and libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1):
            log.info("memory: freed blocks are kept for the next step (glibc)")


def release_freed_memory() -> None:
    """Give freed memory back to the system, also what lies between tensors that stay; glibc alone keeps such."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def cores() -> int:
    """Cores this process may use: its affinity, and the container's quota where there is one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, _, period = Path(_QUOTA).read_text(encoding="utf-8").strip().partition(" ")
    except OSError:
        return allowed
    return min(allowed, max(1, int(quota) // int(period))) if quota.isdigit() else allowed


def compile_problem() -> str:
    """Why torch.compile does not work here, found out by compiling; empty when it does."""
    import torch

    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8))
    except Exception as error:  # no g++, no Python headers, a broken toolchain: each raises something else
        return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return ""


def _candidates(cores: int) -> list[int]:
    powers = [2**i for i in range(cores.bit_length()) if 2**i < cores]
    return [*powers, cores]
