"""LoRA of SmolLM2-135M (rank 16 on every linear layer): puna beside PEFT on transformers, both in bf16.

python bench/lora.py [--batch 4] [--length 512] [--accumulate 1] [--rounds 5] [--compile]      full rows
python bench/lora.py --rows ALPACA.json [--count 64]           conversations of 512 ids at most, eight to a step
The second shows what packing saves: puna packs the rows, PEFT pads them as they come, or sorted by length.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from side_by_side import Work, compare

MODEL = "smollm2-135m"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WATCHED = [f"layers.{i}.{name}.lora_{m}.weight" for i in (0, 29) for name in ("self_attn.q_proj", "mlp.down_proj")
           for m in "AB"]  # fmt: skip


def batch(rows: int, length: int):
    """Random ids: the cost of a step does not depend on what they say."""
    import torch

    ids = torch.randint(0, 49152, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def start(parameters: dict[str, Any]) -> None:
    """The same random adapters in every library: with B at zero, A would have no gradient to compare."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in sorted(parameters):
            parameters[name].copy_(0.02 * torch.randn(parameters[name].shape, generator=generator))


def conversations(path: str, limit: int) -> list[Any]:
    """Rows as the sft recipe encodes them."""
    from puna.checkpoint.registry import load_tokenizer
    from puna.data.conversations import ChatSource, read_conversations
    from puna.data.encode import encode_conversations
    from puna.tokenizer.chat.format import ChatFormat

    source = ChatSource(path=path, limit=limit)
    return encode_conversations(read_conversations(source), ChatFormat(load_tokenizer(MODEL)), 512, "all")


def puna_side(
    rows: int, length: int, accumulate: int = 1, compiled: bool = False, data: tuple[str, int] | None = None
) -> Work:
    import puna
    from puna.data.loader import Batch
    from puna.data.packing import PackedLoader
    from puna.lora import LoraConfig, add_lora, lora_parameters
    from puna.ops.native.allocator import fit_holes
    from puna.train.blocks import compile_blocks
    from puna.train.fit import train_step
    from puna.train.objectives import next_token
    from puna.train.optim import OptimizerConfig, build_optimizer

    fit_holes()  # as its recipes do
    model = puna.load(MODEL, dtype="bf16").model
    add_lora(model, LoraConfig(rank=16, alpha=32, targets=TARGETS))
    start(lora_parameters(model))
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.0))
    if compiled:
        compile_blocks(model)

    def train(micro: list[Batch]) -> float:
        return train_step(model, optimizer, micro, next_token, 1e-4, 1.0, lambda loss, norm: True)["loss"]

    if data:
        loader = PackedLoader(conversations(*data), length, rows, 0, seed=0)
        every = [loader.batch(loader.packs[i : i + rows]) for i in range(0, len(loader.packs), rows)]
        return Work(lambda: epoch(partial(train, [packed]) for packed in every))
    tokens, labels = batch(rows * accumulate, length)
    micro = [Batch(t, l, l.numel()) for t, l in zip(tokens.split(rows), labels.split(rows), strict=True)]

    def gradients() -> dict[str, Any]:
        for part in micro:
            (next_token(model, part).sum / labels.numel()).backward()
        found = {name: model.get_parameter(name).grad.clone() for name in WATCHED}
        optimizer.zero_grad(set_to_none=True)
        return found

    return Work(lambda: train(micro), gradients)


def peft_side(
    rows: int,
    length: int,
    folder: str,
    data: tuple[str, int] | None = None,
    sort: bool = False,
    dtype: str = "bfloat16",
) -> Work:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    )
    model.train()
    before = "base_model.model.model."
    theirs = {n.removeprefix(before).replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
    start(theirs)
    trained = list(theirs.values())
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True, weight_decay=0.0)

    def train(tokens: Any, labels: Any, mask: Any = None) -> float:
        loss = model(tokens, attention_mask=mask, shift_labels=labels, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    if data:
        encoded = conversations(*data)
        if sort:
            encoded.sort(key=lambda row: len(row.ids))
        every = [_padded(encoded[i : i + rows]) for i in range(0, len(encoded), rows)]
        return Work(lambda: epoch(partial(train, *padded) for padded in every))
    tokens, labels = batch(rows, length)

    def gradients() -> dict[str, Any]:
        model(tokens, shift_labels=labels, labels=labels).loss.backward()
        found = {name: theirs[name].grad.clone() for name in WATCHED}
        optimizer.zero_grad(set_to_none=True)
        return found

    return Work(lambda: train(tokens, labels), gradients)


def epoch(steps: Iterable[Callable[[], float]]) -> float:
    """Every step once; batches differ between libraries, so no loss is theirs to compare."""
    for step in steps:
        step()
    return 0.0


def _padded(rows: list[Any]) -> tuple[Any, Any, Any]:
    """ids, labels of the next token, and which are real, as wide as the longest row."""
    import torch

    width = max(len(row.ids) for row in rows)
    tokens, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full_like(tokens, -100)
    for i, row in enumerate(rows):
        ids, trained = torch.tensor(row.ids), torch.tensor(row.trained)
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, 1
        labels[i, : len(ids) - 1] = torch.where(trained[1:], ids[1:], -100)
    return tokens, labels, mask


def _flops(folder: Path, length: int) -> float:
    """Of a token: frozen weights have no gradient of their own, so 4 for each instead of 6; adapters are left out."""
    from puna.checkpoint.registry import open_model
    from puna.model.config import count_parameters

    config = open_model(folder).config  # tied: the embedding is the head's matrix
    return 4 * count_parameters(config) + 6 * config.n_layers * config.n_heads * config.head_dim * length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--accumulate", type=int, default=1, help="puna's micro-batches of the batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rows", help="conversations to train once a turn, instead of full rows")
    parser.add_argument("--count", type=int, default=64, help="how many of them")
    given = parser.parse_args()
    if given.batch % given.accumulate:
        parser.error(f"--batch {given.batch} cannot be computed in {given.accumulate} parts")
    import puna

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        puna.load(MODEL, dtype="bf16").save(path)
        theirs = partial(peft_side, given.batch, given.length, str(path))
        if given.rows:
            data = (given.rows, given.count)
            ours = partial(puna_side, 4, 512, compiled=given.compile, data=data)
            theirs = partial(peft_side, 8, 512, str(path), data=data)
            # One after the other: each of PEFT's takes some 10 GB.
            for name, sort in {"PEFT, by length": True, "PEFT, padded": False}.items():
                sides = {"puna, packed": ours, name: partial(theirs, sort=sort)}
                compare(sides, len(conversations(*data)), given.rounds, unit="rows")
            return
        ours = partial(puna_side, given.batch // given.accumulate, given.length, given.accumulate, given.compile)
        sides = {"puna": ours, "PEFT + transformers": theirs}
        reference = partial(theirs, dtype="float32")
        compare(sides, given.batch * given.length, given.rounds, reference=reference, flops=_flops(path, given.length))


if __name__ == "__main__":
    main()
