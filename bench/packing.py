"""What packing saves and what it costs, in three parts.

python bench/packing.py train [--rows FILE ...] [--seconds 90]           packed conversations beside padded ones
python bench/packing.py encode [--rows FILE] [--count 8000]              conversations a second with 1, 2 ... processes
python bench/packing.py pack                                             1 and 4 million rows by their lengths
Rows are chatterbot's small talk and each FILE's. The first part is steps of LoRA (rank 16, all linears) of
SmolLM2-135M: one packed row of 512 ids; as many conversations a step, padded to the longest of them; one conversation
padded to 512 ids, as shapes that are compiled or exported once have to be. The one that computed least goes next. Ids
computed in a second of CPU time are measured, which neighbours on the machine change little; how many of these ids are
trained is counted over all rows. --seconds is for all steps together.
"""

import argparse
import itertools
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin would be measured
MODEL = "smollm2-135m"
LENGTH = 512
CONVERSATIONS = 1000


def source(rows: str | None) -> Any:
    from puna.data.conversations import ChatSource
    from puna.data.dialogues import DIALOGUES

    if rows:
        return ChatSource(path=Path(rows), limit=CONVERSATIONS)
    DIALOGUES["chatterbot"].fetch()
    return ChatSource(packages=["chatterbot"], limit=CONVERSATIONS)


def encoding() -> Any:
    from puna.checkpoint.registry import load_tokenizer
    from puna.data.encode import Encoding
    from puna.tokenizer.chat.format import ChatFormat

    return Encoding(ChatFormat(load_tokenizer(MODEL), date_string="26 Jul 2024"), LENGTH)


def layouts(rows: str | None) -> dict[str, list[Any]]:
    """An epoch of the same conversations in each layout: shuffled batches."""
    from puna.data.conversations import read_conversations
    from puna.data.encode import encode_conversations
    from puna.data.packing import PackedLoader

    given = encoding()
    made = encode_conversations(read_conversations(source(rows)), given.chat, LENGTH, "all", "drop")
    lengths = [len(row.ids) for row in made]
    packed = PackedLoader(made, LENGTH, 1, 0, seed=0)
    together = round(len(made) / packed.drawn)
    some, single = (PackedLoader(made, LENGTH, size, 0, seed=0, packed=False) for size in (together, 1))
    mean = sum(lengths) / len(made)
    print(f"\n{rows or 'chatterbot'}: {len(made)} conversations of {mean:.0f} ids on average, {max(lengths)} at most")
    return {
        "packed": epoch(packed),
        f"padded, {together} a step": epoch(some),
        f"padded to {LENGTH}": [widened(batch, LENGTH) for batch in epoch(single)],
    }


def epoch(loader: Any) -> list[Any]:
    return [next(loader) for _ in range(loader.drawn // loader.batch_size)]


def widened(batch: Any, width: int) -> Any:
    """Every row padded to `width` ids."""
    import torch

    from puna.ops.cross_entropy import IGNORE

    more = width - batch.tokens.shape[1]
    tokens, labels, positions = (
        torch.nn.functional.pad(tensor, (0, more), value=value)
        for tensor, value in ((batch.tokens, 0), (batch.labels, IGNORE), (batch.positions, 0))
    )
    return type(batch)(tokens, labels, batch.n, positions, batch.documents)


def train(given: argparse.Namespace) -> None:
    import puna
    from puna.lora import LoraConfig, add_lora
    from puna.train.fit import train_step
    from puna.train.objectives import next_token
    from puna.train.optim import OptimizerConfig, build_optimizer

    model = puna.load(MODEL, dtype="bf16").model
    add_lora(model, LoraConfig(rank=16, alpha=32))
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.0))

    def step(batch: Any) -> float:
        started = time.process_time()
        train_step(model, optimizer, [batch], next_token, 1e-4, 1.0, lambda loss, norm: True)
        return time.process_time() - started

    files = [None, *given.rows]
    for number, rows in enumerate(files):
        made = layouts(rows)
        if number == 0:
            step(made["packed"][-1])  # warms up
        steps = {name: itertools.cycle(batches) for name, batches in made.items()}
        took, ids = dict.fromkeys(made, 0.0), dict.fromkeys(made, 0)
        end = time.perf_counter() + given.seconds / len(files)
        while not all(ids.values()) or time.perf_counter() < end:
            name = min(took, key=lambda name: took[name])
            batch = next(steps[name])
            took[name] += step(batch)
            ids[name] += batch.size
        report(made, took, ids)


def report(made: dict[str, list[Any]], took: dict[str, float], ids: dict[str, int]) -> None:
    print(f"{'':20} {'ids/s':>8} {'trained':>8} {'trained/s':>10} {'packed is':>10} {'CPU s':>8}")
    ours = 0.0
    for name, batches in made.items():
        speed = ids[name] / took[name]
        share = sum(batch.n for batch in batches) / sum(batch.size for batch in batches)
        ours = ours or speed * share
        ratio = f"{ours / (speed * share):.2f}x"
        print(f"{name:20} {speed:8.1f} {share:8.1%} {speed * share:10.1f} {ratio:>10} {took[name]:8.1f}")


def encode(given: argparse.Namespace) -> None:
    from puna.data.conversations import read_conversations
    from puna.data.encoders import cores, encode_in_order

    few = list(read_conversations(source(*given.rows[:1] or [None])))
    how = encoding()
    for workers in dict.fromkeys([1, 2, cores()]):
        chunks = encode_in_order(itertools.islice(itertools.cycle(few), given.count), how, workers)
        started, ids = time.perf_counter(), 0
        for chunk in chunks:
            ids += len(chunk.ids)
        took = time.perf_counter() - started
        print(f"{workers} processes: {given.count / took:,.0f} conversations/s, {ids / took:,.0f} ids/s")


def pack_lengths(given: argparse.Namespace) -> None:
    import numpy as np

    from puna.data.packs import best_fit

    for count, seq_len in ((1_000_000, 4096), (4_000_000, 4096), (4_000_000, 512)):
        lengths = np.random.default_rng(0).lognormal(5.3, 0.9, count).clip(8, seq_len).astype(np.int32)
        started = time.perf_counter()
        _, bounds = best_fit(lengths, seq_len)
        took = time.perf_counter() - started
        fill = lengths.sum() / (len(bounds) - 1) / seq_len
        print(f"{count:,} rows into packs of {seq_len}: {took:.2f} s, {fill:.2%} full")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"train": train, "encode": encode, "pack": pack_lengths}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--rows", nargs="+", default=[], metavar="FILE", help="files of conversations")
    parser.add_argument("--seconds", type=float, default=90, help="that steps of training take")
    parser.add_argument("--count", type=int, default=8000)
    given = parser.parse_args()
    parts[given.part](given)


if __name__ == "__main__":
    main()
