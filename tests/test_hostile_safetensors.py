"""Safetensors files, their index and config.json as an attacker or a broken download would leave them."""

import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_model import BASE, CASES, ModelConfig, build

from puna.checkpoint.model_directory import save_model
from puna.checkpoint.safetensors_file import open_safetensors, read_header, write_safetensors
from puna.checkpoint.stored import Weight
from puna.checkpoint.stored_directory import open_model_directory
from puna.checkpoint.weight_files import write_weights
from puna.errors import CheckpointError
from puna.tokenizer.tokenizer import Tokenizer

CPU = torch.device("cpu")
FUZZ_SECONDS = float(os.environ.get("PUNA_TEST_FUZZ", "0"))


@contextmanager
def bounded() -> Iterator[None]:
    """At most a second and 64 MiB, by the system's count of this process where it keeps one."""
    books = Path("/proc/self/status")

    def peak(field: str) -> int:
        return next(int(line.split()[1]) for line in books.read_text().splitlines() if line.startswith(field))

    if books.exists():
        Path("/proc/self/clear_refs").write_text("5")
        before = peak("VmRSS")
    started = time.process_time()
    yield
    assert time.process_time() - started < 1
    if books.exists():
        assert peak("VmHWM") - before < 64 * 1024


def pack(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def tensor(shape: list[Any], begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = {"a": tensor([2], 0, 8), "b": tensor([3], 8, 20)}
HOSTILE = {
    "empty": b"",
    "seven bytes": b"\x02\0\0\0\0\0\0",
    "no header": pack(b""),
    "a header of 2^64 bytes": pack(GOOD, bytes(20), 2**64 - 1),
    "a header of 2^63 bytes": pack(GOOD, bytes(20), 2**63),
    "a header longer than the file": pack(GOOD, bytes(20), 500),
    "a header of many small objects": pack(b'{"a":[' + b"{}," * 600_000 + b"{}]}"),
    "not JSON": pack(b"{'a': 1}"),
    "not text": pack(b'{"\xff": 1}'),
    "a list": pack([GOOD]),
    "a number": pack(b"12"),
    "a BOM": pack(b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), bytes(20)),
    "blanks before it": pack(b"  " + json.dumps(GOOD).encode(), bytes(20)),
    "nested deeply": pack(b'{"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}"),
    "nested as deep as can be parsed": pack(b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"),
    "a huge number": pack(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', bytes(4)),
    "a name twice": pack(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
                         b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "a key twice": pack(b'{"a":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "metadata of numbers": pack({"__metadata__": {"format": 1}, **GOOD}, bytes(20)),
    "metadata of lists": pack({"__metadata__": {"format": ["pt"]}, **GOOD}, bytes(20)),
    "metadata is text": pack({"__metadata__": "pt", **GOOD}, bytes(20)),
    "overlap": pack({"a": tensor([2], 0, 8), "b": tensor([3], 4, 16)}, bytes(16)),
    "the same bytes twice": pack({"a": tensor([2], 0, 8), "b": tensor([2], 0, 8)}, bytes(8)),
    "a hole": pack({"a": tensor([2], 0, 8), "b": tensor([2], 12, 20)}, bytes(20)),
    "a hole before all": pack({"a": tensor([2], 4, 12)}, bytes(12)),
    "bytes after all": pack(GOOD, bytes(21)),
    "a byte is missing": pack(GOOD, bytes(19)),
    "bytes of nobody": pack({}, bytes(8)),
    "backwards": pack({"a": tensor([2], 8, 0)}, bytes(8)),
    "offsets below zero": pack({"a": tensor([2], -8, 0)}, bytes(8)),
    "shape below zero": pack({"a": tensor([-2, -1], 0, 8)}, bytes(8)),
    "a shape that overflows to the right size": pack({"a": tensor([2**32, 2**32, 2], 0, 8)}, bytes(8)),
    "a shape that overflows to zero": pack({"a": tensor([2**63, 2], 0, 0)}),
    "a shape of 10^6 axes": pack({"a": tensor([1] * 600_000, 0, 4)}, bytes(4)),
    "too few bytes for the shape": pack({"a": tensor([3], 0, 8)}, bytes(8)),
    "a fractional shape": pack({"a": tensor([2.0], 0, 8)}, bytes(8)),
    "a shape of truths": pack({"a": tensor([True, 2], 0, 8)}, bytes(8)),
    "a shape that is text": pack({"a": {**tensor([], 0, 8), "shape": "2"}}, bytes(8)),
    "fractional offsets": pack({"a": tensor([2], 0.0, 8.0)}, bytes(8)),
    "three offsets": pack({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, bytes(8)),
    "infinite offsets": pack(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,1e999]}}', bytes(8)),
    "an unknown dtype": pack({"a": tensor([2], 0, 8, "F31")}, bytes(8)),
    "a dtype that is a list": pack({"a": tensor([2], 0, 8, ["F32"])}, bytes(8)),
    "no dtype": pack({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "more keys": pack({"a": {**tensor([2], 0, 8), "file": "/etc/passwd"}}, bytes(8)),
    "an entry that is null": pack({"a": None}),
    "a pickle": b"\x80\x04\x95" + bytes(100),
    "a zip": b"PK\x03\x04" + bytes(100),
    "a GGUF": b"GGUF\x03\0\0\0" + bytes(100),
    "quantized": pack({"a": tensor([8], 0, 8, "I8")}, bytes(8)),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused(case: str, tmp_path: Path) -> None:
    """Readers that believe a header read past the file, or share one tensor's bytes with another."""
    (file := tmp_path / "model.safetensors").write_bytes(HOSTILE[case])
    with bounded(), pytest.raises(CheckpointError) as caught:
        open_safetensors(file)
    assert len(str(caught.value)) < 1000


def test_a_header_of_200_megabytes_is_refused(tmp_path: Path) -> None:
    """The file is as long as it says: only a bound keeps JSON of that size from being parsed."""
    with (file := tmp_path / "model.safetensors").open("wb") as stream:
        stream.write(pack(b"{", length=200_000_000))
        stream.truncate(200_000_100)
    with bounded(), pytest.raises(CheckpointError, match="header of 200000000 bytes"):
        open_safetensors(file)


def test_sound_files_are_read(tmp_path: Path) -> None:
    """A check that refuses everything passes the test above; what the reference library writes must come through."""
    wanted = {
        "wide": torch.randn(3, 5, dtype=torch.float64), "b": torch.randn(7).bfloat16(), "a.b": torch.randn(2, 2),
        "half": torch.randn(4, 1, 3).half(), "none": torch.zeros(0, 3), "one": torch.tensor(3.0), "ünï": torch.ones(1),
    }  # fmt: skip
    for metadata in (None, {"format": "pt", "note": "any text"}):
        save_file(wanted, file := tmp_path / "x.safetensors", metadata)
        found = open_safetensors(file)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[n].read(), t) and found[n].dtype == t.dtype for n, t in wanted.items())
    odd = pack(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}} ', torch.ones(2).numpy().tobytes())
    assert len(odd) % 4  # unaligned, which the format allows
    file.write_bytes(odd)
    assert torch.equal(open_safetensors(file)["a"].read(), torch.ones(2))


def test_what_is_written_is_what_safetensors_writes(tmp_path: Path) -> None:
    """A header that only we can read makes a model that only we can read."""
    torch.manual_seed(0)
    tensors = {
        "b": torch.randn(7, 3).bfloat16(), "a": torch.randn(2, 2), "Z": torch.randn(3).half(), "none": torch.zeros(0),
        "c": torch.randn(5).double(), "ü": torch.ones(3), "d": torch.randn(4).bfloat16(), "t": torch.randn(3, 4).T,
    }  # fmt: skip
    written: list[str] = []
    weights = {n: Weight(tuple(t.shape), t.dtype, lambda t=t: t) for n, t in tensors.items()}
    write_safetensors(tmp_path / "ours", weights, written.append)
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert sorted(written) == sorted(tensors)


def test_writing_holds_one_tensor(tmp_path: Path) -> None:
    """A writer that gathers a model before it writes needs its size in memory."""
    alive, most = 0, 0

    class Counted(torch.Tensor):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def read() -> torch.Tensor:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return torch.ones(10).as_subclass(Counted)

    weights = {f"layers.{i}": Weight((10,), torch.float32, read) for i in range(20)}
    write_weights(tmp_path, weights, lambda name: None, shard_bytes=200)
    assert most <= 2
    assert len(list(tmp_path.glob("model-*-of-00004.safetensors"))) == 4


def test_a_reader_that_breaks_its_word_is_found(tmp_path: Path) -> None:
    """The header is written before the tensors: one of another shape would shift every one that follows."""
    for given_tensor in (torch.ones(3), torch.ones(2).double()):
        weight = Weight((2,), torch.float32, lambda t=given_tensor: t)
        with pytest.raises(CheckpointError, match="a is"):
            write_safetensors(tmp_path / "x", {"a": weight}, lambda name: None)


def test_a_file_that_changed_meanwhile_is_refused(tmp_path: Path) -> None:
    """Offsets of one header and bytes of another file are noise that loads."""
    save_file({"a": torch.ones(4)}, file := tmp_path / "x.safetensors")
    weight = open_safetensors(file)["a"]
    save_file({"b": torch.zeros(4), "a": torch.ones(4)}, file)
    with pytest.raises(CheckpointError, match="changed since"):
        weight.read()


def test_a_model_does_not_write_into_its_file(tmp_path: Path) -> None:
    """Weights are mapped: training that wrote through to the file would change the checkpoint it came from."""
    save_file({"a": torch.ones(4)}, file := tmp_path / "x.safetensors")
    before = file.read_bytes()
    tensor = open_safetensors(file)["a"].read()
    tensor.mul_(2)
    assert tensor.tolist() == [2, 2, 2, 2]
    assert file.read_bytes() == before
    file.unlink()  # an old checkpoint is swept away under a model that came from it
    assert tensor.tolist() == [2, 2, 2, 2]


@pytest.fixture(scope="module")
def sound(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    config = ModelConfig(**{**BASE, **CASES["llama3.1 scaling 8"], "vocab_size": 600})
    save_model(folder, build(config), Tokenizer(tokenizer_folder), "fp32", {})
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "model")


def refuse(folder: Path, said: str = ".") -> None:
    with bounded(), pytest.raises(CheckpointError, match=said):
        open_model_directory(folder).check()


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "/etc/passwd", "../model/model.safetensors", "sub/model.safetensors", "..", ".", "", "a\0b",
     "%2e%2e/x", "C:\\x", "..\\x", "~/x", "x" * 300, "model.safetensors/", "./model.safetensors"],
)  # fmt: skip
def test_an_index_stays_in_its_folder(folder: Path, name: str) -> None:
    """`model.safetensors.index.json` is a stranger's list of files to open."""
    names = dict.fromkeys(read_header(folder / "model.safetensors").entries, "model.safetensors")
    names["model.norm.weight"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    refuse(folder)


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "{", '"x"', "[" * 10**5,
     '{"weight_map": {"a": ["b"]}}', "\0", "9" * 5000, "[]," * 10**6],
)  # fmt: skip
def test_a_broken_index_is_refused(folder: Path, text: str) -> None:
    """Every other JSON document is parsed by somebody before it is looked at."""
    (folder / "model.safetensors.index.json").write_text(text)
    refuse(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_link_out_of_the_folder_is_refused(folder: Path, name: str) -> None:
    """An archive can bring links; what they lead to is read with the rights of whoever opens the model."""
    (folder / name).rename(outside := folder.parent / "outside")
    (folder / name).symlink_to(outside)
    refuse(folder, "leads outside")
    (folder / name).unlink()
    (folder / name).symlink_to("../outside")
    refuse(folder, "leads outside")
    (folder / name).unlink()
    outside.rename(folder / "inside")
    (folder / name).symlink_to("inside")
    open_model_directory(folder).check()


def test_a_snapshot_is_no_licence_to_leave(folder: Path) -> None:
    """Calling folders `models--a--b/snapshots/x` allows what lies in that model's blobs, and nothing else."""
    (home := folder.parent / "models--a--b/snapshots").mkdir(parents=True)
    folder.rename(home / "x")
    (home.parent / "blobs").mkdir()
    weights, blob = home / "x/model.safetensors", home.parent / "blobs/1234"
    weights.rename(blob)
    for target in (blob, "../../blobs/1234"):
        weights.symlink_to(target)
        open_model_directory(home / "x").check()
        weights.unlink()
    blob.rename(elsewhere := folder.parent / "blobs")
    for target in (elsewhere, "../../../blobs"):
        weights.symlink_to(target)
        refuse(home / "x", "leads outside")
        weights.unlink()


def test_the_same_tensor_twice_is_refused(folder: Path) -> None:
    """Which of two holds would depend on the order of files, or of names."""
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "norm.weight": tensors["model.norm.weight"].clone()}, folder / "model.safetensors")
    refuse(folder, "with and without")
    for part in ("a", "b"):
        save_file(tensors, folder / f"{part}.safetensors")
    (folder / "model.safetensors").unlink()
    places = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(places))
    refuse(folder, "in another file too")


@pytest.mark.parametrize(
    "change",
    [{"num_hidden_layers": 10**9}, {"num_hidden_layers": 1999}, {"hidden_size": 2**40}, {"head_dim": 2**40},
     {"vocab_size": -1}, {"num_attention_heads": 0}, {"num_key_value_heads": 3}, {"head_dim": 7}, {"rms_norm_eps": -1},
     {"rope_theta": float("nan")}, {"rope_theta": 10**400}, {"rope_theta": "500000"},
     {"rope_theta": 0}, {"rope_theta": True}, {"rope_parameters": {"rope_theta": [5e5]}},
     {"rms_norm_eps": float("inf")}, {"rope_scaling": [1]},
     {"rope_scaling": {"rope_type": "llama3"}}, {"rope_scaling": {"rope_type": []}}, {"hidden_size": []},
     {"num_attention_heads": 1e999}, {"hidden_size": "x" * 10**6}, {"architectures": 7}, {"eos_token_id": "x"},
     {"rope_scaling": {"rope_type": "llama3", "factor": 0, "low_freq_factor": 1, "high_freq_factor": 1,
                       "original_max_position_embeddings": 8192}},
     {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
                       "original_max_position_embeddings": -(2**63) - 1}},
     {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
                       "original_max_position_embeddings": 2**65}}],
)  # fmt: skip
def test_sizes_no_llama_has_are_refused(folder: Path, change: dict[str, Any]) -> None:
    """Ten bytes of config.json can ask for a billion layers."""
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **change}))
    (folder / "generation_config.json").unlink()
    refuse(folder)


CHANGE = st.one_of(
    st.tuples(st.just("put"), st.floats(0, 1), st.binary(min_size=1, max_size=9)),
    st.tuples(st.just("put"), st.floats(0, 1), st.sampled_from([b"{}", b"[]", b"null", b'"', b"1e999", b"-1", b"NaN"])),
    st.tuples(st.just("over"), st.floats(0, 1), st.binary(min_size=1, max_size=9)),
    st.tuples(st.just("number"), st.floats(0, 1), st.integers(-(2**65), 2**65)),
    st.tuples(st.just("cut"), st.floats(0, 1), st.none()),
    st.tuples(st.just("leave out"), st.floats(0, 1), st.integers(1, 400)),
    st.tuples(st.just("length"), st.just(0.0), st.integers(0, 2**64 - 1)),
)


def spoiled(raw: bytes, kind: str, where: float, what: Any) -> bytes:
    """`raw` with one change of the kind that matters; half of them in its first two thousand bytes."""
    at = int(where * 2 * 2000) if where < 0.5 else int((where - 0.5) * 2 * len(raw))
    if kind == "put":
        return raw[:at] + what + raw[at:]
    if kind == "over":
        return raw[:at] + what + raw[at + len(what) :]
    if kind == "cut":
        return raw[:at]
    if kind == "leave out":
        return raw[:at] + raw[at + what :]
    if kind == "length":
        return what.to_bytes(8, "little") + raw[8:]
    digit = next((i for i in range(at, len(raw)) if 48 <= raw[i] <= 57), at)
    return raw[:digit] + str(what).encode() + raw[digit + 1 :]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.safetensors.index.json"])
def test_mutations_raise_nothing_else(sound: Path, name: str, tmp_path: Path) -> None:
    """The cases above are those somebody thought of; PUNA_TEST_FUZZ=60 looks for others for a minute."""
    folder = tmp_path / "fuzz"
    shutil.copytree(sound, folder)
    (folder / "generation_config.json").unlink()
    if name.endswith("index.json"):
        entries = read_header(folder / "model.safetensors").entries
        (folder / name).write_text(json.dumps({"weight_map": dict.fromkeys(entries, "model.safetensors")}))
    original = (folder / name).read_bytes()
    refused = []

    @settings(max_examples=150, deadline=2000, database=None, derandomize=not FUZZ_SECONDS,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.lists(CHANGE, min_size=1, max_size=3))
    def spoil(changes: list[tuple[str, float, Any]]) -> None:
        raw = original
        for change in changes:
            raw = spoiled(raw, *change)
        (folder / name).write_bytes(raw)
        try:
            open_model_directory(folder).load(torch.float32, CPU)
        except CheckpointError:
            refused.append(changes)

    ends = time.monotonic() + FUZZ_SECONDS / 3
    spoil()
    while time.monotonic() < ends:
        spoil()
    assert len(refused) > 20


def test_random_bits_of_the_header_are_found_or_harmless(folder: Path) -> None:
    """One flipped bit in the header must not become another model with the same shapes."""
    file = folder / "model.safetensors"
    raw, rng = bytearray(file.read_bytes()), random.Random(0)
    sound = load_file(file)
    length = int.from_bytes(raw[:8], "little")
    for _ in range(100):
        at, bit = rng.randrange(8 + length), 1 << rng.randrange(8)
        raw[at] ^= bit
        file.write_bytes(raw)
        raw[at] ^= bit
        try:
            stored = open_model_directory(folder)
            stored.check()
        except CheckpointError:
            continue
        assert all(torch.equal(w.read(), sound[n if n in sound else f"model.{n}"]) for n, w in stored.weights.items())
