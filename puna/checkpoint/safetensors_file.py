"""A safetensors file read and written a tensor at a time, its header trusted in nothing.

Layout: the header's length (u64, little-endian), the header (JSON: name -> dtype, shape, data_offsets), the data. The
format promises data without overlaps or holes; here that is checked before anything is believed, in bounded memory.
"""

import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from puna.errors import CheckpointError

if TYPE_CHECKING:
    from puna.ops.packed import Packed

_PART = 32 << 20  # bytes of a tensor that are cast or written at once
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8}
_KNOWN = _FLOATS | _INTEGERS
# In the order of the format's own writer, which puts wide types first so that every tensor is aligned.
_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I8", "U8")
STORED = {_KNOWN[name]: name for name in _ORDER}
"""How the format names the dtypes that weights have."""
_WIDTHS = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
_HEADER_BYTES = 2_000_000
"""Longest header that is parsed: some 15,000 tensors, where Llama 3.1 405B has 1,138. JSON of `{}` grows 25-fold."""


class Weight(NamedTuple):
    """One tensor that is not read yet. `dtype` is what `read` gives: as stored, or fp32 of a quantized one."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """The tensor with our rows: RoPE's halves, not Meta's neighbours. It may be read-only memory of the file."""
    owned: bool = False
    """Whether `read` gives memory that nobody else holds, so that a model may keep it."""
    quantized: bool = False
    """Whether it is stored in blocks of integers."""
    packed: "Callable[[], Packed] | None" = None
    """The same weight as it lies, where a model can compute in it: its rows as those of `read`."""
    kind: str = ""
    """What it is stored in, where that is not `dtype`: `INT4`."""
    read_parts: Callable[[], Iterable[Tensor]] | None = None
    """The same some rows at a time, where that takes less memory than `read`."""

    def parts(self) -> Iterable[Tensor]:
        """The tensor as what has to be put together along its first dimension, for those who need not hold it whole."""
        if self.read_parts:
            return self.read_parts()
        rows = max(1, _PART // max(1, self.nbytes // max(1, self.shape[0]))) if self.shape else 0
        return self.read().split(rows) if rows else [self.read()]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Entry(NamedTuple):
    """Where a tensor lies; `begin` and `end` count from the start of the file, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """What a file holds. `stamp` tells it from another file of the same name."""

    entries: dict[str, Entry]
    stamp: tuple[int, ...]


def read_header(file: Path) -> Header:
    """The tensors of a file by name, in the order of their data; nothing but the header is read.

    Raises:
        CheckpointError: no such file, or a header that does not describe exactly the bytes that follow it.
    """
    try:
        with file.open("rb") as stream:
            stamp = _stamp(stream.fileno())
            size = stamp[0]
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(size - 8, _HEADER_BYTES):
                raise _damaged(
                    file, f"its header of {length} bytes is not between 2 and {min(size - 8, _HEADER_BYTES)}"
                )
            raw = stream.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"no {file.name} here", where=file.parent, cause="an incomplete copy") from None
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=file) from None
    entries = {n: _entry(file, n, e, 8 + length) for n, e in _parsed(file, raw).items()}
    entries = dict(sorted(entries.items(), key=lambda item: item[1][2:]))
    at = 8 + length
    for name, entry in entries.items():
        if entry.begin != at:
            raise _damaged(
                file, f"{name!r} {'overlaps' if entry.begin < at else 'leaves a hole after'} what is before it"
            )
        at = entry.end
    if at != size:
        raise _damaged(file, f"{size} bytes, the header describes {at}")
    return Header(entries, stamp)


def open_safetensors(file: Path, integers: bool = False) -> dict[str, Weight]:
    """The tensors of a file by their disk names, none of them read yet.

    Args:
        integers: allow those of quantized weights.

    Raises:
        CheckpointError: as `read_header`, or tensors that are not floats (a quantized model).
    """
    entries, stamp = read_header(file)
    for name, entry in entries.items():
        if entry.dtype not in (_KNOWN if integers else _FLOATS):
            raise CheckpointError(
                f"{name!r} is stored as {entry.dtype}", where=file, cause="a quantized model",
                fix="the model it was quantized from, or its GGUF",
            )  # fmt: skip
    return {n: Weight(e.shape, _KNOWN[e.dtype], partial(_read, file, n, e, stamp), True) for n, e in entries.items()}


def write_safetensors(file: Path, weights: Mapping[str, Weight], progress: Callable[[str], None]) -> None:
    """Write tensors one by one, each read, written and let go of; byte for byte what `safetensors` itself would write.

    Raises:
        CheckpointError: a tensor that is not what its `Weight` says.
    """
    order = sorted(weights, key=lambda name: ([*STORED].index(weights[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        shape, dtype = weights[name][:2]
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": STORED[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for part in _checked(file, name, weights[name]):
                stream.write(_bytes(part))
            progress(name)


def _parsed(file: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) != len(pairs):
            raise ValueError("a name that is given twice")
        return found

    try:
        tree = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"its header is not JSON: {str(error)[:100]}") from None
    metadata = tree.pop("__metadata__", {}) if raw[:1] == b"{" and isinstance(tree, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(file, "its header is not a mapping of tensors, with texts as metadata")
    return tree


def _entry(file: Path, name: str, value: Any, start: int) -> Entry:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        whole = all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end))
        if len(value) == 3 and len(shape) <= 8 and whole and end - begin == math.prod(shape) * _WIDTHS[dtype]:
            return Entry(dtype, shape, start + begin, start + end)
    except (KeyError, TypeError, ValueError):
        pass
    raise _damaged(file, f"{name[:100]!r} has no dtype, shape and offsets that agree")


def _read(file: Path, name: str, entry: Entry, stamp: tuple[int, ...]) -> Tensor:
    """The tensor as a mapping of its own, private and copied where it is written to.

    One mapping a tensor, not one a file: a tensor that was only converted leaves memory when it is let go of. Readers
    of the same file share its pages; first touches of 270 MB of fresh memory cost 25 times what mapping them does.
    """
    if entry.begin == entry.end:
        return torch.empty(entry.shape, dtype=_KNOWN[entry.dtype])
    with file.open("rb") as stream:
        if _stamp(stream.fileno()) != stamp:
            raise CheckpointError("changed since it was opened", where=file, cause="a download or a save at this place")
        start = entry.begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        memory = mmap.mmap(stream.fileno(), entry.end - start, offset=start, access=mmap.ACCESS_COPY)
    raw = torch.frombuffer(memory, dtype=torch.uint8, offset=entry.begin - start)
    if entry.begin % 8:  # a header of odd length: torch's kernels want numbers at multiples of their size
        raw = raw.clone()
    return raw.view(_KNOWN[entry.dtype]).view(entry.shape)


def _checked(file: Path, name: str, weight: Weight) -> Iterator[Tensor]:
    """The parts of a tensor, of which no more than one is held."""
    rows = 0
    for part in weight.parts():
        rows += part.shape[0] if part.ndim else 0
        if part.dtype != weight.dtype or part.shape[1:] != weight.shape[1:]:
            raise CheckpointError(f"{name} is (.., {tuple(part.shape[1:])}) {part.dtype}, not {weight[:2]}", where=file)
        yield part.contiguous()
    if rows != (weight.shape[0] if weight.shape else 0):
        raise CheckpointError(f"{name} is of {rows:,} rows, not {weight.shape}", where=file)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _stamp(descriptor: int) -> tuple[int, ...]:
    about = os.fstat(descriptor)
    return about.st_size, about.st_ino, about.st_mtime_ns


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"damaged: {what}", where=file, cause="an incomplete copy, or not a safetensors file")
