"""The weights of two models held against each other, one tensor at a time, and what usually went wrong with them."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from puna.checkpoint.rope_layout import to_halves, to_neighbours
from puna.checkpoint.stored import Stored, Weight
from puna.eval.parity.rows import Row
from puna.lora import lora_layers
from puna.model.config import ModelConfig
from puna.model.transformer import Transformer


class Weights(NamedTuple):
    """How the tensors of two models differ: as shares of a tensor's length."""

    tensors: int
    equal: int
    worst: float
    told: list[str]
    """What is missing, and the likely mistake."""


def compare_weights(a: Stored, b: Stored) -> Weights:
    """Every tensor of both; two are in memory at a time."""
    equal, worst, name_of_worst, mistakes = 0, 0.0, "", {}
    both = [name for name in a.weights if name in b.weights]
    for name in both:
        one, two = a.weights[name].read(), b.weights[name].read()
        if one.shape != two.shape:
            mistakes[f"{name} is {tuple(one.shape)} in A, {tuple(two.shape)} in B"] = 1
            worst = float("inf")
            continue
        gap = _gap(one, two)
        equal += gap == 0
        if not gap <= worst:
            worst, name_of_worst = gap, name
        if not gap <= 0.1 and (mistake := _mistake(name, one, two, gap, a.config)):
            mistakes[mistake] = mistakes.get(mistake, 0) + 1
    told = [f"{mistake} ({count} tensors)" if count > 1 else mistake for mistake, count in mistakes.items()]
    told += [f"furthest apart: {name_of_worst}, by {worst:.2g} of its length"] if name_of_worst else []
    missing = _missing("A", a, b) + _missing("B", b, a)
    return Weights(len(both), equal, float("inf") if missing else worst, missing + told)


def weights_row(found: Weights, storages: tuple[str, str]) -> Row:
    """Equal is well; rounding and quantization explain a difference, if it is no larger than theirs."""
    if found.equal == found.tensors and not found.told:
        return Row("weights", True, f"{found.tensors} tensors, equal bit for bit")
    explained = storages[0] != storages[1] and found.worst < 0.5
    well = None if explained or found.worst == 0 else False
    return Row("weights", well, "; ".join([f"{found.equal} of {found.tensors} tensors are equal", *found.told]))


def times_merged(adapted: Transformer, weights: Mapping[str, Weight]) -> float:
    """How many times a model's weights hold the adapters of `adapted`: 0 where it is their base, 2 if merged twice.

    The least-squares t of W' - W = t (merged - W) over all adapted layers. NaN where there is nothing to measure.
    """
    along = length = 0.0
    for name, layer in lora_layers(adapted).items():
        base = layer.base.weight.detach().float().cpu()
        delta = layer.full_weight().float().cpu() - base
        moved = weights[f"{name}.weight"].read().float() - base
        along, length = along + (moved * delta).sum().item(), length + delta.square().sum().item()
    return along / length if length else float("nan")


def merged_row(times: float) -> Row:
    """A merge that was forgotten, or made twice, answers in whole sentences."""
    wrong = ": it was not merged" if abs(times) < 0.25 else ": it was merged twice" if abs(times - 2) < 0.25 else ""
    return Row("weights", abs(times - 1) < 0.1, f"the adapter is in them {times:.2f} times, expected 1{wrong}")


def _gap(one: Tensor, two: Tensor) -> float:
    """Length of the difference as a share of the tensor's; exactly 0 when every value is equal."""
    one, two = one.float(), two.float()
    if torch.equal(one, two):
        return 0.0
    return ((one - two).norm() / one.norm().clamp(min=torch.finfo(torch.float32).tiny)).item()


def _mistake(name: str, one: Tensor, two: Tensor, gap: float, config: ModelConfig) -> str:
    """Which of the usual mistakes turns one tensor into the other, if any does."""
    for told, change in _usual(name, config).items():
        if _gap(change(one), two) < gap / 4:
            return f"{name.rpartition('.')[0].rpartition('.')[2]} {told}"
    return ""


def _usual(name: str, config: ModelConfig) -> dict[str, Callable[[Tensor], Tensor]]:
    size, heads = config.head_dim, config.n_heads
    if name.endswith("k_proj.weight") and config.n_kv_heads != heads and (config.n_kv_heads * size) % (2 * heads) == 0:
        wrong = config.n_kv_heads * size // heads
        by_heads = {
            "of B turned with n_heads instead of n_kv_heads": lambda w: to_halves(to_neighbours(w, size), wrong),
            "of A turned with n_heads instead of n_kv_heads": lambda w: to_halves(to_neighbours(w, wrong), size),
        }
    else:
        by_heads = {}
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        turned = {
            "of B has RoPE's rows in Meta's order": lambda w: to_neighbours(w, size),
            "of A has RoPE's rows in Meta's order": lambda w: to_halves(w, size),
        }
        return {**turned, **by_heads}
    if name in ("embed_tokens.weight", "lm_head.weight"):
        return {
            "of B is shifted by one row": lambda w: w.roll(1, 0),
            "of A is shifted by one row": lambda w: w.roll(-1, 0),
        }
    return {}


def _missing(side: str, of: Stored, other: Stored) -> list[str]:
    """Tensors that only one has. A head that equals the embedding is no loss: that is what tied means."""
    names = sorted(of.weights.keys() - other.weights.keys())
    if "lm_head.weight" in names and "embed_tokens.weight" in other.weights:
        names.remove("lm_head.weight")
        if _gap(of.weights["lm_head.weight"].read(), other.weights["embed_tokens.weight"].read()):
            return [f"only {side} has lm_head.weight, and it is not the embedding"]
    return [f"only {side} has {', '.join(names[:3])}"] if names else []
