"""Where the memory of CPU tensors comes from: see allocator.cpp. Without a compiler torch's own allocator stays."""

import ctypes
import os
import subprocess
from functools import cache
from pathlib import Path

import torch

from puna.log import log
from puna.ops.native.build import built, compiler, told


@cache
def fit_holes() -> bool:
    """Let tensors from now on take the holes that others of their size left; whether that could be had.

    Tensors that are there keep what they have and give it back where they got it. `PUNA_NATIVE=0` does without it, and
    so does torch's own switch for huge pages, which its own allocator obeys.
    """
    if os.environ.get("PUNA_NATIVE") == "0" or "THP_MEM_ALLOC_ENABLE" in os.environ:
        return False
    found, why = compiler()
    if found is not None:
        try:
            ctypes.CDLL(str(built("allocator.cpp", found, _flags()))).puna_allocate()
        except (OSError, subprocess.SubprocessError) as error:
            found, why = None, told(error)
    if found is None:
        log.info("memory of tensors: torch's allocator (%s)", why)
    return found is not None


def _flags() -> tuple[str, ...]:
    """Of torch's C++; its version among them, since the classes it is built on are that version's."""
    folder = Path(torch.__file__).parent
    return (f'-DTORCH="{torch.__version__}"', f"-I{folder / 'include'}", f"-L{folder / 'lib'}", "-lc10")
