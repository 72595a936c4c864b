"""Hostile files: bombs that have to end at once, and valid files with bytes changed by hypothesis.

Some hundred of the latter by default, for PUNA_TEST_FUZZ seconds if that is set.
"""

import ctypes
import os
import re
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck
from hypothesis import strategies as st

from puna.errors import CheckpointError

_NUMBERS = [0, 1, 2, 3, 7, 8, 9, 12, 31, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 61, (1 << 64) - 1]


def ends_at_once(opened: Callable[[Path], Any], path: Path, content: bytes, mib: int = 1) -> None:
    """`content` at `path` is refused with the file's name, in a second and `mib` MiB of Python's memory."""
    path.write_bytes(content)
    started = time.process_time()
    with pytest.raises(CheckpointError, match=re.escape(path.name)):
        opened(path)
    assert time.process_time() - started < 1
    tracemalloc.start()  # apart from the clock: counting takes time
    try:
        with pytest.raises(CheckpointError):
            opened(path)
        assert tracemalloc.get_traced_memory()[1] < mib << 20
    finally:
        tracemalloc.stop()


def resident_mib(action: Callable[[], Any]) -> float:
    """What `action` held at most beyond what the process held before: also of engines that Python cannot count.

    Linux tells it; elsewhere it is not measured, and 0.
    """
    books = Path("/proc/self/status")
    if not books.exists():
        return 0.0
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that is kept would hide as much of what comes
    before = _books(books, "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    action()
    return _books(books, "VmHWM") - before


def _books(books: Path, field: str) -> float:
    line = next(line for line in books.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024


def damaged(raw: bytes, header: int) -> st.SearchStrategy[bytes]:
    """`raw` with up to four changes in its first `header` bytes (a byte, or a number of 4 or 8), and perhaps cut."""
    byte = st.integers(0, 255).map(lambda value: bytes([value]))
    small = st.sampled_from(_NUMBERS).map(lambda value: struct.pack("<I", value & 0xFFFFFFFF))
    large = st.sampled_from(_NUMBERS).map(lambda value: struct.pack("<Q", value))
    change = st.tuples(st.integers(0, header - 1), st.one_of(byte, small, large))
    cut = st.one_of(st.just(len(raw)), st.integers(0, len(raw)))
    return st.builds(_change, st.just(raw), st.lists(change, max_size=4), cut)


def _change(raw: bytes, changes: list[tuple[int, bytes]], cut: int) -> bytes:
    content = bytearray(raw)
    for at, new in changes:
        content[at : at + len(new)] = new
    return bytes(content[:cut])


def fuzz(check: Callable[[bytes], None], files: st.SearchStrategy[bytes]) -> None:
    """Let `check` see mutated files; it lets only our errors pass."""
    seconds = float(os.environ.get("PUNA_TEST_FUZZ", "0"))
    settings = hypothesis.settings(
        max_examples=1000 if seconds else 150, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        derandomize=not seconds,
    )  # fmt: skip
    end, run = time.monotonic() + seconds, 0
    while run == 0 or time.monotonic() < end:
        one = settings(hypothesis.given(files)(check))
        (hypothesis.seed(run)(one) if seconds else one)()
        run += 1
