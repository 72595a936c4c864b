"""What tests/test_dist.py runs as several ranks, and by itself as one. Imports nothing slow: every rank pays for it."""

import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from puna.checkpoint import train_state
from puna.checkpoint.model_directory import save_model
from puna.data.loader import TokenLoader
from puna.data.packing import PackedLoader
from puna.data.shards import Shards
from puna.dist.collectives import from_first, process_group
from puna.dist.fsdp import gathered, shard
from puna.eval.perplexity import bits_per_byte
from puna.files import write_json
from puna.infer.generate import generate
from puna.log import setup_logging
from puna.lora import LoraConfig, add_lora
from puna.model.config import ModelConfig
from puna.model.init import build_model, init_weights, materialize
from puna.model.transformer import Transformer
from puna.ranks import rank
from puna.recipes import pretrain
from puna.run_folder import Run
from puna.tokenizer.chat.format import Encoded
from puna.tokenizer.tokenizer import Tokenizer
from puna.train import fit as loop
from puna.train.blocks import checkpoint_blocks
from puna.train.objectives import next_token
from puna.train.optim import OptimizerConfig, build_optimizer

CASES = ("pretrain", "sft", "lora", "muon")
STEPS, SAVED = 20, 10


def build(case: str) -> Transformer:
    """fp64 throughout; under LoRA the frozen base is bf16, as a group of mixed dtypes."""
    shape = ModelConfig(
        dim=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, ffn_dim=48, vocab_size=600, max_seq_len=64,
        rope_theta=10000.0, rope_scaling=None, norm_eps=1e-5, tie_embeddings=case in ("sft", "lora"),
    )  # fmt: skip
    model = build_model(shape, torch.float64)
    materialize(model, torch.device("cpu"), torch.float64)
    init_weights(model, 0)
    if case == "lora":
        model.to(torch.bfloat16)
        add_lora(model, LoraConfig(rank=3), dtype=torch.float64)  # 3 is odd: the ranks' parts differ in size
    return model


def loader(case: str, shards: Path) -> Any:
    if case in ("pretrain", "muon"):
        return TokenLoader(Shards(shards, "train"), seq_len=32, batch_size=4, seed=0)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(23):  # one trained id in most rows, 27 in some: the ranks' n are far apart
        ids = torch.randint(0, 600, (28,), generator=generator).tolist()
        first = 1 if index % 4 == 0 else 27
        rows.append(Encoded(ids, [place >= first for place in range(28)]))
    return PackedLoader(rows, seq_len=32, batch_size=4, pad_id=0, seed=0)


def shard_case(case: str, model: Transformer) -> None:
    """Under LoRA blocks are computed twice: what FSDP gathered for the first time has to be there for the second."""
    checkpoint_blocks(model, "full" if case == "lora" else "none")
    shard(model)


def gradients(case: str, shards: Path) -> dict[str, torch.Tensor]:
    """Whole gradients of one step of two micro-batches, on rank 0."""
    model, batches = build(case), loader(case, shards)
    shard_case(case, model)
    found: dict[str, torch.Tensor] = {}

    def keep(*_: float) -> bool:
        found.update(gathered({n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        return False

    optimizer = build_optimizer(model, OptimizerConfig())
    loop.train_step(model, optimizer, [next(batches), next(batches)], next_token, 1e-3, 0, keep)
    return {name: gradient.clone() for name, gradient in found.items()}


def train(case: str, folder: Path, shards: Path) -> None:
    """Twenty steps in `folder`, from a checkpoint if there is one; validated every five, first of all on going on."""
    model, batches = build(case), loader(case, shards)
    shard_case(case, model)
    tokenizer, valid = Tokenizer(shards / "tokenizer"), Shards(shards, "valid")

    def evaluate(model: Transformer, step: int) -> dict[str, float]:
        (written,) = generate(model, [[1, 2, 3]], max_tokens=3)
        return {"bits": bits_per_byte(model, valid, 32, 8, max_windows=16), "written": sum(written)}

    folder.mkdir(parents=True, exist_ok=True)
    run = Run(folder)
    run.from_first = from_first
    save = partial(save_model, model=model, tokenizer=tokenizer, save_dtype="fp64", lineage={})
    if case == "lora":
        save = partial(_save_nothing)
    optimizer = OptimizerConfig(kind="muon" if case == "muon" else "adamw", lr=0.01, warmup_steps=2)
    config = loop.TrainConfig(accumulate=2, evaluate_every=5, save_every=SAVED, keep=9, optimizer=optimizer)
    loop.fit(run, model, batches, next_token, config, STEPS, evaluate, save)


def _save_nothing(folder: Path) -> None:
    """LoRA's own directory has a test of its own, in the recipe."""


def plant(fault: str) -> None:
    """Fail in one rank: `full` is the disk of rank 0 at its second save; `kill` rank 1 in its second step, `stop` it by
    SIGTERM amid a validation."""

    def at(call: int, number: int, real: Callable[..., Any], fail: Callable[[], None]) -> Callable[..., Any]:
        calls = []

        def planted(*given: Any, **named: Any) -> Any:
            calls.append(given)
            if rank() == number and len(calls) == call:
                fail()
            return real(*given, **named)

        return planted

    def full() -> None:
        raise OSError(28, "No space left on device")

    if fault == "full":
        train_state._write = at(2, 0, train_state._write, full)
    elif fault == "kill":
        loop.train_step = at(2, 1, loop.train_step, partial(os.kill, os.getpid(), signal.SIGKILL))
    else:
        stop = partial(os.kill, os.getpid(), signal.SIGTERM)
        pretrain.bits_per_byte = at(1, 1, pretrain.bits_per_byte, stop)


def wait_for_the_end(folder: Path) -> None:
    """Tell `folder` that this rank is here, and then by what signal it was asked to end."""

    def told(number: int, _frame: object) -> None:
        (folder / f"ended-{rank()}").write_text(str(number))
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, told)
    with process_group("cpu"):
        (folder / f"started-{rank()}").touch()
        time.sleep(600)  # nothing but the signal ends it


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    if what == "wait":
        wait_for_the_end(Path(words[0]))
    elif what == "all":
        folder, shards = map(Path, words)
        setup_logging(-1)
        torch.set_num_threads(1)
        with process_group("cpu"):
            for case in CASES:
                grads = gradients(case, shards)
                if rank() == 0:
                    torch.save(grads, folder / f"{case}.pt")
                train(case, folder / "two" / case, shards)
                train(case, folder / "one_then_two" / case, shards)
            if rank() == 0:
                write_json(folder / "done.json", CASES)
    else:
        from puna.cli import main

        plant(what)
        sys.argv[1:] = words
        main()
