"""torch's files read without unpickling: equal to torch.load, and nothing a file asks for ever happens."""

import contextlib
import io
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz import damaged, ends_at_once, fuzz
from torch import Tensor, nn

from puna.checkpoint.pickles import Refused, read_pickle
from puna.checkpoint.torch_file import TorchFile, open_torch_file
from puna.errors import CheckpointError

KINDS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def tensors() -> dict[str, Tensor]:
    """Every dtype, and the ways in which a tensor can lie in its record."""
    made = {f"{kind}": torch.arange(24).reshape(4, 6).to(kind) for kind in KINDS}
    base = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    made |= {"turned": base.t(), "part": base[2:5, 1:7:2], "one": torch.tensor(3.5), "none": torch.empty(0, 3)}
    return made | {"parameter": nn.Parameter(torch.ones(3))}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_read_equals_torch(kind: type, protocol: int, tmp_path: Path) -> None:
    """Strides, offsets, shared records or dtypes read another way than torch does."""
    torch.save(kind(tensors()), tmp_path / "a.pth", pickle_protocol=protocol)
    read, wanted = open_torch_file(tmp_path / "a.pth"), torch.load(tmp_path / "a.pth", weights_only=protocol == 2)
    assert list(read) == list(wanted)
    for name, tensor in wanted.items():
        assert read[name].shape == tensor.shape
        assert read[name].read().dtype == read[name].dtype == tensor.dtype
        assert torch.equal(read[name].read(), tensor)


def test_a_modules_state_is_read(tmp_path: Path) -> None:
    """state_dict() carries module versions as attributes of the dictionary."""
    module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    torch.save(module.state_dict(), tmp_path / "a.bin")
    read = open_torch_file(tmp_path / "a.bin")
    assert all(torch.equal(read[n].read(), t) for n, t in module.state_dict().items())


@pytest.mark.parametrize("mapped", [False, True])
def test_torch_reads_what_is_written(mapped: bool, tmp_path: Path) -> None:
    """A zip that only its own writer opens; records that are not aligned when they are mapped."""
    made = {name: t.detach() for name, t in tensors().items()}
    with TorchFile(tmp_path / "a.pth", {n: (tuple(t.shape), t.dtype) for n, t in made.items()}, {"x": "part"}) as file:
        for name, tensor in reversed(made.items()):
            file.write(name, tensor)
    read = torch.load(tmp_path / "a.pth", weights_only=True, mmap=mapped)
    assert list(read) == [*made, "x"]
    assert all(torch.equal(read[n], t) for n, t in made.items())
    assert read["x"].data_ptr() == read["part"].data_ptr()
    assert not mapped or all(t.data_ptr() % 64 == 0 for t in read.values() if t.numel())
    assert zipfile.ZipFile(tmp_path / "a.pth").testzip() is None  # checksums
    ours = open_torch_file(tmp_path / "a.pth")
    assert all(torch.equal(ours[n].read(), t) for n, t in made.items())


def test_writing_stopped_midway_leaves_no_file_that_opens(tmp_path: Path) -> None:
    """A kill or a full disk in the middle, and a file that looks whole."""
    path = tmp_path / "a.pth"

    def stopped() -> None:
        with TorchFile(path, dict.fromkeys("ab", ((2,), torch.float32)), {}) as file:
            file.write("a", torch.ones(2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    with pytest.raises(CheckpointError, match="data/1 is missing"):
        open_torch_file(path)
    with pytest.raises(RuntimeError):
        torch.load(path, weights_only=True)


Sizes = tuple[int, ...]
CANARY = "canary"


class Canary:
    """Unpickled by anything that runs pickles, it makes a file."""

    def __reduce__(self) -> Any:
        return os.mkdir, (os.path.abspath(CANARY),)


def archive(raw: bytes, records: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A torch file around a pickle."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", compression) as file:
        file.writestr("archive/data.pkl", raw)
        for name, content in (records or {}).items():
            file.writestr(f"archive/{name}", content)
        file.writestr("archive/version", "3\n")
    return made.getvalue()


def saved(value: Any, **options: Any) -> bytes:
    made = io.BytesIO()
    torch.save(value, made, **options)
    return made.getvalue()


def as_array(value: Any) -> bytes:
    made = io.BytesIO()
    np.save(made, np.array([value], dtype=object), allow_pickle=True)
    return made.getvalue()


def wrong_sum(content: bytes) -> bytes:
    """The checksums in a zip's directory changed, which made scanners give up where torch went on."""
    changed, at = bytearray(content), content.find(b"PK\1\2")
    while at >= 0:
        changed[at + 16] ^= 0xFF
        at = content.find(b"PK\1\2", at + 1)
    return bytes(changed)


def hostile(folder: Path) -> dict[str, bytes]:
    """Files that make a folder `canary` in `folder` when what is inside is unpickled, by name."""
    before = Path.cwd()
    os.chdir(folder)  # __reduce__ is called here, and names the place
    try:
        canary = {"model.norm.weight": Canary(), "x": torch.ones(2)}
        plain = pickle.dumps(canary, protocol=2)
        place = os.path.abspath(CANARY).encode()
        called = b"cos\nmkdir\n(X" + struct.pack("<I", len(place)) + place + b"tR"
        swapped = b"ccollections\nOrderedDict\n)R}X\x09\0\0\0__class__cos\nmkdir\nsb"
        storage = b"(X\7\0\0\0storagecos\nmkdir\nX\1\0\0\0" + b"0X\3\0\0\0cpuK\1tQ"
        return {
            "saved": saved(canary),
            "saved with protocol 4": saved(canary, pickle_protocol=4),
            "saved before 1.6": saved(canary, _use_new_zipfile_serialization=False),
            "optimizer state": saved({"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [Canary()]}),
            "a bare pickle": plain,
            "nested zip": archive(saved(canary)),
            "zip in a zip": archive(b"", {"inner.zip": saved(canary)}),
            "bad checksums": wrong_sum(saved(canary)),
            "compressed": archive(plain, compression=zipfile.ZIP_DEFLATED),
            "renamed array": as_array(Canary()),
            "7z": b"7z\xbc\xaf\x27\x1c" + plain,
            "called before it breaks": archive(b"\x80\x02" + called + b"\xff\xff"),
            "called and cut off": archive(b"\x80\x02" + called),
            "called and thrown away": archive(b"\x80\x02" + called + b"0}."),
            "by INST": archive(b"\x80\x02(X" + struct.pack("<I", len(place)) + place + b"ios\nmkdir\n."),
            "by OBJ": archive(b"\x80\x02(cos\nmkdir\nX" + struct.pack("<I", len(place)) + place + b"o."),
            "by NEWOBJ": archive(b"\x80\x02cos\nmkdir\nX" + struct.pack("<I", len(place)) + place + b"\x85\x81."),
            "by name": archive(b"\x80\x04\x8c\x07pkgutil\x8c\x0cresolve_name\x93\x8c\x08os:mkdir\x85R."),
            "by BUILD": archive(b"\x80\x02" + swapped + called + b"."),
            "by a storage": archive(b"\x80\x02}X\1\0\0\0x" + storage + b"s."),
        }  # fmt: skip
    finally:
        os.chdir(before)


def test_nothing_a_file_asks_for_happens(tmp_path: Path) -> None:
    """`__reduce__` in whatever wrapping: a model that takes over the machine that looks at it."""
    files = hostile(tmp_path)
    for name, content in files.items():
        path = tmp_path / "model.pth"
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as told:
            open_torch_file(path)
        assert str(path) in str(told.value), name
        assert not (tmp_path / CANARY).exists(), name


def test_the_canary_sings_where_pickles_are_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A canary that never could be created proves nothing."""
    monkeypatch.chdir(tmp_path)
    files = hostile(tmp_path)
    for name in ("saved", "saved with protocol 4", "saved before 1.6", "a bare pickle"):
        content = io.BytesIO(files[name])
        pickle.load(content) if name == "a bare pickle" else torch.load(content, weights_only=False)
        assert (tmp_path / CANARY).is_dir(), name
        (tmp_path / CANARY).rmdir()


def number(n: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", n)


def tensor(
    count: int = 4, offset: int = 0, shape: Sizes = (4,), stride: Sizes = (1,), key: bytes = b"0",
    kind: bytes = b"FloatStorage",
) -> bytes:  # fmt: skip
    """The pickle of one tensor with any numbers."""
    sizes = [b"(" + b"".join(map(number, values)) + b"t" for values in (shape, stride)]
    record = b"(X\7\0\0\0storagectorch\n" + kind + b"\nX" + struct.pack("<I", len(key)) + key + b"X\3\0\0\0cpu"
    made = b"ctorch._utils\n_rebuild_tensor_v2\n(" + record + number(count) + b"tQ" + number(offset)
    return b"\x80\x02}X\1\0\0\0x" + made + sizes[0] + sizes[1] + b"\x89ccollections\nOrderedDict\n)RtRs."


DATA = {"data/0": bytes(16)}


def directory(records: int, extra: bytes = b"", large: bool = False, comment: bytes = b"") -> bytes:
    """A zip of nothing but its directory; `large`: its size is told in the record that large zips have."""
    record = struct.pack("<4s24xHHH12x", b"PK\1\2", 0, len(extra), 0) + extra
    size, end = len(record) * records, b""
    if large:
        end = struct.pack("<4sQ28xQQ", b"PK\6\6", 44, size, 0) + struct.pack("<4sIQI", b"PK\6\7", 0, size, 1)
    told = 0xFFFFFFFF if large else size
    end += struct.pack("<4s8xIIH", b"PK\5\6", told, 0xFFFFFFFF if large else 0, len(comment)) + comment
    return record * records + end


def elsewhere(content: bytes) -> bytes:
    """The end of a large zip, which its locator says lies at the start of the file, where another one is."""
    at = content.rindex(b"PK\6\7")
    return content[: at + 8] + bytes(8) + content[at + 16 :]


def broken_order() -> bytes:
    """A sound file whose byteorder is deflated, but not to what any zlib inflates."""
    made, content = io.BytesIO(archive(tensor(), DATA)), bytes(range(90))
    with zipfile.ZipFile(made, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/byteorder", content)
    packed = zlib.compress(content, wbits=-15)
    assert packed in made.getvalue()
    return made.getvalue().replace(packed, b"\xff" * len(packed))


MALFORMED: dict[str, bytes] = {
    "empty": b"",
    "half a header": b"PK\3\4",
    "no pickle": archive(b""),
    "no end": archive(b"\x80\x02}"),
    "an empty stack": archive(b"\x80\x02R."),
    "no such memo": archive(b"\x80\x02h\7."),
    "unknown opcode": archive(b"\x80\x02\xfe."),
    "a number": archive(b"\x80\x02K\7."),
    "a tensor": archive(tensor()[:2] + tensor()[9:-2] + b".", DATA),
    "a string longer than the file": archive(b"\x80\x02X\xff\xff\xff\x7fabc."),
    "bytes longer than memory": archive(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"."),
    "numbers of many digits": archive(b"\x80\x02L" + b"9" * 100_000 + b"L\n."),
    "nested a thousand times": archive(b"\x80\x02" + b"(" * 5000 + b"t" * 5000 + b"."),
    "a tuple of itself as a name": archive(b"\x80\x02})q\0" + b"(h\0h\0tq\0" * 60 + b"Ns."),
    "a record that is not there": archive(tensor()),
    "a record that is too small": archive(tensor(), {"data/0": bytes(12)}),
    "beyond its record": archive(tensor(shape=(5,)), DATA),
    "larger than its record": archive(tensor(shape=(4, 1 << 40), stride=(1, 0)), DATA),
    "many dimensions": archive(tensor(shape=(1,) * 100, stride=(1,) * 100), DATA),
    "pairs of any length": archive(
        b"\x80\x02]q\0(" + b"N" * 10_000 + b"eccollections\nOrderedDict\n](" + b"h\0" * 6000 + b"e\x85R."
    ),
    "a long name many times": archive(
        b"\x80\x04X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20) + b"q\0" + b"h\0h\0\x93" * 500 + b"."
    ),
    "many lists": archive(b"\x80\x02" + b"]" * 300_000 + b"."),
    "five million lists": archive(b"\x80\x02" + b"]" * 5_000_000 + b"."),
    "beyond by an offset": archive(tensor(offset=1), DATA),
    "beyond by a stride": archive(tensor(stride=(1 << 40,)), DATA),
    "sizes that overflow": archive(tensor(count=1 << 61, shape=(1 << 61,)), DATA),
    "negative": archive(tensor(offset=-1), DATA),
    "a negative stride": archive(tensor(stride=(-1,)), DATA),
    "other dimensions": archive(tensor(shape=(2, 2)), DATA),
    "a compressed record": archive(tensor(), DATA, zipfile.ZIP_DEFLATED),
    "complex numbers": archive(tensor(kind=b"ComplexFloatStorage"), DATA),
    "a quantized model": archive(tensor(kind=b"CharStorage"), DATA),
    "outside the archive": archive(tensor(key=b"../../../etc/passwd"), DATA),
    "big-endian": archive(tensor(), {**DATA, "byteorder": b"big"}),
    "a compressed byteorder that is broken": broken_order(),
    "zeros": bytes(1000),
    "a zip of nothing": b"PK\5\6" + bytes(18),
    "a directory of 200,000 records": directory(200_000),
    "a large zip's directory of 200,000 records": directory(200_000, large=True),
    "a directory behind a comment": directory(200_000, comment=b"PK"),
    "an end elsewhere": elsewhere(directory(200_000, large=True)),
    "a directory of long fields": directory(15, extra=b"FB\0\0" * 16_383),
    "a directory of many long fields": directory(300, extra=b"FB\0\0" * 16_383),
    "a directory elsewhere": b"PK\5\6" + bytes(8) + struct.pack("<II", 1 << 31, 1 << 31) + bytes(2),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_ends_at_once(name: str, tmp_path: Path) -> None:
    """A crash, an endless loop or an allocation by a number that the file made up."""
    ends_at_once(open_torch_file, tmp_path / "a.pth", MALFORMED[name], mib=64)


def test_mutated_files_end_in_no_other_error(tmp_path: Path) -> None:
    """An exception that no one expected is a crash in somebody's server. PUNA_TEST_FUZZ=60 searches longer."""
    raw, path, seen = saved({"a": torch.ones(2, 3), "b": torch.ones(4).half()[::2]}), tmp_path / "a.pth", set[bool]()
    assert b"byteorder" in raw

    def check(content: bytes) -> None:
        path.write_bytes(content)
        with contextlib.suppress(CheckpointError):
            seen.add(True)
            for weight in open_torch_file(path).values():
                weight.read().sum()
            seen.add(False)

    fuzz(check, damaged(raw, len(raw)))
    assert seen == {True, False}


@pytest.mark.parametrize("protocol", [2, 4])
def test_mutated_pickles_end_in_no_other_error(protocol: int) -> None:
    """Checksums hide most changes of a pickle inside a zip from its reader; an attacker's are right."""
    with zipfile.ZipFile(io.BytesIO(saved(tensors(), pickle_protocol=protocol))) as file:
        raw = file.read("archive/data.pkl")

    def check(content: bytes) -> None:
        with contextlib.suppress(Refused):
            read_pickle(content)

    fuzz(check, damaged(raw, len(raw)))
