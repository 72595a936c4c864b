"""The allocator of CPU tensors, each time in a process of its own: it cannot be taken out again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from puna.errors import out_of_memory
from puna.ops.native.build import compiler

needs_compiler = pytest.mark.skipif(compiler()[0] is None, reason=compiler()[1] or "there is a compiler")

# Between tensors of one size lie small blocks that stay, as a run's own do; every second tensor goes and comes again.
HOLES = """
import ctypes, torch
from puna.device import keep_freed_memory, peak_memory
from puna.ops.native.allocator import fit_holes
keep_freed_memory()
fit_holes()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
size, device, made = 2**20, torch.device("cpu"), []
for _ in range(100):
    made.append(torch.ones(size, dtype=torch.uint8))
    for small in (24, 40, 56, 72, 88, 104) * 2:
        libc.malloc(small)
before = peak_memory(device)
made[::2] = [None] * 50
made[::2] = [torch.ones(size, dtype=torch.uint8) for _ in range(50)]
print((peak_memory(device) - before) / size)
"""
KEPT = """
import torch
from puna.ops.native.allocator import fit_holes
old = torch.arange(1000)
assert fit_holes()
for size in (0, 1, 63, 64, 65, 10**6):
    made = torch.full((size,), 7, dtype=torch.uint8)
    assert made.data_ptr() % 64 == 0 and (made == 7).all()
old.resize_(5000)
assert old[:1000].equal(torch.arange(1000))
grown = torch.arange(1000).resize_(100_000)
assert grown[:1000].equal(torch.arange(1000)) and grown.clone().equal(grown)
del old, grown
try:
    torch.empty(2**60)
except RuntimeError as error:
    print(error)
"""


def said(program: str, **environment: str) -> str:
    """What the program prints, where nobody's own settings of memory are."""
    own = ("PUNA_NATIVE", "THP_MEM_ALLOC_ENABLE", "MALLOC_", "GLIBC_TUNABLES")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    done = subprocess.run([sys.executable, "-c", program], env={**clean, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_compiler
def test_a_tensor_takes_the_hole_of_another_of_its_size() -> None:
    """glibc's aligned blocks never fit again where one of their size was: a run took up to 600 MB of holes."""
    assert float(said(HOLES)) < 10  # of 50
    assert float(said(HOLES, PUNA_NATIVE="0")) > 10  # or there is nothing left to mend


@needs_compiler
def test_tensors_of_both_allocators_live_together() -> None:
    """A tensor from before, given back to the wrong allocator, is a crash; a failure in other words no halving."""
    assert out_of_memory(RuntimeError(said(KEPT)))


@pytest.mark.parametrize("environment", [{"PUNA_NATIVE": "0"}, {"PATH": ""}], ids=["switched off", "no compiler"])
def test_torch_s_own_stays_where_it_has_to(environment: dict[str, str]) -> None:
    """A machine without a compiler has to train, too."""
    program = "from puna.ops.native.allocator import fit_holes; import torch; print(fit_holes(), len(torch.ones(9)))"
    assert said(program, **environment) == "False 9"


@needs_compiler
@pytest.mark.parametrize("script", ["echo 'no.h: error: it is not here' >&2; exit 1", "kill -9 $$", ": > /dev/null"])
def test_a_build_that_fails_leaves_torch_s_own(script: str, tmp_path: Path) -> None:
    """torch without its headers, a machine without memory, a compiler that is none: a speed-up must not end a run."""
    fake = tmp_path / "g++"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o700)
    program = "from puna.ops.native.allocator import fit_holes; import torch; print(fit_holes(), len(torch.ones(9)))"
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert said(program, PATH=path, XDG_CACHE_HOME=str(tmp_path / "cache")) == "False 9"
