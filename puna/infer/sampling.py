"""From logits to the next ids: a row each, every row by its own parameters."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from puna.errors import NumericError, UsageError

_GREEDY = 1e-4  # dividing by less overflows
_LARGE = 1e30  # of penalties and biases: any number of them stays finite in fp32
_FEW = 2048  # ids that a nucleus seldom exceeds; sorting all of a vocabulary takes eight times as long


@dataclass(frozen=True)
class Sampling:
    """How a request is continued. Filters apply in the order of the fields; the defaults do nothing."""

    max_tokens: int = 256
    """Most ids to add; 0 only reads the prompt."""
    temperature: float = 0.0
    """Divides the logits; 0 always takes the most likely id."""
    top_k: int = 0
    """Keep this many of the most likely ids; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most likely ids up to and including the one that crosses this probability (Llama 2's rule)."""
    min_p: float = 0.0
    """Drop ids less likely than this part of the most likely one (Nguyen et al. 2024)."""
    repetition_penalty: float = 1.0
    """Divides positive logits of ids in prompt and answer, multiplies negative ones (CTRL, Keskar et al. 2019)."""
    presence_penalty: float = 0.0
    """Taken from the logit of every id the answer has (OpenAI)."""
    frequency_penalty: float = 0.0
    """The same, once for each time the answer has it."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these ids."""
    seed: int = 0
    """Same seed and prompt, same answer, whoever else is served (in bf16 up to rounding). Sample i of n has the seed
    `seed + i`."""
    n: int = 1
    """Samples of the prompt."""
    stop_ids: Sequence[int] = ()
    """Ids that end an answer; the one that did is its last id."""
    stop: Sequence[str] = ()
    """Strings that end an answer and are cut out of it; the engine needs `decode` for them."""
    logprobs: int | None = None
    """0: log-probabilities of the chosen ids; k: also of the k most likely ones. Of the model, before all the above."""

    def __post_init__(self) -> None:
        """
        Raises:
            UsageError: a value outside its range.
        """
        numbers = [self.max_tokens, self.top_k, self.seed, self.n, self.logprobs or 0]
        if not all(hasattr(number, "__index__") for number in numbers):
            raise UsageError("max_tokens, top_k, seed, n and logprobs are whole numbers", fix="int")
        right = {
            "max_tokens": self.max_tokens >= 0, "temperature": self.temperature >= 0, "top_k": 0 <= self.top_k < 2**63,
            "top_p": 0 <= self.top_p <= 1, "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": 1 / _LARGE <= self.repetition_penalty <= _LARGE, "n": self.n >= 1,
            "presence_penalty": abs(self.presence_penalty) <= _LARGE,
            "frequency_penalty": abs(self.frequency_penalty) <= _LARGE,
            "logit_bias": all(abs(bias) <= _LARGE for bias in self.logit_bias.values()),
            "seed": -(2**63) <= self.seed <= 2**64 - self.n,
            "logprobs": self.logprobs is None or self.logprobs >= 0, "stop": all(self.stop),
        }  # fmt: skip
        if wrong := [f"{name}={getattr(self, name)!r}" for name, fits in right.items() if not fits]:
            fix = "temperature, top_k >= 0; top_p, min_p in 0..1; repetition_penalty > 0; n >= 1; no empty stop string"
            raise UsageError(f"{' and '.join(wrong)} cannot be", fix=f"{fix}; penalties, biases, seed: no infinity")

    @property
    def changes_logits(self) -> bool:
        """Whether the logits it draws from are others than the model's."""
        penalties = self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1
        return any(penalties) or bool(self.logit_bias)


@dataclass(frozen=True)
class Filters:
    """The parameters of B rows as columns (B, 1); None where no row has any use for one."""

    greedy: Tensor | None
    """Rows that take the most likely id; None: all of them."""
    temperature: Tensor
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None

    @classmethod
    def of(cls, rows: Sequence[Sampling], device: torch.device) -> "Filters":
        def column(values: Iterable[float]) -> Tensor:
            return torch.tensor(list(values), device=device)[:, None]

        greedy = [row.temperature < _GREEDY for row in rows]
        drawn = [row for row in rows if row.temperature >= _GREEDY]
        return cls(
            None if all(greedy) else column(greedy),
            column(1.0 if cold else row.temperature for row, cold in zip(rows, greedy, strict=True)),
            column(row.top_k for row in rows) if any(row.top_k for row in drawn) else None,
            column(row.top_p for row in rows) if any(row.top_p < 1 for row in drawn) else None,
            column(row.min_p for row in rows) if any(row.min_p for row in drawn) else None,
        )


def sample(logits: Tensor, filters: Filters, drawn: Sequence[float]) -> Tensor:
    """One id a row: (B, V) -> (B,) int64.

    Args:
        drawn: a number in 0..1 for each row, which alone decides what a row that is not greedy takes.

    Raises:
        NumericError: a row with NaN, with infinity, or with nothing above minus infinity.
    """
    most, best = logits.max(-1)
    if not most.isfinite().all():
        row = most.isfinite().tolist().index(False)
        cause = "weights or an adapter with NaN, or a type too small for them"
        raise NumericError(f"the largest logit of text {row} of {len(logits)} is {float(most[row])}", cause=cause)
    if filters.greedy is None:
        return best
    # By the inverse of the distribution function: multinomial draws a random number for every id of the vocabulary.
    total = probabilities(logits, filters).cumsum(-1)
    aim = torch.tensor(drawn, device=logits.device)[:, None] * total[:, -1:]
    below = aim.minimum(total[:, -1:] * (1 - 2**-23))  # rounding must not reach past the last id
    return torch.where(filters.greedy[:, 0], best, torch.searchsorted(total, below, right=True)[:, 0])


def probabilities(logits: Tensor, filters: Filters) -> Tensor:
    """What is drawn from, up to a factor: (B, V) fp32, zero where a filter dropped an id. Equals are kept together."""
    p = (logits.float() / filters.temperature).softmax(-1)
    if filters.top_k is not None:
        count = torch.where(filters.top_k > 0, filters.top_k, p.shape[-1]).clamp(max=p.shape[-1])
        p = p * (p >= p.topk(int(count.max())).values.gather(-1, count - 1))
    if filters.top_p is not None:
        p = p * (p >= _nucleus(p, filters.top_p))
    if filters.min_p is not None:
        p = p * (p >= filters.min_p * p.amax(-1, keepdim=True))
    return p


def _nucleus(p: Tensor, top_p: Tensor) -> Tensor:
    """The least likely value that each row keeps: (B, 1), 0 where top_p is 1."""
    mass = torch.where(top_p < 1, top_p * p.sum(-1, keepdim=True), -1)
    ordered = p.topk(min(_FEW, p.shape[-1])).values
    if bool((ordered.cumsum(-1)[:, -1:] <= mass).any()):
        ordered = p.sort(descending=True).values
    kept = ordered.cumsum(-1) - ordered <= mass
    least = ordered.gather(-1, kept.sum(-1, keepdim=True).clamp(min=1) - 1)
    return torch.where(top_p < 1, least, 0)


def penalized(logits: Tensor, rows: Sequence[tuple[Sampling, Sequence[int], Sequence[int]]]) -> Tensor:
    """Logits (B, V) with the biases and penalties of each row (its parameters, its prompt, its answer so far)."""
    logits = logits.float().clone()
    for row, (sampling, prompt, answer) in zip(logits, rows, strict=True):
        if sampling.repetition_penalty != 1:
            seen = torch.tensor([*{*prompt, *answer}], device=row.device)
            row[seen] *= torch.where(row[seen] > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty)
        if sampling.presence_penalty or sampling.frequency_penalty:
            counts = Counter(answer)
            ids, often = (torch.tensor([*x], device=row.device, dtype=torch.long) for x in (counts, counts.values()))
            row[ids] -= sampling.presence_penalty + sampling.frequency_penalty * often
        if sampling.logit_bias:
            bias = torch.tensor([*sampling.logit_bias.values()], device=row.device)
            row[torch.tensor([*sampling.logit_bias], device=row.device)] += bias
    return logits
