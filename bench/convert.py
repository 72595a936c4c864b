"""Converts a synthetic 4 GB: Meta -> Hugging Face -> GGUF -> Hugging Face, beside torch.load + save_file and a copy.

python bench/convert.py [--gb 4] [--folder FOLDER]     (needs about 3x the size in FOLDER)
Peak memory: the most of RssAnon + RssShmem that /proc tells of the process, sampled each 5 ms, less what it holds
before it begins. Pages of mapped files are not in it: the kernel drops them when memory is short, like any page cache,
so they cost a machine nothing; a peer's are left out alike. The largest tensor is the embedding (or the head).
"""

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
PARAMS = {
    "dim": 2048, "n_heads": 32, "n_kv_heads": 8, "multiple_of": 256, "ffn_dim_multiplier": 1.5, "norm_eps": 1e-5,
    "vocab_size": 128256, "rope_theta": 500000.0,
}  # fmt: skip
LARGEST = PARAMS["vocab_size"] * PARAMS["dim"] * 2  # bytes in bf16


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024


class Peak(threading.Thread):
    """Samples this process's memory until it is stopped."""

    def __init__(self):
        super().__init__(daemon=True)
        self.before = self.most = anonymous()
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.005):
            self.most = max(self.most, anonymous())


def make(folder: Path, layers: int) -> None:
    """A Llama of random bf16 weights as Meta publishes one, with the bytes as its tokenizer."""
    import torch

    from puna.checkpoint.meta.layout import to_meta_name
    from puna.checkpoint.meta.params import read_params
    from puna.checkpoint.stored import expected_shapes
    from puna.checkpoint.torch_file import TorchFile
    from puna.tokenizer.bpe import byte_of_character
    from puna.tokenizer.gguf_vocab import vocab_files

    folder.mkdir()
    (folder / "params.json").write_text(json.dumps({**PARAMS, "n_layers": layers}))
    shapes = expected_shapes(read_params({**PARAMS, "n_layers": layers}, PARAMS["vocab_size"], folder))
    noise = torch.randn(PARAMS["vocab_size"] * PARAMS["dim"] + len(shapes), generator=torch.Generator().manual_seed(0))
    noise = noise.mul_(0.02).bfloat16()
    announced = {to_meta_name(name): (shape, torch.bfloat16) for name, shape in shapes.items()}
    with TorchFile(folder / "consolidated.00.pth", announced, {}) as file:
        for number, (name, (shape, _)) in enumerate(announced.items()):
            count = int(torch.tensor(shape).prod())
            file.write(name, noise[number : number + count].view(shape))
    tokens = ["<s>", "</s>", *byte_of_character()]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, *[1] * 256], "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1,
    }  # fmt: skip
    for name, content in vocab_files(metadata).items():
        (folder / name).write_bytes(content)


def ours(source: Path, target: Path, to: str, **options: Any) -> None:
    from puna.checkpoint.convert import convert

    convert(source, target, to, **options)


def copied(source: Path, target: Path) -> None:
    """What the disk alone takes: everything puna writes is fsynced before it gets its name."""
    with source.open("rb") as read, target.open("wb") as write:
        shutil.copyfileobj(read, write, 1 << 24)
        os.fsync(write.fileno())


def plainly(source: Path, target: Path) -> None:
    """What a short script does: torch.load, rename, permute, save_file."""
    import torch
    from safetensors.torch import save_file

    from puna.checkpoint.meta.layout import from_meta_name
    from puna.checkpoint.rope_layout import is_rotated, to_halves

    target.mkdir()
    state = torch.load(source / "consolidated.00.pth", weights_only=True)
    named = {f"model.{from_meta_name(n)}": t for n, t in state.items()}
    size = PARAMS["dim"] // PARAMS["n_heads"]
    turned = {n: to_halves(t, size) if is_rotated(n) else t for n, t in named.items()}
    save_file(turned, target / "model.safetensors")
    with (target / "model.safetensors").open("rb") as written:
        os.fsync(written.fileno())


def measured(work: Callable[[], None], pipe: Any) -> None:
    """In a process of its own: (seconds, peak bytes above the idle process)."""
    import torch

    import_module("puna.checkpoint.convert")  # imports are no part of it
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    peak = Peak()
    peak.start()
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    peak.stopped.set()
    pipe.send((seconds, peak.most - peak.before))


def measure(name: str, work: Callable[[], None], size: int) -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=measured, args=(work, there))
    process.start()
    there.close()
    try:
        seconds, peak = here.recv()
    except EOFError:
        raise SystemExit(f"{name}: the process ended early") from None
    process.join()
    print(f"{name:28} {seconds:7.1f} s {size / seconds / 1e9:6.2f} GB/s {peak / 1e9:7.2f} GB {peak / LARGEST:6.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4.0)
    parser.add_argument("--folder", type=Path, help="Where there is room; a temporary folder otherwise.")
    given = parser.parse_args()
    per_layer = 2 * (2 * PARAMS["dim"] ** 2 + 2 * 512 * PARAMS["dim"] + 3 * 8192 * PARAMS["dim"])
    layers = max(1, round((given.gb * 1e9 - 2 * LARGEST) / per_layer))
    folder = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        make(folder / "meta", layers)
        size = (folder / "meta/consolidated.00.pth").stat().st_size
        print(f"{size / 1e9:.2f} GB, {layers} layers; largest tensor {LARGEST / 1e9:.3f} GB; peak in GB, and over that")
        measure("copy and fsync", partial(copied, folder / "meta/consolidated.00.pth", folder / "copy"), size)
        (folder / "copy").unlink()
        measure("torch.load + save_file", partial(plainly, folder / "meta", folder / "plain"), size)
        shutil.rmtree(folder / "plain")
        measure("puna: Meta -> HF", partial(ours, folder / "meta", folder / "hf", "hf"), size)
        measure("puna: HF -> GGUF F16", partial(ours, folder / "hf", folder / "m.gguf", "gguf"), size)
        (folder / "m.gguf").unlink()
        measure("puna: HF -> GGUF Q8_0", partial(ours, folder / "hf", folder / "q.gguf", "gguf", kind="Q8_0"), size)
        measure("puna: GGUF Q8_0 -> HF, bf16", partial(ours, folder / "q.gguf", folder / "q16", "hf"), size)
        shutil.rmtree(folder / "q16")
        measure(
            "puna: GGUF Q8_0 -> HF, fp32", partial(ours, folder / "q.gguf", folder / "q32", "hf", dtype="fp32"), size
        )
        shutil.rmtree(folder / "q32")
        (folder / "q.gguf").unlink()
        measure("puna: HF -> Meta, 4 shards", partial(ours, folder / "hf", folder / "four", "meta", shards=4), size)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
