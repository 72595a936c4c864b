"""Where the memory of CPU tensors comes from: see allocator.cpp. Without a compiler torch's own allocator stays."""

import ctypes
import os
import subprocess
from functools import cache
from pathlib import Path

import torch

from puna.log import log
from puna.ops.native.build import built, compiler, told


def unusable() -> str:
    """Why tensors keep torch's allocator on this machine; empty where nothing speaks against this one.

    `PUNA_NATIVE=0` does without it, and so does torch's own switch for huge pages, which its own allocator obeys.
    """
    if os.environ.get("PUNA_NATIVE") == "0":
        return "PUNA_NATIVE=0"
    return "THP_MEM_ALLOC_ENABLE is set" if "THP_MEM_ALLOC_ENABLE" in os.environ else compiler()[1]


@cache
def fit_holes() -> bool:
    """Let tensors from now on take the holes that others of their size left; whether that could be had.

    For the rest of the process. Tensors that are there keep what they have and give it back where they got it.
    """
    found, why = compiler()[0], unusable()
    if found is not None and not why:
        try:
            ctypes.CDLL(str(built("allocator.cpp", found, _flags()))).puna_allocate()
        except (OSError, subprocess.SubprocessError) as error:
            why = told(error)
    if why:
        log.info("memory: torch's allocator (%s), whose holes between tensors no forecast counts", why)
    else:
        log.info("memory: tensors take the holes that others left")
    return not why


def _flags() -> tuple[str, ...]:
    """Of torch's C++; its version among them, since the classes it is built on are that version's."""
    folder = Path(torch.__file__).parent
    return (f'-DTORCH="{torch.__version__}"', f"-I{folder / 'include'}", f"-L{folder / 'lib'}", "-lc10")
