"""What packing costs and what it saves, in three parts; each takes a minute or two on two cores.

python bench/packing.py train [--rows FILE] [--limit 64] [--rounds 3]   short conversations packed beside padded
python bench/packing.py encode [--rows FILE] [--count 8000]             conversations a second with 1, 2 ... processes
python bench/packing.py pack                                            1 and 4 million rows by their lengths
The first is LoRA of SmolLM2-135M (rank 16, all linears); without --rows it takes chatterbot's small talk. Padded rows
are as long as the longest of their batch, or all 512 ids, as shapes that are compiled or exported once have to be.
"""

import argparse
import itertools
import time
from functools import partial
from typing import Any

from side_by_side import Work, compare

MODEL = "smollm2-135m"
LENGTH, BATCH = 512, 4


def source(rows: str | None, limit: int | None = None) -> Any:
    from puna.data.conversations import ChatSource
    from puna.data.dialogues import DIALOGUES

    if rows:
        return ChatSource(path=rows, limit=limit)
    DIALOGUES["chatterbot"].fetch()
    return ChatSource(packages=["chatterbot"], limit=limit)


def encoding() -> Any:
    from puna.checkpoint.registry import load_tokenizer
    from puna.data.encode import Encoding
    from puna.tokenizer.chat.format import ChatFormat

    return Encoding(ChatFormat(load_tokenizer(MODEL), date_string="26 Jul 2024"), LENGTH)


def encoded(rows: str | None, limit: int) -> list[Any]:
    from puna.data.conversations import read_conversations
    from puna.data.encode import encode_conversations

    given = encoding()
    return encode_conversations(read_conversations(source(rows, limit)), given.chat, LENGTH, "all")


def side(rows: str | None, limit: int, batch: int, packed: bool, width: int = 0) -> Work:
    """All conversations once a step of the comparison, `batch` rows of at least `width` ids to a step of training."""
    import torch

    import puna
    from puna.data.loader import Batch
    from puna.data.packing import PackedLoader
    from puna.lora import LoraConfig, add_lora
    from puna.ops.cross_entropy import IGNORE
    from puna.train.fit import train_step
    from puna.train.objectives import next_token
    from puna.train.optim import OptimizerConfig, build_optimizer

    model = puna.load(MODEL, dtype="bf16").model
    add_lora(model, LoraConfig(rank=16, alpha=32))
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.0))
    loader = PackedLoader(encoded(rows, limit), LENGTH, batch, 0, seed=0, packed=packed)

    def wide(made: Batch) -> Batch:
        more = max(0, width - made.tokens.shape[1])
        tokens, labels, positions = (
            torch.nn.functional.pad(tensor, (0, more), value=value)
            for tensor, value in ((made.tokens, 0), (made.labels, IGNORE), (made.positions, 0))
        )
        return Batch(tokens, labels, made.n, positions, made.documents)

    def epoch() -> float:
        for start in range(0, len(loader.packs), batch):
            micro = [wide(loader.batch(loader.packs[start : start + batch]))]
            train_step(model, optimizer, micro, next_token, 1e-4, 1.0, lambda loss, norm: True)
        return 0.0  # batches differ, so no loss is theirs to compare

    return Work(epoch)


def train(given: argparse.Namespace) -> None:
    from puna.data.packs import pack

    made = encoded(given.rows, given.limit)
    lengths = [len(row.ids) for row in made]
    together = -(-len(made) * BATCH // len(pack(lengths, LENGTH)))  # conversations in a packed batch
    print(f"{len(made)} conversations of {sum(lengths) / len(made):.0f} ids on average, {max(lengths)} at most")
    sides = {
        f"packed, {BATCH} rows of {LENGTH}": partial(side, given.rows, given.limit, BATCH, True),
        f"padded to {LENGTH}, {BATCH} rows": partial(side, given.rows, given.limit, BATCH, False, LENGTH),
        f"padded, {BATCH} rows": partial(side, given.rows, given.limit, BATCH, False),
        f"padded, {together} rows": partial(side, given.rows, given.limit, together, False),
    }
    speeds = compare(sides, sum(sum(row.trained[1:]) for row in made), given.rounds, unit="trained")
    ours, *padded = speeds.values()
    print("trained tokens a second, packed by padded: " + ", ".join(f"{ours / other:.2f}x" for other in padded))


def encode(given: argparse.Namespace) -> None:
    from puna.data.conversations import read_conversations
    from puna.data.encoders import cores, encode_in_order

    few = list(read_conversations(source(given.rows)))
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
    parser.add_argument("--rows", help="a file of conversations; without it chatterbot's")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=8000)
    given = parser.parse_args()
    parts[given.part](given)


if __name__ == "__main__":
    main()
