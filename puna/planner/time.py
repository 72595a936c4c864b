"""Seconds of a step: its products at the rate this machine multiplies at, the optimizer's bytes at its bandwidth."""

import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from puna.ops.blocked_attention import KEEP
from puna.planner.work import Weight, Work

EFFICIENCY = {"cpu": 0.6, "cuda": 0.45, "mps": 0.4}
"""Share of the rate of large products that a step reaches; measured by bench/plan.py on a CPU, elsewhere assumed."""
SPREAD = 0.3
"""How far an estimate may be off either way: neighbours on the machine, its clock, shapes."""
_PROBE = 0.1  # seconds
_COPIED = 1 << 26  # bytes
_STEP_BYTES = {"adamw": 40, "adamw8bit": 28, "muon": 36}
"""A number of AdamW: reads weight, gradient and moments, writes all but the gradient; its norm, and its clipping."""


class Rates(NamedTuple):
    """Of a device, measured just now."""

    flops: float
    """Floating-point operations of products a second."""
    bytes: float
    """Of memory, a second, reads and writes."""


def flops(work: Work) -> float:
    """Floating-point operations of the products of a step of this rank: two for each multiplication with its sum.

    Forward and gradient of the input of every weight, gradient of the weights that are trained; blocks that are
    computed again have a second forward.
    """
    shape, tokens, train = work.known.shape, work.tokens, work.train
    layers = {n: w for n, w in work.weights.items() if n.startswith("layers.") and len(w.shape) == 2}
    again = {"none": 0.0, "selective": 0.5, "full": 1.0}[train.get("checkpoint_activations", "none")]
    # The second forward ends where nothing more is kept of it: the last product is not made again.
    twice = [w for n, w in layers.items() if w.rank or not n.endswith("down_proj.weight")]
    products = sum(map(_products, layers.values())) + again * sum(2 * (w.numbers + w.adapter) for w in twice)
    heads = shape.n_heads * shape.head_dim
    longer = 2 if work.known.lengths == () and work.asked["seq_len"] > KEEP else 0  # scores are made again
    attention = shape.n_layers * heads * work.texts.keys * (4 + 8 + longer + 4 * again)
    head = work.weights.get("lm_head.weight", work.weights["embed_tokens.weight"])
    logits = work.texts.trained * head.numbers * (6 if head.trained else 4)
    return tokens * train["accumulate"] * (products + attention + logits)


def seconds(work: Work, rates: Rates) -> float:
    """Seconds of a step, an estimate."""
    trained = sum(w.numbers * w.trained + w.adapter for w in work.weights.values()) / work.known.ranks
    moved = trained * _STEP_BYTES[work.optimizer["kind"]]
    unpacked = work.train["accumulate"] * _expanded(work)
    return flops(work) / (rates.flops * EFFICIENCY[work.known.device.type]) + (moved + unpacked) / rates.bytes


def measured_rates(work: Work) -> Rates:
    """Measure for a fifth of a second: products of this model's shape in its compute dtype, and copies.

    On a CPU of at most 1,024 by 2,048: larger ones are no faster, and take seconds.
    """
    shape, most = work.known.shape, 1 if work.known.device.type == "cpu" else 4
    return _rates(work.known.device, work.known.dtype, min(shape.dim, 1024 * most), min(shape.ffn_dim, 2048 * most),
                  max(64, min(work.tokens, 512 * most)))  # fmt: skip


def _products(weight: Weight) -> float:
    return weight.numbers * (6 if weight.trained else 4) + 6.0 * weight.adapter


def _expanded(work: Work) -> float:
    """Bytes written and read where packed weights are expanded, in the forward and again in the backward."""
    if not work.asked.get("quantize"):
        return 0.0
    return sum(4.0 * w.numbers * work.item for n, w in work.weights.items() if n.startswith("layers."))


@cache
def _rates(device: torch.device, dtype: torch.dtype, dim: int, ffn_dim: int, tokens: int) -> Rates:
    a, b = torch.ones(tokens, dim, device=device, dtype=dtype), torch.ones(dim, ffn_dim, device=device, dtype=dtype)
    source = torch.ones(_COPIED, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return Rates(2.0 * tokens * dim * ffn_dim / _each(lambda: a @ b, device),
                 2.0 * _COPIED / _each(lambda: target.copy_(source), device))  # fmt: skip


def _each(call: Callable[[], object], device: torch.device) -> float:
    """Seconds a call, of the fastest: what slows one down is somebody else's."""
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < _PROBE:
        before = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - before)
    return best
