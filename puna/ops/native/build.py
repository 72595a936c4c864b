"""C++ beside this file, made into a library at first use with the machine's own GCC.

A library is called by the hash of its sources, compiler and flags, so one of older sources is never loaded.
"""

import hashlib
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from puna.log import log
from puna.packages import cache as packages

_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-shared", "-pthread", "-Wno-psabi", "-fno-math-errno", "-fno-trapping-math")
_COMPILER = "g++"
_SECONDS = 300
_DIGEST = 32  # bytes


def compiler() -> tuple[str | None, str]:
    """(GCC's path, ""), or (None, why there is nothing to build with)."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return None, f"native code is for Linux on x86-64, this is {platform.system()} on {platform.machine()}"
    found = shutil.which(_COMPILER)
    return found, "" if found else f"no C++ compiler: {_COMPILER} is not installed"


def built(source: str, compiler: str, flags: tuple[str, ...] = ()) -> Path:
    """The library made of `source`, built when it is not there yet.

    Args:
        flags: behind the source's name, beside those of every library.

    Raises:
        OSError, subprocess.SubprocessError: none was made; `told` says why.
    """
    try:
        folder = packages().with_name(Path(source).stem)
    except RuntimeError as error:  # a user without a home
        raise OSError(f"no place to build in: {error}; XDG_CACHE_HOME names one") from None
    target = folder / f"{_hash(source, compiler, flags)}.so"
    if not _whole(target):
        _build(source, compiler, flags, target)
    return target


def told(error: Exception) -> str:
    """The first line of what the compiler complained of."""
    if isinstance(error, subprocess.CalledProcessError) and not error.stderr:
        return f"it ended with {error.returncode}"
    lines = str(getattr(error, "stderr", "") or error).strip().splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else "")[:200]


def _whole(path: Path) -> bool:
    """Whether the file ends in the hash of what comes before: loading one that was cut short kills the process."""
    made = path.read_bytes() if path.exists() else b""
    return len(made) > _DIGEST and hashlib.sha256(made[:-_DIGEST]).digest() == made[-_DIGEST:]


def _build(source: str, compiler: str, flags: tuple[str, ...], target: Path) -> None:
    """Compile under a name of our own, then rename: processes that build at once each put a whole file in place."""
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    log.info("%s: building once with %s", source, Path(compiler).name)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        command = [compiler, *_FLAGS, str(Path(__file__).with_name(source)), *flags, "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
        library = made.read_bytes()
        made.write_bytes(library + hashlib.sha256(library).digest())  # what lies behind its sections is never read
        made.chmod(0o700)
        made.replace(target)


def _hash(source: str, compiler: str, flags: tuple[str, ...]) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=_SECONDS).stdout
    made_of = hashlib.sha256(repr((version, _FLAGS, flags)).encode())
    for path in sorted(p for p in Path(__file__).parent.iterdir() if p.suffix == ".h" or p.name == source):
        made_of.update(path.name.encode() + path.read_bytes())
    return made_of.hexdigest()[:32]
