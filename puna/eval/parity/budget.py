"""How far two models may be apart. Which number is judged depends on what the two are stored in."""

import math
import re
from typing import NamedTuple

from puna.eval.parity.observe import Apart
from puna.eval.parity.rows import Row


class Budget(NamedTuple):
    """The most that is allowed; None is not judged."""

    kind: str
    logits: float | None = None
    """Largest difference of any logit."""
    kl: float | None = None
    """Mean nats a position."""
    perplexity: float | None = None
    """Increase on the text, as a share."""
    answers: bool = False
    """Whether every greedy answer has to be the same."""


SAME = Budget("the same weights", logits=1e-3, perplexity=1e-3, answers=True)
# Set by one model, SmolLM2-135M: F16 has KL 3e-6, BF16 1e-4, Q8_0 0.002, Q4_0 0.55 and +15 % perplexity; q and k in
# Meta's order 1.9 and +430 %. A mistake in one layer is as small as 4 bits are coarse (0.7): `weights` has to name it.
ROUNDED = Budget("weights rounded to 16 bits", kl=5e-3, perplexity=0.01)
EIGHT = Budget("weights quantized to 8 bits", kl=0.02, perplexity=0.02)
FOUR = Budget("weights quantized to 4 bits or more", kl=1.0, perplexity=0.25)
# fewer bits were not measured
FEWER = Budget("weights quantized to fewer than 4 bits", kl=1.0, perplexity=1.0)
ROUNDING = 1 / 256  # rounding to the 8 bits of bf16 moves a tensor by about 0.002 of its length
_BF16_LOGITS = 0.25  # activations of 8 bits: sums in another order move a logit of 20 by as much


def budget_for(storages: tuple[str, str], gap: float | None, dtype: str) -> Budget:
    """The default for two models by what their weights are stored in: `BF16`, `Q4_1 x 210, F32 x 61`.

    Args:
        gap: the largest difference of a tensor as a share of its length, where the weights were compared.
        dtype: what both compute in.
    """
    same = SAME._replace(logits=_BF16_LOGITS, answers=False) if dtype == "bf16" else SAME
    bits = [int(n) for storage in storages for n in re.findall(r"\b(?:I?Q|INT|NF)(\d)", storage)]
    kinds = [set(re.findall(r"\b(?:BF16|F16|F32|F64)\b", storage)) for storage in storages]
    if gap == 0 or not (bits or kinds[0] != kinds[1]):
        return same
    if not bits or (gap is not None and gap <= ROUNDING):
        return ROUNDED
    return EIGHT if min(bits) >= 8 else FOUR if min(bits) >= 4 else FEWER


def logit_rows(found: Apart, budget: Budget, token: str) -> list[Row]:
    """What was measured on the prompts, with the verdicts of `budget`. `token` is the text of `found.where`'s id."""
    prompt, position, id = found.where
    place = f"prompt {prompt + 1}, position {position}, id {id} {token!r}"
    return [
        Row(
            "logits",
            _within(found.max_logit, budget.logits),
            f"max difference {found.max_logit:.2g}, mean {found.mean_logit:.2g}{_most(budget.logits)}",
        ),
        Row("logprobs", None, f"max difference {found.max_logprob:.2g} at {place}"),
        Row(
            "KL",
            _within(found.mean_kl, budget.kl),
            f"mean {max(0.0, found.mean_kl):.2g} nats a position, max {max(0.0, found.max_kl):.2g}{_most(budget.kl)}",
        ),
    ]


def perplexity_row(perplexities: tuple[float, float], bits: tuple[float, float], budget: Budget) -> Row:
    """On a text. The increase is that of bits per byte, told per token of A's: the tokenizers may differ."""
    increase = math.expm1(min(99.0, math.log(perplexities[0]) * (bits[1] / bits[0] - 1)))
    told = f"A {perplexities[0]:.4g}, B {perplexities[1]:.4g} a token, {bits[0]:.4f} and {bits[1]:.4f} bits a byte"
    return Row(
        "perplexity", _within(increase, budget.perplexity), f"{told}: {increase:+.2%}{_most(budget.perplexity, '%')}"
    )


def _within(value: float, limit: float | None) -> bool | None:
    """NaN is within nothing."""
    return None if limit is None else value <= limit


def _most(limit: float | None, unit: str = "") -> str:
    return "" if limit is None else f" (at most {limit * (100 if unit else 1):g}{unit})"
