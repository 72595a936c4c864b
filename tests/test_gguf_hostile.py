"""GGUF from strangers: whatever the bytes say, the error is ours, at once and without memory."""

import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz import damaged, ends_at_once, fuzz
from test_gguf import tiny, vocabulary
from test_model import BASE, build

from puna.checkpoint.gguf.file import open_gguf
from puna.checkpoint.gguf.model import open_gguf_model
from puna.errors import CheckpointError, DataError
from puna.model.config import ModelConfig

CPU = torch.device("cpu")


def header(n_tensors: int = 0, n_values: int = 0, rest: bytes = b"", magic: bytes = b"GGUF", version: int = 3) -> bytes:
    return magic + struct.pack("<IQQ", version, n_tensors, n_values) + rest


def string(text: str, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text.encode()


def value(kind: int, raw: bytes, key: str = "k") -> bytes:
    return string(key) + struct.pack("<I", kind) + raw


def tensor(
    name: str = "x", dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0, n_dims: int | None = None
) -> bytes:
    count = len(dims) if n_dims is None else n_dims
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, kind, offset)


BIG = 1 << 61
HOSTILE = {
    "empty": b"",
    "short magic": b"GG",
    "magic": header(magic=b"GGML"),
    "version 1": header(version=1),
    "version huge": header(version=1 << 31),
    "no counts": b"GGUF" + struct.pack("<I", 3),
    "tensor count": header(n_tensors=BIG),
    "value count": header(n_values=BIG),
    "value count beyond file": header(n_values=9, rest=value(4, b"\0" * 4)),
    "key length": header(n_values=1, rest=string("k", BIG)),
    "string length": header(n_values=1, rest=value(8, string("v", BIG))),
    "value type": header(n_values=1, rest=value(13, b"\0" * 8)),
    "array 2^61": header(n_values=1, rest=value(9, struct.pack("<IQ", 0, BIG))),
    "array of u64 2^61": header(n_values=1, rest=value(9, struct.pack("<IQ", 10, BIG))),
    "array of strings": header(n_values=1, rest=value(9, struct.pack("<IQ", 8, BIG))),
    "array of arrays": header(n_values=1, rest=value(9, struct.pack("<IQ", 9, 1) * 1500)),
    "array item type": header(n_values=1, rest=value(9, struct.pack("<IQ", 99, 1))),
    "repeated key": header(n_values=2, rest=value(4, b"\0" * 4) * 2),
    "empty key": header(n_values=1, rest=value(4, b"\0" * 4, "")),
    "alignment 3": header(n_values=1, rest=value(4, struct.pack("<I", 3), "general.alignment")),
    "alignment 0": header(n_values=1, rest=value(4, struct.pack("<I", 0), "general.alignment")),
    "alignment text": header(n_values=1, rest=value(8, string("x"), "general.alignment")),
    "no dimensions": header(1, 0, tensor(dims=(), n_dims=0) + b"\0" * 64),
    "many dimensions": header(1, 0, tensor(n_dims=1 << 30) + b"\0" * 64),
    "five dimensions": header(1, 0, tensor(dims=(1,) * 5) + b"\0" * 64),
    "zero dimension": header(1, 0, tensor(dims=(32, 0)) + b"\0" * 64),
    "overflowing shape": header(1, 0, tensor(dims=(1 << 32, 1 << 32, 1 << 32)) + b"\0" * 64),
    "tensor beyond end": header(1, 0, tensor(dims=(1024,)) + b"\0" * 64),
    "offset beyond end": header(1, 0, tensor(offset=BIG) + b"\0" * 256),
    "offset not aligned": header(1, 0, tensor(offset=5) + b"\0" * 256),
    "no whole block": header(1, 0, tensor(dims=(33,), kind=8) + b"\0" * 256),
    "repeated tensor": header(2, 0, tensor() * 2 + b"\0" * 512),
    "missing data": header(1, 0, tensor()),
    "overlapping tensors": header(2, 0, tensor("x") + tensor("y", offset=32) + b"\0" * 512),
    "unknown type": header(1, 0, tensor(kind=77) + b"\0" * 512),
    "withdrawn type": header(1, 0, tensor(kind=4) + b"\0" * 512),
    "too many tensors": header(20_000, 0, b"".join(tensor(str(i)) for i in range(20_000))),
    "two million strings": header(n_values=1, rest=value(9, struct.pack("<IQ", 8, 2_000_000)) + bytes(16_000_000)),
    "five thousand keys": header(n_values=5000, rest=b"".join(value(0, b"\0", f"key {i}") for i in range(5000))),
    "a byte that is no text": header(n_values=1, rest=value(8, b"\x05\0\0\0\0\0\0\0")),
    "bool array 2^61": header(n_values=1, rest=value(9, struct.pack("<IQ", 7, BIG))),
    "tensor name beyond end": header(1, 0, string("x", BIG)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_end_at_once(case: str, tmp_path: Path) -> None:
    """A published reader took 24 GB for a file of 45 bytes."""
    ends_at_once(open_gguf, tmp_path / "hostile.gguf", HOSTILE[case])


def test_strings_are_counted_in_the_whole_file(tmp_path: Path) -> None:
    """A limit of each array is none: four of half a million strings."""
    strings = struct.pack("<IQ", 8, 200_000) + bytes(1_600_000)
    file = header(n_values=4, rest=b"".join(value(9, strings, f"key {i}") for i in range(4)))
    ends_at_once(open_gguf, tmp_path / "m.gguf", file, mib=32)


@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_a_download_that_broke_off_is_told_as_one(kept: float, tmp_path: Path) -> None:
    """A usual shape called hostile: `tensor 'token_embd.weight' has shape (49152, 576)`."""
    whole = header(1, 0, tensor("token_embd.weight", dims=(32, 4096))) + b"\0" * (32 * 4096 * 4 + 64)
    for kept_bytes in (100, int(kept * len(whole))):
        (tmp_path / "cut.gguf").write_bytes(whole[:kept_bytes])
        with pytest.raises(CheckpointError, match=r"before its tensor 'token_embd\.weight' does") as told:
            open_gguf(tmp_path / "cut.gguf")
        assert told.value.cause == "an incomplete download"


def model(**changed: Any) -> Any:
    return build(ModelConfig(**{**BASE, "vocab_size": len(vocabulary()["tokenizer.ggml.tokens"]), **changed}))


BILLION = 1_000_000_000
LIES: dict[str, tuple[dict[str, Any], str]] = {
    "block count": ({"llama.block_count": BILLION}, "block_count"),
    "fewer blocks": ({"llama.block_count": 1}, "block_count"),
    "no block count": ({"llama.block_count": None}, "block_count"),
    "no blocks": ({"llama.block_count": 0}, "block_count"),
    "width": ({"llama.embedding_length": BILLION}, "token_embd"),
    "width as text": ({"llama.embedding_length": "wide"}, "embedding_length"),
    "width as float": ({"llama.embedding_length": 32.0}, "embedding_length"),
    "ffn": ({"llama.feed_forward_length": BILLION}, "ffn_gate"),
    "heads": ({"llama.attention.head_count": BILLION}, "attn_q|key_length"),
    "no heads": ({"llama.attention.head_count": 0}, "head_count"),
    "heads by layer": ({"llama.attention.head_count": [4, 4]}, "head_count"),
    "key heads": ({"llama.attention.head_count_kv": 3}, "attn_k"),
    "no key heads": ({"llama.attention.head_count_kv": 0}, "head_count_kv"),
    "odd heads": ({"llama.attention.key_length": 7}, "pairs|attn_q"),
    "value length": ({"llama.attention.value_length": 4}, "value_length"),
    "partial rope": ({"llama.rope.dimension_count": 4}, "dimension_count"),
    "linear rope": ({"llama.rope.scaling.type": "linear"}, "linear"),
    "yarn": ({"llama.rope.scaling.type": "yarn"}, "yarn"),
    "unnamed rope factor": ({"llama.rope.scaling.factor": 4.0}, "linear"),
    "experts": ({"llama.expert_count": 8}, "expert_count"),
    "theta": ({"llama.rope.freq_base": float("nan")}, "freq_base"),
    "no eps": ({"llama.attention.layer_norm_rms_epsilon": None}, "epsilon"),
    "negative eps": ({"llama.attention.layer_norm_rms_epsilon": -1.0}, "epsilon"),
    "context": ({"llama.context_length": 0}, "context_length"),
    "architecture": ({"general.architecture": "mamba"}, "mamba"),
    "tokens": ({"tokenizer.ggml.tokens": [f"t{i}" for i in range(5000)]}, "tokens"),
    "tokens as number": ({"tokenizer.ggml.tokens": 5}, "tokens"),
    "types": ({"tokenizer.ggml.token_type": [1]}, "type"),
    "merges": ({"tokenizer.ggml.merges": ["x y z", "h"]}, "merge"),
    "family": ({"tokenizer.ggml.model": "bert"}, "bert"),
    "bos": ({"tokenizer.ggml.bos_token_id": BILLION}, "bos"),
}


@pytest.mark.parametrize("lie", LIES)
def test_metadata_that_lies_is_told(lie: str, tmp_path: Path) -> None:
    """A model of a billion layers is built layer by layer before a tensor is missed, if nobody compares first."""
    changed, match = LIES[lie]
    path = tiny(tmp_path / "m.gguf", model(), changed)
    started = time.monotonic()
    with pytest.raises((CheckpointError, DataError), match=match):
        open_gguf_model(path).read_tokenizer()
    assert time.monotonic() - started < 1


def test_a_byte_token_that_is_no_byte(tmp_path: Path) -> None:
    """`<0x-1>` made a published reader write before its table."""
    tokens = vocabulary()["tokenizer.ggml.tokens"]
    spm = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.merges": None,
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "<0x-1>", *tokens[4:]],
        "tokenizer.ggml.token_type": [2, 3, 3, 6, *[1] * (len(tokens) - 4)],
        "tokenizer.ggml.scores": [0.0] * len(tokens),
    }  # fmt: skip
    path = tiny(tmp_path / "m.gguf", model(), spm)
    with pytest.raises(DataError, match=r"<0x-1>|byte"):
        open_gguf_model(path).read_tokenizer()


def test_a_scale_that_is_not_finite_is_named(tmp_path: Path) -> None:
    """It would make every logit NaN, far from its cause."""
    path = tiny(tmp_path / "m.gguf", model(), kind=8)
    file, name = open_gguf(path), "blk.1.ffn_up.weight"
    raw = bytearray(path.read_bytes())
    at = file.raw(name).__array_interface__["data"][0] - np.frombuffer(file._bytes, np.uint8).ctypes.data
    raw[at : at + 2] = np.float16(np.inf).tobytes()
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.weight(.|\n)*not finite"):
        open_gguf_model(path).load(torch.float32, CPU)


def test_mutated_files_raise_nothing_else(tmp_path: Path) -> None:
    """Any bytes may be wrong: the error is ours, or the file still makes sense. PUNA_TEST_FUZZ=60 searches longer."""
    valid = tiny(tmp_path / "m.gguf", model(n_layers=1), {"puna.lineage": "{}", "llama.rope.scaling.type": "none"})
    path = tmp_path / "damaged.gguf"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        ours: list[Callable[[], Any]] = [
            lambda: open_gguf_model(path).load(torch.float32, CPU),
            lambda: open_gguf_model(path).read_tokenizer().encode("hello, llama </s>"),
        ]
        for step in ours:
            try:
                step()
            except (CheckpointError, DataError):
                continue

    raw = valid.read_bytes()
    fuzz(check, damaged(raw, raw.index(b"output.weight") + 60))
