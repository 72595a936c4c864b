"""GGUF, llama.cpp's single-file format: a header reader that trusts nothing, and the tensors.

Every count, length and offset is checked against the bytes that are left before anything is allocated, so a hostile
file of any shape ends in a CheckpointError at once (published readers loop or overflow on such files).
"""

import math
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from mmap import mmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from puna.checkpoint.gguf.blocks import LAYOUTS, Ggml, dequantize
from puna.checkpoint.mapped import mapped
from puna.errors import CheckpointError

_MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q", 12: "<d"}
_DTYPES = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_MAX_STRINGS = 1 << 19  # in the whole file: Llama 3 has 128,256 tokens and 280,147 merges
_MAX_VALUES = 1 << 12
_MAX_DIMS = 4
_CUT = "an incomplete download, or a hostile file"
_PART = 32 << 20  # bytes of fp32 that `read_rows` makes at once
_MAX_TENSORS = 1 << 14  # the largest Llama has 1,137


@dataclass
class Gguf:
    """An open file: its metadata and where each tensor lies. Weights are read when asked for."""

    path: Path
    metadata: dict[str, Any]
    _tensors: dict[str, "_Tensor"] = field(repr=False)
    _bytes: Any = field(repr=False)

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in our order: outermost first."""
        return self._tensors[name].shape

    def kinds(self) -> str:
        """What the weights are stored in, most tensors first: `Q4_1 x 210, F32 x 61`."""
        counts = Counter(tensor.kind.name for tensor in self._tensors.values())
        return ", ".join(f"{kind} x {count}" for kind, count in counts.most_common())

    def kind(self, name: str) -> Ggml:
        """What the tensor is stored in."""
        return self._tensors[name].kind

    def raw(self, name: str) -> np.ndarray:
        """The tensor's bytes: uint8, read-only memory of the file."""
        tensor = self._tensors[name]
        return np.frombuffer(self._bytes, np.uint8, tensor.size, tensor.offset)

    def read(self, name: str) -> np.ndarray:
        """The tensor dequantized to fp32.

        Raises:
            CheckpointError: a type that is not read here, or scales that are not finite.
        """
        return self._dequantized(name, self.raw(name)).reshape(self.shape(name))

    def read_rows(self, name: str) -> Iterator[np.ndarray]:
        """`read` some rows at a time.

        Raises:
            CheckpointError: as `read`.
        """
        raw, columns = self.raw(name), self.shape(name)[-1]
        width = raw.size // (math.prod(self.shape(name)) // columns)  # bytes of a row
        step = max(1, _PART // (4 * columns)) * width
        for at in range(0, raw.size, step):
            yield self._dequantized(name, raw[at : at + step]).reshape(-1, columns)

    def _dequantized(self, name: str, raw: np.ndarray) -> np.ndarray:
        try:
            return dequantize(raw, self.kind(name))
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error.what}", where=self.path, cause=error.cause, fix=error.fix) from None


@dataclass(frozen=True)
class _Tensor:
    kind: Ggml
    shape: tuple[int, ...]
    offset: int
    size: int


def is_gguf(path: Path) -> bool:
    """Whether it is a file that begins as GGUF does, whatever it is called."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == _MAGIC


def open_gguf(path: Path) -> Gguf:
    """Read the header and check every tensor's place.

    Raises:
        CheckpointError: not a GGUF file, or one whose header does not describe it.
    """
    data = mapped(path)
    reader = _Reader(data, path)
    if reader.take(4) != _MAGIC:
        raise reader.wrong("not a GGUF file")
    version = reader.scalar(4)
    if version not in (2, 3):
        raise reader.wrong(f"GGUF version {version}; 2 and 3 are read")
    n_tensors, n_values = reader.count(24, _MAX_TENSORS), reader.count(13, _MAX_VALUES)
    metadata: dict[str, Any] = {}
    for _ in range(n_values):
        key = reader.string()
        if not key or key in metadata:
            raise reader.wrong(f"empty or repeated key {key[:80]!r}")
        metadata[key] = reader.value(reader.scalar(4))
    infos = [reader.tensor_info() for _ in range(n_tensors)]
    return Gguf(path, metadata, _place(infos, reader, metadata.get("general.alignment", 32)), data)


def _place(infos: list["_Info"], reader: "_Reader", alignment: Any) -> dict[str, _Tensor]:
    if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
        raise reader.wrong(f"alignment {alignment!r}")
    start = -(-reader.at // alignment) * alignment
    tensors: dict[str, _Tensor] = {}
    for info in infos:
        if info.name in tensors:
            raise reader.wrong(f"two tensors are called {info.name[:80]!r}")
        if info.kind not in LAYOUTS:
            what = f"tensor {info.name[:80]!r} has ggml type {info.kind}, which is not known"
            raise reader.wrong(what, "a newer file format")
        per_block, block_bytes = LAYOUTS[Ggml(info.kind)]
        if info.offset % alignment or info.shape[-1] % per_block:
            raise reader.wrong(f"tensor {info.name[:80]!r} is not aligned or not whole blocks")
        size = math.prod(info.shape) // per_block * block_bytes
        if start + info.offset + size > reader.size:
            raise reader.cut_off(info.name)
        tensors[info.name] = _Tensor(Ggml(info.kind), info.shape, start + info.offset, size)
    _no_overlap(tensors, reader)
    return tensors


def _no_overlap(tensors: dict[str, _Tensor], reader: "_Reader") -> None:
    """A small file could otherwise promise any number of large tensors."""
    placed = sorted((tensor.offset, tensor.size, name) for name, tensor in tensors.items())
    for (offset, size, name), (following, _, other) in pairwise(placed):
        if offset + size > following:
            raise reader.wrong(f"tensors {name[:80]!r} and {other[:80]!r} overlap")


class _Info(NamedTuple):
    """A tensor as the header tells it."""

    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int


class _Reader:
    """A cursor that never moves past the end."""

    def __init__(self, data: mmap, path: Path):
        self.data, self.path, self.at, self.size = data, path, 0, len(data)
        self.strings_left = _MAX_STRINGS

    def wrong(self, what: str, cause: str = "a damaged or hostile file") -> CheckpointError:
        return CheckpointError(what, where=f"{self.path} at byte {self.at:,}", cause=cause)

    def cut_off(self, tensor: str) -> CheckpointError:
        what = f"the file ends at byte {self.size:,}, before its tensor {tensor[:80]!r} does"
        return self.wrong(what, "an incomplete download")

    def take(self, n: int) -> bytes:
        if n > self.size - self.at:
            raise self.wrong(f"{n:,} bytes are promised, {self.size - self.at:,} are left", _CUT)
        self.at += n
        return self.data[self.at - n : self.at]

    def scalar(self, kind: int) -> Any:
        code = _SCALARS.get(kind)
        if code is None:
            raise self.wrong(f"value type {kind} does not exist")
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def count(self, smallest: int, most: int | None = None) -> int:
        """A u64 count of things of at least `smallest` bytes: more than fit the rest of the file is a lie."""
        n = self.scalar(10)
        if n > (self.size - self.at) // smallest:
            raise self.wrong(f"{n:,} items are promised, the rest of the file cannot hold them", _CUT)
        if most is not None and n > most:
            raise self.wrong(f"{n:,} items are promised, no Llama has more than {most:,}")
        return n

    def string(self) -> str:
        return self.take(self.count(1)).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(kind)
        item = self.scalar(4)
        if item == _STRING:
            n = self.count(8, self.strings_left)
            self.strings_left -= n
            return [self.string() for _ in range(n)]
        if item not in _DTYPES:  # arrays of arrays exist on paper only
            raise self.wrong(f"an array of value type {item}")
        dtype = np.dtype(_DTYPES[item])
        n = self.count(dtype.itemsize)
        self.at += n * dtype.itemsize
        return np.frombuffer(self.data, dtype, n, self.at - n * dtype.itemsize)

    def tensor_info(self) -> _Info:
        name, n_dims = self.string(), self.scalar(4)
        if not 1 <= n_dims <= _MAX_DIMS:
            raise self.wrong(f"tensor {name[:80]!r} has {n_dims} dimensions")
        shape = tuple(reversed([self.scalar(10) for _ in range(n_dims)]))
        if min(shape) < 1:
            raise self.wrong(f"tensor {name[:80]!r} has shape {shape}")
        if math.prod(shape) > 8 * self.size:  # no type has less than a bit a weight
            raise self.cut_off(name)
        return _Info(name, self.scalar(4), shape, self.scalar(10))
