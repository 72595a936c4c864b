"""Files that are whole or absent: atomic folders with a hash manifest, locks, a full disk told plainly.

Protocol of `atomic_folder`: write into a hidden sibling, fsync every file, write MANIFEST.json, fsync it and the
folder, rename, fsync the parent. A crash at any point leaves the old state or the new one; what was half written
has a name that no reader lists, and the next writer sweeps it away.
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from puna.errors import CheckpointError, ResourceError, UsageError

MANIFEST = "MANIFEST.json"
_TEMPORARY = ".puna-tmp-"
MARK = f"{_TEMPORARY}{platform.node()}-"  # a shared disk has the processes of other machines on it
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target`, with a manifest, when the block ends without an error.

    Raises:
        UsageError: `target` exists.
        ResourceError: the disk is full; nothing at `target`, nothing left behind.
    """
    if target.exists():
        raise UsageError("exists already", where=target, fix="another folder, or remove that one first")
    with disk_errors(target):
        make_folder(target.parent)
        sweep(target.parent)
        temporary = temporary_name(target)
        shutil.rmtree(temporary, ignore_errors=True)  # a crashed start with our number: containers
        temporary.mkdir()
        try:
            yield temporary
            for path in temporary.rglob("*"):
                _fsync(path)
            write_json(
                temporary / MANIFEST, {"format": 1, "files": {n: _entry(p) for n, p in _files(temporary).items()}}
            )
            _fsync(temporary)
            temporary.rename(target)
            _fsync(target.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield the path of a temporary file that becomes `target` when the block ends without an error.

    Raises:
        UsageError: `target` exists.
        ResourceError: the disk is full; nothing at `target`, nothing left behind.
    """
    if target.exists():
        raise UsageError("exists already", where=target, fix="another file, or remove that one first")
    with disk_errors(target):
        make_folder(target.parent)
        sweep(target.parent)
        temporary = temporary_name(target)
        try:
            yield temporary
            _fsync(temporary)
            temporary.rename(target)
            _fsync(target.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def as_path(name: str | Path) -> Path:
    """The path a user typed, `~` expanded.

    Raises:
        CheckpointError: what no file can be called: a NUL, a name that is too long, the home of a user there is not.
    """
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"names no file: {str(error)[:100]}", where=repr(str(name)[:100])) from None
    if "\0" in str(path):
        raise CheckpointError("names no file: a name with a NUL", where=repr(str(name)[:100]))
    return path


def write_text(path: Path, text: str) -> None:
    """Replace `path` with `text`: it holds the old or the new content at any moment."""
    with disk_errors(path):
        temporary = temporary_name(path)
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _fsync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    write_text(path, _json(value))


def verify(folder: Path) -> None:
    """Compare every file with the folder's manifest.

    Raises:
        CheckpointError: naming each file that is missing, changed, unreadable or unexpected.
    """
    if wrong := damage(folder):
        raise CheckpointError("does not match its manifest: " + "; ".join(wrong), where=folder)


def damage(folder: Path) -> list[str]:
    """What is wrong with the files of a folder that has a manifest, one `name: what` each; nothing when it is whole.

    Raises:
        CheckpointError: the manifest itself cannot be read.
    """
    listed, found = read_manifest(folder), _files(folder)
    wrong = [f"{name}: missing" for name in listed if name not in found]
    wrong += [f"{name}: not in the manifest" for name in found if name not in listed]
    for name in (name for name in listed if name in found):
        try:
            entry = _entry(found[name])
        except OSError as error:  # a bad sector: the file is lost, the folder's other files and older folders are not
            wrong.append(f"{name}: cannot be read: {error.strerror}")
        else:
            if entry != listed[name]:
                wrong.append(f"{name}: changed or damaged")
    return wrong


def read_manifest(folder: Path) -> dict[str, Any]:
    """Size and hash of each file, as written with the folder.

    Raises:
        CheckpointError: no manifest, or one with any bit of it changed.
    """
    try:
        raw = (folder / MANIFEST).read_bytes()
        manifest = json.loads(raw)
        version, listed = manifest["format"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"no readable {MANIFEST}", where=folder, cause="the folder is not complete") from None
    if version != 1:
        raise CheckpointError(f"{MANIFEST} has format {version}", where=folder, cause="damage, or a newer puna")
    # A flipped bit can leave JSON of the same meaning (a blank that became a tab), but never the bytes we write.
    if raw != _json(manifest).encode():
        raise CheckpointError(f"{MANIFEST} is not as it was written", where=folder, cause="damage, or an editor")
    return listed


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def sweep(parent: Path, *, held: bool = False) -> None:
    """Remove temporary files and folders of processes of this machine that are gone.

    Args:
        held: the caller holds the lock of this place, so everything temporary here is left over, also what has the
            number of a process that lives now, or the name of another machine (a container has a new one each start).
    """
    for left in parent.glob(f".*{_TEMPORARY if held else MARK}*"):
        owner = left.name.rpartition("-")[2]
        if owner.isdigit() and (held or not _alive(int(owner))):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; the lock is the kernel's and goes with the process, however it ends.

    Raises:
        ResourceError: another live process holds it.
    """
    with (folder / ".lock").open("a+") as file:
        try:
            _take(file)
        except OSError:
            file.seek(0)
            raise ResourceError(
                f"another run is writing here (process {file.read().strip() or 'unknown'})",
                where=folder,
                fix="wait for it, or choose another output=...",
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _take(file: IO[str]) -> None:
    """The lock of an open file, also when someone has just been looking whether it is held."""
    import fcntl

    for _ in range(5):
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.02)
    return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_locked(folder: Path) -> bool:
    """Whether a live process holds `folder`."""
    import fcntl

    try:
        with (folder / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def make_folder(folder: Path) -> None:
    """Create a folder and its parents.

    Raises:
        UsageError: it cannot be one: a file stands there, or it may not be written.
    """
    new = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for made in new:
            _fsync(made.parent)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise UsageError(
            f"cannot be a folder: {error.strerror}", where=folder, fix="another place to write to"
        ) from None


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn a full disk into ResourceError."""
    # BaseException: torch's CheckpointException does not derive from Exception.
    try:
        yield
    except BaseException as error:
        if (isinstance(error, OSError) and error.errno in DISK_FULL) or "No space left" in str(error):
            raise ResourceError(
                "the disk is full; what was there before is untouched",
                where=target,
                fix="free some space and run it again",
            ) from error
        raise


def require_space(folder: Path, size: int) -> None:
    """Refuse before writing when `folder`'s disk has less than 1.1 x `size` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < 1.1 * size:
        raise ResourceError(
            f"saving needs {size / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free",
            where=folder,
            fix="free some space",
        )


def _files(folder: Path) -> dict[str, Path]:
    """The files a manifest lists, by name."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    return {str(p.relative_to(folder)): p for p in files}


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "hash": hash_file(path)}


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(target: Path) -> Path:
    """Where `target` is written before it is renamed: hidden, and telling which process of which machine owns it."""
    return target.with_name(f".{target.name}{MARK}{os.getpid()}")


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
