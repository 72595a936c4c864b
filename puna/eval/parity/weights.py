"""The weights of two models held against each other, one tensor at a time, and what usually went wrong with them."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from puna.checkpoint.rope_layout import to_halves, to_neighbours
from puna.checkpoint.stored import Stored, Weight
from puna.eval.parity.budget import ROUNDING
from puna.eval.parity.observe import larger
from puna.eval.parity.rows import Row
from puna.lora import lora_layers
from puna.model.config import ModelConfig
from puna.model.transformer import Transformer

_UNMOVED = 1e-6  # as a share of the weights' length


class Weights(NamedTuple):
    """How the tensors of two models differ: as shares of a tensor's length."""

    tensors: int
    equal: int
    worst: float
    worst_plain: float
    """Of those that neither model has quantized."""
    told: list[str]
    """What is missing, and the likely mistake."""


def compare_weights(a: Stored, b: Stored) -> Weights:
    """Every tensor of both; two are in memory at a time."""
    gaps: dict[str, float] = {}
    mistakes: dict[str, int] = {}
    both = [name for name in a.weights if name in b.weights]
    for name in both:
        one, two = a.weights[name].read(), b.weights[name].read()
        if one.shape != two.shape:
            mistakes[f"{name} is {tuple(one.shape)} in A, {tuple(two.shape)} in B"] = 1
            continue
        gap = gaps[name] = _gap(one, two)
        if not gap <= 0.1 and (mistake := _mistake(name, one, two, gap, a.config)):
            mistakes[mistake] = mistakes.get(mistake, 0) + 1
    told = [f"{mistake} ({count} tensors)" if count > 1 else mistake for mistake, count in mistakes.items()]
    quantized = {name for name in gaps if a.weights[name].quantized or b.weights[name].quantized}
    plain, packed = (_worst({n: gap for n, gap in gaps.items() if (n in quantized) == kind}) for kind in (False, True))
    furthest = [f"{name} by {gap:.2g} of its length" for name, gap in (plain, packed) if gap]
    told += [f"furthest apart: {', '.join(furthest)}"] if furthest else []
    missing = _missing("A", a, b) + _missing("B", b, a)
    worst = float("inf") if missing or len(gaps) < len(both) else larger(plain[1], packed[1])
    return Weights(len(both), sum(gap == 0 for gap in gaps.values()), worst, plain[1], missing + told)


def weights_row(found: Weights, storages: tuple[str, str]) -> Row:
    """Equal is well; rounding, and quantization of what is quantized, explain a difference no larger than theirs."""
    if found.equal == found.tensors and not found.told:
        return Row("weights", True, f"{found.tensors} tensors, equal bit for bit")
    explained = storages[0] != storages[1] and found.worst < 0.5 and found.worst_plain <= ROUNDING
    well = None if explained or found.worst == 0 else False
    return Row("weights", well, "; ".join([f"{found.equal} of {found.tensors} tensors are equal", *found.told]))


def merged_row(adapted: Transformer, weights: Mapping[str, Weight]) -> Row:
    """A merge that was forgotten, or made twice, answers in whole sentences."""
    shapes = {f"{name}.weight": tuple(layer.base.weight.shape) for name, layer in lora_layers(adapted).items()}
    if unlike := [name for name, shape in shapes.items() if name not in weights or weights[name].shape != shape]:
        return Row("weights", False, f"{len(unlike)} adapted tensors are missing or of another shape: {unlike[0]}")
    times = times_merged(adapted, weights)
    if times is None:
        return Row("weights", None, "the adapter changes nothing")
    wrong = ": it was not merged" if abs(times) < 0.25 else ": it was merged twice" if abs(times - 2) < 0.25 else ""
    return Row("weights", abs(times - 1) < 0.1, f"the adapter is in them {times:.2f} times, expected 1{wrong}")


def times_merged(adapted: Transformer, weights: Mapping[str, Weight]) -> float | None:
    """How many times a model's weights hold the adapters of `adapted`: 0 where it is their base, 2 if merged twice.

    The least-squares t of W' - W = t (merged - W) over all adapted layers. None if they change W by no more than
    the rounding of DoRA's division.
    """
    along = length = whole = 0.0
    for name, layer in lora_layers(adapted).items():
        base = layer.base.weight.detach().float().cpu()
        delta = layer.full_weight().detach().float().cpu() - base
        moved = weights[f"{name}.weight"].read().float() - base
        along, length = along + (moved * delta).sum().item(), length + delta.square().sum().item()
        whole += base.square().sum().item()
    return None if length <= whole * _UNMOVED**2 else along / length


def _gap(one: Tensor, two: Tensor) -> float:
    """Length of the difference as a share of the tensor's; exactly 0 when every value is equal."""
    one, two = one.float(), two.float()
    if torch.equal(one, two):
        return 0.0
    return ((one - two).norm() / one.norm().clamp(min=torch.finfo(torch.float32).tiny)).item()


def _worst(gaps: Mapping[str, float]) -> tuple[str, float]:
    """The largest gap and whose it is; NaN, which compares false with everything, before all."""
    return max(gaps.items(), key=lambda item: (item[1] != item[1], item[1]), default=("", 0.0))


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
