"""What the engine is asked and what it answers: ids, numbers and reasons; never text, files or models."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from puna.infer.sampling import Sampling

FinishReason = Literal["stop", "length", "cancelled", "failed"]


@dataclass(frozen=True)
class Request:
    """A prompt to continue, to score, or both."""

    prompt: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    adapter: str | None = None
    """Which of the engine's adapters it is computed with."""
    score_from: int | None = None
    """Also give log p(prompt[i] | prompt[:i]) for every i from here on; at least 1."""


class TokenLogprob(NamedTuple):
    """Natural log-probabilities at one place of an answer."""

    chosen: float
    top: tuple[tuple[int, float], ...] = ()
    """(id, log-probability), most likely first."""


@dataclass(frozen=True)
class Completion:
    """One sample of an answer."""

    token_ids: tuple[int, ...]
    """A stop id is the last one; of a stop string only the ids that end before it are here."""
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: FinishReason
    text: str | None = None
    """Only with stop strings: the text before one, which may begin inside an id."""


@dataclass(frozen=True)
class Result:
    """All samples of a request, and its prompt's scores."""

    completions: tuple[Completion, ...]
    prompt_logprobs: tuple[float, ...] | None = None
    """From `score_from` on."""
    prompt_greedy: bool | None = None
    """Whether each of these ids was the most likely one."""


class Likelihood(NamedTuple):
    """Of a continuation after its context, in nats."""

    total: float
    greedy: bool
    """Whether each id was the most likely one."""
    tokens: tuple[float, ...]


class Event(NamedTuple):
    """What a step did for a request."""

    request: int
    """The number `add` gave."""
    sample: int
    """Which of its n samples."""
    token_ids: tuple[int, ...]
    """Ids that are new and certain: what may be the beginning of a stop string is held back."""
    result: Result | None = None
    """The last event of a request has all of it."""
