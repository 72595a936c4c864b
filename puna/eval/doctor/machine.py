"""What `puna doctor` says of the machine: enough to reproduce an issue, no secrets."""

import os
import platform
import shutil
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from puna import __version__
from puna.device import calibrate_threads, choose_device, choose_dtype, compile_problem, cores
from puna.device import memory as device_memory
from puna.packages import cache

PACKAGES = (
    "torch", "numpy", "safetensors", "tokenizers", "sentencepiece", "pydantic", "pyarrow", "jinja2", "transformers",
    "peft", "reasoning-gym", "triton",
)  # fmt: skip
_FLAGS = ("OMP_", "KMP_", "GOMP_", "MKL_", "MALLOC_", "CUDA_VISIBLE", "PYTORCH_", "TORCH_", "TORCHINDUCTOR_")
_UNITS = ("avx", "amx", "bf16", "sve", "neon", "dot")  # what matrix products are made of
_PRELOAD = "LD_PRELOAD"
_GB = 1e9


class Warned(NamedTuple):
    """Something that makes training slow or wrong here, and what to type."""

    what: str
    fix: str


def examine_machine() -> dict[str, Any]:
    """Versions, devices, threads, memory, disk, compiler, rates; takes some seconds."""
    device = choose_device()
    bf16 = choose_dtype("auto", device) == torch.bfloat16
    threads = calibrate_threads()
    torch.set_num_threads(threads)
    rates = {name: _rate(device, dtype) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    return {
        "puna": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": _versions(),
        "processor": _processor(),
        "cores": cores(),
        "threads": threads,
        "devices": _devices(),
        "capabilities": [k for k, v in torch.cpu.get_capabilities().items() if v is True and k.startswith(_UNITS)],
        "compute dtype": "bf16" if bf16 else "fp32",
        "gemm GF/s": rates,
        "memory GB": memory(),
        "cache folder": {"path": str(cache()), "free GB": round(_free(cache()) / _GB, 1)},
        "compiler": compiler(),
        "environment": flags(os.environ),
    }


def warnings(machine: Mapping[str, Any]) -> list[Warned]:
    """What is worth changing before one trains here."""
    found = []
    rates, environment = machine["gemm GF/s"], machine["environment"]
    on_cpu = machine["devices"] == ["cpu"]
    if on_cpu and environment.get("OMP_WAIT_POLICY", "").lower() != "passive" and machine["cores"] <= 8:
        found.append(
            Warned("OpenMP threads spin: beside a busy neighbour they collapse", "export OMP_WAIT_POLICY=passive")
        )
    if machine["compute dtype"] == "fp32":
        found.append(Warned("bf16 is emulated here and slower than fp32", "leave dtype=auto, or dtype=fp32"))
    elif rates["bf16"] < 1.2 * rates["fp32"]:
        found.append(Warned("bf16 products are hardly faster than fp32", "compare dtype=fp32 on a short run"))
    if on_cpu and machine["threads"] < machine["cores"]:
        fewer = f"{machine['threads']} of {machine['cores']} cores are fastest now: something else is running"
        found.append(Warned(fewer, "stop it, or leave it so: a run measures this itself"))
    if machine["memory GB"]["available"] < 2:
        found.append(Warned("less than 2 GB of memory are available", "a smaller model, seq_len or batch_size"))
    if machine["cache folder"]["free GB"] < 1:
        found.append(Warned("less than 1 GB is free where packages are cached", "export XDG_CACHE_HOME=FOLDER"))
    if problem := machine["compiler"]["problem"]:
        found.append(Warned(f"torch.compile does not work: {problem}", machine["compiler"]["fix"]))
    return found


def memory() -> dict[str, float | None]:
    """GB of the machine, available now, and the container's limit (null: none)."""
    known = device_memory()
    sizes = known._asdict() | {"available": known.available or known.total}
    return {name: None if size is None else round(size / _GB, 1) for name, size in sizes.items()}


def compiler() -> dict[str, str]:
    """Whether torch.compile works here; if not what is missing, and what to type."""
    if not (why := compile_problem()):
        return {"problem": "", "fix": ""}
    wanted = os.environ.get("CXX", "g++")
    if shutil.which(wanted) is None and shutil.which("clang++") is None:
        return {"problem": f"no C++ compiler ({wanted})", "fix": "apt install g++, or leave compile=false"}
    if "Python.h" in why:
        return {"problem": "no Python headers", "fix": "apt install python3-dev, or leave compile=false"}
    return {"problem": why[:120], "fix": "leave compile=false"}


def flags(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that change speed or memory; of a preloaded library its name alone."""
    found = {k: v for k, v in sorted(environment.items()) if k.startswith(_FLAGS)}
    if environment.get(_PRELOAD):
        found[_PRELOAD] = Path(environment[_PRELOAD].split(":")[0].split(" ")[0]).name
    return found


def _rate(device: torch.device, dtype: torch.dtype, size: int = 1024, seconds: float = 0.3) -> int:
    """GF/s of square products, the median of as many as fit `seconds`."""
    x = torch.randn(size, size, device=device).to(dtype)
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        torch.mm(x, x)[0, 0].item()  # .item() waits for a device that answers before it is done
        times.append(time.perf_counter() - start)
    return round(2 * size**3 / sorted(times)[len(times) // 2] / 1e9)


def _devices() -> list[str]:
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = [f"cuda:{i} {name}" for i, name in enumerate(names)] + ["mps"] * torch.backends.mps.is_available()
    return found or ["cpu"]


def _versions() -> dict[str, str]:
    installed = {(d.metadata["Name"] or "").lower(): d.version for d in metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def _processor() -> str:
    named = (line for line in _text("/proc/cpuinfo").splitlines() if line.startswith("model name"))
    return next(named, "").partition(":")[2].strip() or platform.processor() or platform.machine()


def _free(folder: Path) -> int:
    """Bytes free where `folder` is or would be."""
    there = next(p for p in (folder, *folder.parents) if p.exists())
    return shutil.disk_usage(there).free


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
