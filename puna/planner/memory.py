"""Memory of a rank at each moment of a run, by class. The fullest moment is what has to fit."""

import math
from typing import NamedTuple

from puna.ops.cross_entropy import CHUNK, CHUNK_FROZEN, ROWS
from puna.planner.activations import block_weights, cast_by_block, kept_by_block, transient_of_block
from puna.planner.work import Weight, Work
from puna.train.adamw8bit import SMALL

CLASSES = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "runtime")
_FP32 = 4
# Fitted to the eight calibrated configs of bench/plan.py, on a CPU and glibc; on other devices they are assumed.
FLOOR = {"cpu": 185e6, "cuda": 500e6, "mps": 300e6}
"""Bytes that a run takes whatever its model is: code that is loaded or compiled late, tokenizer and texts, what small
blocks left free; on CUDA its context."""
HOLES = {"cpu": 0.05, "cuda": 0.08, "mps": 0.34}
"""Of activations, the share that the allocator holds on top: what comes and goes leaves holes between what stays."""


class Moment(NamedTuple):
    """Bytes in use."""

    when: str
    classes: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.classes.values())


def fullest(work: Work) -> Moment:
    """The moment of the run with the most memory in use."""
    return max(moments(work), key=lambda moment: moment.total)


def moments(work: Work) -> list[Moment]:
    """What is in use at the loss, in a validation, through the backward, and at the step."""
    stay = _staying(work)
    layers, tokens = work.known.shape.n_layers, work.tokens
    block = tokens * sum(kept_by_block(work).values()) + cast_by_block(work)
    entry = tokens * work.known.shape.dim * work.item  # all that a checkpointed block keeps
    again = {"none": 0, "selective": layers // 2, "full": layers}[work.train.get("checkpoint_activations", "none")]
    offloaded = bool(work.train.get("offload_activations"))
    kept = (layers - again) * block + again * entry * (not offloaded)
    ends = 3 * entry + tokens * work.known.shape.head_dim * _FP32  # around the last norm, and RoPE's tables
    inside = transient_of_block(work) + (block if again else 0)  # a block that is computed again is kept for a moment
    head, in_layers = _trained_bytes(work, "head"), _trained_bytes(work, "layers")
    one_layer = in_layers / layers
    added = head + in_layers if work.train["accumulate"] > 1 else 0.0  # of the micro-batches before
    stepped = bool(work.optimizer.get("in_backward"))
    logits = _logits(work)
    found = [
        _moment("the loss", stay, activations=kept + ends, logits=logits, gradients=added),
        _moment("a validation", stay, logits=_logits_validated(work)),
        _moment("the backward's start", stay, activations=kept + ends + inside, logits=0.0,
                gradients=added or head + one_layer),
        _moment("the backward's end", stay, activations=block + ends + transient_of_block(work),
                gradients=head + in_layers if not stepped else head + one_layer),
        _moment("the embedding's gradient", stay, activations=ends,
                gradients=(head + in_layers if not stepped else head) + _embedding_gradient(work)),
        _moment("the optimizer's step", stay, gradients=head + in_layers if not stepped else 0.0,
                activations=_update(work)),
    ]  # fmt: skip
    return [moment._replace(classes=_with_runtime(work, moment.classes)) for moment in found]


def _staying(work: Work) -> dict[str, float]:
    """What is there from the first step to the last, of this rank's part."""
    ranks = work.known.ranks
    gathered = 0.0
    if ranks > 1:  # embedding, head and last norm stay whole from forward to backward; of blocks one and the next
        outside = sum(w.held for name, w in work.weights.items() if not name.startswith("layers."))
        one = sum(w.held + _FP32 * w.adapter for w in block_weights(work).values())
        gathered = (outside + 2 * one) * (1 - 1 / ranks)
    held, adapters = (sum(w.held for w in work.weights.values()), _FP32 * sum(w.adapter for w in work.weights.values()))
    teacher = work.asked.get("distill") or {}
    return {
        "weights": held / ranks + gathered + (held if teacher else 0.0),
        "adapters": adapters / ranks,
        "optimizer": sum(_moments(work, name, w) for name, w in work.weights.items()) / ranks,
    }


def _moments(work: Work, name: str, weight: Weight) -> float:
    """Bytes of the optimizer's state of a weight, or of its adapter."""
    kind, numbers = work.optimizer["kind"], weight.numbers if weight.trained else 0
    parts = [numbers, weight.rank * weight.shape[-1], weight.rank * weight.shape[0]] if weight.rank else [numbers]
    if kind == "adamw8bit":
        return sum(2 * n + 2 * _FP32 * math.ceil(n / 256) if n >= SMALL else 2 * _FP32 * n for n in parts)
    orthogonal = kind == "muon" and name.startswith("layers.") and len(weight.shape) == 2
    return float((1 if orthogonal else 2) * _FP32 * sum(parts))


def _trained_bytes(work: Work, where: str) -> float:
    """Bytes of the gradients of the blocks, or of what lies around them (a tied head counts once)."""
    chosen = (w for name, w in work.weights.items() if name.startswith("layers.") == (where == "layers"))
    return sum(_FP32 * (w.numbers * w.trained + w.adapter) for w in chosen) / work.known.ranks


def _logits(work: Work) -> float:
    """At the loss (ops/cross_entropy.py): a chunk's logits, which become their gradient; some of its rows in fp32
    twice, or what the chunk adds to the head's gradient; that gradient in fp32 so far, the head in the compute dtype,
    the hidden states that are trained and their gradient.
    """
    shape, trained = work.known.shape, _head(work).trained
    rows = 2 * work.tokens * work.texts.trained * shape.dim * work.item
    product = _head_numbers(work) * work.item * trained
    sums = _head_numbers(work) * _FP32 * trained
    chunk = _chunk(work) * shape.vocab_size * work.item
    return chunk + max(_wide_logits(work), product) + sums + rows + _cast_head(work)


def _logits_validated(work: Work) -> float:
    """A chunk in the compute dtype, some rows of it in fp32 and as logarithms; nothing of a gradient."""
    return _chunk(work) * work.known.shape.vocab_size * work.item + _wide_logits(work) + _cast_head(work)


def _wide_logits(work: Work) -> float:
    """Logits in fp32, twice: on a CPU of some rows of a chunk, unless a teacher's stand beside them."""
    some = work.known.device.type == "cpu" and not work.asked.get("distill")
    rows = min(ROWS, _chunk(work)) if some else _chunk(work)
    return 2 * rows * work.known.shape.vocab_size * _FP32


def _cast_head(work: Work) -> float:
    """The head in the compute dtype, where it is trained in another."""
    return float(_head_numbers(work) * work.item * (_head(work).trained and work.item != _FP32))


def _head_numbers(work: Work) -> int:
    return work.known.shape.vocab_size * work.known.shape.dim


def _chunk(work: Work) -> float:
    """Rows of logits that are there at a time."""
    large = _head(work).trained and not work.asked.get("distill")
    return min(CHUNK if large else CHUNK_FROZEN, work.tokens * work.texts.trained)


def _head(work: Work) -> Weight:
    return work.weights.get("lm_head.weight", work.weights["embed_tokens.weight"])


def _embedding_gradient(work: Work) -> float:
    """A tied matrix has two gradients until they are added; one that is not tied is counted among the others."""
    embedding = work.weights["embed_tokens.weight"]
    return float(_FP32 * embedding.numbers * (embedding.trained and "lm_head.weight" not in work.weights))


def _update(work: Work) -> float:
    """Muon holds the update of every matrix, and those of one shape in fp32 and three times in bf16."""
    if work.optimizer["kind"] != "muon":
        return 0.0
    block = [w.numbers * w.trained for w in block_weights(work).values() if len(w.shape) == 2]
    layers = work.known.shape.n_layers
    return float(layers * (_FP32 * sum(block) + (_FP32 + 6) * 2 * max(block, default=0)))


def _moment(when: str, stay: dict[str, float], **more: float) -> Moment:
    return Moment(when, {**dict.fromkeys(CLASSES, 0.0), **stay, **more})


def _with_runtime(work: Work, classes: dict[str, float]) -> dict[str, float]:
    kind = work.known.device.type
    return {**classes, "runtime": FLOOR[kind] + HOLES[kind] * classes["activations"]}
