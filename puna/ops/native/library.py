"""Loads the native kernels. The library has paths for AVX-512, AVX2 and any x86-64, and the CPU it runs on decides.

`PUNA_NATIVE=0` does without it; `PUNA_NATIVE=avx2` or `portable` takes a lower path than the CPU's best.
"""

import ctypes
import os
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from puna.errors import ResourceError, UsageError
from puna.log import log
from puna.ops.native.build import built, compiler, told

LEVELS = ("portable", "avx2", "avx512")
KINDS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}


class Weight(ctypes.Structure):
    """See types.h."""

    _fields_ = [
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("mins", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("scale_table", ctypes.c_void_p),
        ("scale_max", ctypes.c_void_p),
        ("scale_offset", ctypes.c_void_p),
        ("out", ctypes.c_int64),
        ("in_", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("half_scales", ctypes.c_int32),
        ("dynamic", ctypes.c_int32),
    ]


class Call(ctypes.Structure):
    """See types.h."""

    _fields_ = [
        ("level", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("bf16", ctypes.c_int32),
        ("rows", ctypes.c_int32),
    ]


class Block(ctypes.Structure):
    """See types.h."""

    _fields_ = [
        *((name, Weight) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        ("attention_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("norms_bf16", ctypes.c_int32),
    ]


class Pool(ctypes.Structure):
    """See types.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "values", "blocks", "slots", "tables", "lengths")),
        *((name, ctypes.c_int64) for name in ("width", "count", "block", "heads", "kv_heads", "head_dim")),
    ]


class Native:
    """The loaded library. ctypes lets go of Python's lock during a call."""

    def __init__(self, library: ctypes.CDLL, level: int):
        self.level = level
        self.wide = LEVELS[level] == "avx512"
        """Whether it also has kernels for many rows of bf16, such as prompts."""
        self.linear = _function(library.puna_linear, "pppp")
        self.expand = _function(library.puna_expand, "ppnnp")
        self.attend = _function(library.puna_attend, "pppppp")
        self.forward = _function(library.puna_forward, "ppnpppp")

    def call(self, dtype: torch.dtype, rows: int) -> Call:
        """How a kernel is to run now: activations of this dtype, by as many threads as torch would use."""
        return Call(self.level, torch.get_num_threads(), dtype == torch.bfloat16, rows)


def _function(found: Any, arguments: str) -> Callable[..., None]:
    found.argtypes = [{"p": ctypes.c_void_p, "n": ctypes.c_int64}[kind] for kind in arguments]
    found.restype, found.errcheck = ctypes.c_int32, _checked
    return found


def _checked(status: int, *_: Any) -> None:
    if status:
        raise ResourceError("memory ran out in a native kernel", fix="fewer texts at a time, or shorter ones")


@cache
def native() -> Native | None:
    """The library at this CPU's best level, or None; why is logged, once: loudly where a level was asked for.

    Raises:
        UsageError: PUNA_NATIVE is no word that `load` knows.
    """
    wanted = os.environ.get("PUNA_NATIVE", "auto")
    loaded = load(wanted)
    if isinstance(loaded, str):
        tell = log.warning if wanted in LEVELS else log.info
        tell("native kernels: none (%s); torch's are used", loaded)
        return None
    log.info("native kernels: %s", LEVELS[loaded.level])
    return loaded


def load(wanted: str) -> Native | str:
    """The library, built when it is not there yet; or why there is none.

    Args:
        wanted: `auto` (or `1`), `0`, or one of LEVELS.

    Raises:
        UsageError: another word.
    """
    if wanted == "0":
        return "PUNA_NATIVE=0"
    if wanted not in ("auto", "1", *LEVELS):
        raise UsageError(f"PUNA_NATIVE={wanted} is no level", fix=f"one of 0, auto, {', '.join(LEVELS)}")
    found, why = compiler()
    if found is None:
        return why
    try:
        library = _open(found)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{Path(found).name} made no library: {told(error)}"
    best = library.puna_level()
    level = LEVELS.index(wanted) if wanted in LEVELS else best
    return Native(library, level) if level <= best else f"this CPU has no {wanted}"


def _open(compiler: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(built("native.cpp", compiler)))
