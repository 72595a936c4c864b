"""torch.save's files (.pth, .pt, .bin): a zip of one pickle and a record of bytes for each tensor.

Read without running the pickle (see `pickles`) and without a copy: tensors are the file's own memory. Written a tensor
at a time, which torch.save cannot.
"""

import mmap
import struct
import warnings
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from puna.checkpoint.pickles import Place, Refused, read_pickle, write_pickle
from puna.checkpoint.stored import Weight
from puna.errors import CheckpointError
from puna.log import harmless

_LARGEST_PICKLE = 4 << 20  # names and sizes alone: the 1,138 tensors of the largest Llama take 0.2 MB
_LARGEST_ORDER = 99
_LARGEST_DIRECTORY = 1 << 20  # the 1,138 tensors of the largest Llama take 0.2 MB
_END, _LOCATOR, _END64 = 22, 20, 56  # bytes of the three records that a zip ends with, from the last one on
_OTHERS = {
    b"\x80": "a bare pickle, as torch wrote before 1.6", b"7z\xbc\xaf": "a 7z archive", b"\x1f\x8b": "a gzip archive",
    b"GGUF": "a GGUF file", b"\x93NUMPY": "a NumPy array", b"BZh": "a bzip2 archive", b"Rar!": "a RAR archive",
    b"\xfd7zXZ": "an xz archive",
}  # fmt: skip
_ALIGNMENT = 64  # torch maps records into memory, where tensors begin at whole cache lines
_LOCAL, _ZIP64_FIELD = 30, 20  # bytes of a local header before its name; of the field for sizes from 4 GB on


def open_torch_file(path: Path) -> dict[str, Weight]:
    """The tensors of a dictionary saved by torch.save, by their names. Only names and sizes are read.

    Names of the same part of a record get the same `Weight`.

    Raises:
        CheckpointError: another kind of file, a damaged one, or one that asks for more than tensors.
    """
    try:
        with path.open("rb") as file:
            _check_directory(file)
            with zipfile.ZipFile(file) as archive:
                folder, places = _index(archive)
                starts = {p.key: _start(file, archive, f"{folder}/data/{p.key}", p) for p in places.values()}
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise CheckpointError(f"no {path.name} here", where=path.parent, cause="an incomplete copy") from None
    except (zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(
            f"not a torch file: {_kind(path)} ({error or 'it ends too early'})", where=path,
            cause="an incomplete download, or another kind of file with this name",
            fix="puna reads what torch.save writes since 1.6, safetensors and GGUF, and runs nothing found in them",
        ) from None  # fmt: skip
    except (Refused, OSError, ValueError, NotImplementedError, RuntimeError, struct.error) as error:
        raise CheckpointError(
            f"refused: {harmless(str(error))}", where=path,
            cause="not a checkpoint of tensors alone, damage, or an attack",
            fix="a copy as .safetensors; puna runs nothing that a file asks for",
        ) from None  # fmt: skip
    weights = {p: Weight(p.shape, p.dtype, partial(_view, data, starts[p.key], p)) for p in places.values()}
    return {name: weights[place] for name, place in places.items()}


def _check_directory(file: BinaryIO) -> None:
    """`zipfile` takes in the whole directory before anyone can look at it: six times its size in memory.

    Where it lies is told by the end of the file. There are two ways to say it, and the larger number of them counts.

    Raises:
        BadZipFile: no end of a zip, or a comment after it, in which a second end could hide: torch writes none.
        Refused: a directory that is too large, or a large zip's end that is not where torch writes it.
    """
    size = file.seek(0, 2)
    at_locator, at_end64 = size - _END - _LOCATOR, size - _END - _LOCATOR - _END64
    end, locator, end64 = (
        _at(file, at, n) for at, n in ((size - _END, _END), (at_locator, _LOCATOR), (at_end64, _END64))
    )
    if end[:4] != b"PK\5\6" or end[-2:] != b"\0\0":
        raise zipfile.BadZipFile("it does not end as a zip does")
    length = struct.unpack_from("<I", end, 12)[0]
    if locator[:4] == b"PK\6\7":
        if end64[:4] != b"PK\6\6" or struct.unpack_from("<Q", locator, 8)[0] != at_end64:
            raise Refused("the end of its directory is not where torch writes it")
        length = struct.unpack_from("<Q", end64, 40)[0]
    if length > _LARGEST_DIRECTORY:
        raise Refused(f"a directory of {length:,} bytes, where a model's has less than {_LARGEST_DIRECTORY:,}")


def _at(file: BinaryIO, at: int, size: int) -> bytes:
    if at < 0:
        return b""
    file.seek(at)
    return file.read(size)


def _index(archive: zipfile.ZipFile) -> tuple[str, dict[str, Place]]:
    """The folder inside the archive, and the tensors."""
    names = [info.filename for info in archive.infolist()]
    if len(set(names)) < len(names):
        raise Refused("two records have one name")
    pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise Refused(f"a zip archive with {len(pickles)} data.pkl inside, not a torch file")
    folder = pickles[0].split("/")[0]
    order = f"{folder}/byteorder"
    if order in names and _content(archive, order, _LARGEST_ORDER) == b"big":
        raise Refused("its numbers are big-endian")
    return folder, _tensors(read_pickle(_content(archive, pickles[0], _LARGEST_PICKLE)))


def _content(archive: zipfile.ZipFile, name: str, largest: int) -> bytes:
    """A small record. Only a plain one: what is compressed can be any number of times as long as the file."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or not info.compress_size == info.file_size <= largest:
        raise Refused(f"the record {name[:80]} is compressed or too large, as torch writes none")
    return archive.read(info)


def _tensors(value: Any) -> dict[str, Place]:
    if not isinstance(value, dict):
        kind = "tensor" if isinstance(value, Place) else type(value).__name__
        raise Refused(f"it holds a {kind}, not tensors by name")
    tensors = {name: place for name, place in value.items() if isinstance(place, Place) and isinstance(name, str)}
    if len(tensors) < len(value):
        others = ", ".join(str(name)[:40] for name in list(value)[:5] if name not in tensors)
        raise Refused(f"it holds more than tensors by name ({others}): the state of a training, not a model")
    return tensors


def _start(file: BinaryIO, archive: zipfile.ZipFile, name: str, place: Place) -> int:
    """Where the bytes of a record begin.

    Raises:
        Refused: no such record, or one that is not `place`'s plain bytes.
    """
    if name not in archive.NameToInfo:
        raise Refused(f"the record {name[:80]} is missing")
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise Refused(f"the record {name[:80]} is compressed or encrypted, as torch writes none")
    file.seek(info.header_offset)
    magic, name_size, extra_size = struct.unpack("<4s22xHH", file.read(_LOCAL))
    start = info.header_offset + _LOCAL + name_size + extra_size
    size = place.numel * place.dtype.itemsize
    if magic != b"PK\3\4" or size > info.file_size or start + size > file.seek(0, 2):
        raise Refused(f"the record {name[:80]} does not hold its tensor")
    return start


def _view(data: mmap.mmap, start: int, place: Place) -> Tensor:
    """The tensor as read-only memory of the file."""
    if not place.numel:
        return torch.empty(place.shape, dtype=place.dtype)
    with warnings.catch_warnings():  # "not writable": nobody writes into a stored weight
        warnings.simplefilter("ignore")
        whole = torch.frombuffer(data, dtype=place.dtype, count=place.numel, offset=start)
    return whole.as_strided(place.shape, place.stride, place.offset)


def _kind(path: Path) -> str:
    with path.open("rb") as file:
        begins = file.read(16)
    return next((what for magic, what in _OTHERS.items() if begins.startswith(magic)), "not a whole zip archive")


class TorchFile:
    """A file for torch.load, written a tensor at a time: `with TorchFile(path, shapes) as f: f.write(name, tensor)`."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], same: Mapping[str, str]):
        """
        Args:
            tensors: name: (shape, dtype), all of them.
            same: name: name in `tensors`, for a tensor that is the same bytes under a second name.
        """
        self._keys = {name: str(i) for i, name in enumerate(tensors)}
        self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)
        places = {name: _contiguous(self._keys[name], *spec) for name, spec in tensors.items()}
        places |= {name: places[first] for name, first in same.items()}
        self._record("data.pkl", memoryview(write_pickle(places)))
        self._record("byteorder", memoryview(b"little"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if kind is None:
            self._record("version", memoryview(b"3\n"))
        self._zip.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one of the tensors that were announced."""
        raw: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        self._record(f"data/{self._keys[name]}", memoryview(raw))

    def _record(self, name: str, raw: memoryview) -> None:
        info = zipfile.ZipInfo(f"consolidated/{name}")  # a fixed date: equal weights make equal files
        info.file_size, large = raw.nbytes, raw.nbytes >= 1 << 30
        assert self._zip.fp is not None
        begins = self._zip.fp.tell() + _LOCAL + len(info.filename) + 4 + (_ZIP64_FIELD if large else 0)
        padding = -begins % _ALIGNMENT
        info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
        with self._zip.open(info, "w", force_zip64=large) as record:
            record.write(raw)


def _contiguous(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Place:
    stride, step = [], 1
    for size in reversed(shape):
        stride.insert(0, step)
        step *= size
    return Place(key, dtype, step, 0, shape, tuple(stride))
