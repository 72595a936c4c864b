"""One of the n samples of a request while it is being written."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from puna.infer.cache.paged_cache import CachedText
from puna.infer.request import Completion, FinishReason, Request, TokenLogprob
from puna.infer.sampling import Filters, Sampling, penalized, sample
from puna.infer.stopping import Decode, StopStrings


@dataclass(eq=False)
class Sample:
    """Sample `index` of request `number`."""

    number: int
    index: int
    request: Request
    limit: int
    """Most ids that prompt and answer have together."""
    decode: Decode | None
    first_key: bytes = b""
    """Of what its keys and values depend on besides ids."""
    text: CachedText = field(init=False)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_greedy: bool = True
    finished: FinishReason | None = None

    def __post_init__(self) -> None:
        sampling = self.request.sampling
        self.text = CachedText(list(self.request.prompt))
        self.random = torch.Generator().manual_seed(sampling.seed + self.index)
        self.stops = StopStrings(sampling.stop, self.decode) if sampling.stop and self.decode else None
        self._released = 0
        self._draws: list[float] = []

    @property
    def answer(self) -> list[int]:
        """The ids it added."""
        return self.text.ids[len(self.request.prompt) :]

    @property
    def scored(self) -> range:
        """Places of the prompt whose next id is scored."""
        begin = self.request.score_from
        if begin is None or self.index:
            return range(0)
        return range(begin - 1, len(self.request.prompt) - 1)

    @property
    def goal(self) -> int:
        """How many ids have to be computed before it is done, or can be continued."""
        if self.request.sampling.max_tokens:
            return len(self.text.ids)
        return self.scored.stop  # the last id of a prompt that is not continued predicts nothing that is asked for

    @property
    def unscored(self) -> range:
        """What of it has no score yet."""
        return self.scored[len(self.prompt_logprobs) :]

    @property
    def reusable(self) -> int:
        """How many ids need no computing if the cache has them: those whose output nobody asks for."""
        return min([self.goal - 1, *self.unscored[:1]])

    @property
    def room(self) -> int:
        """How many ids it can be given besides the next one."""
        return min(self.request.sampling.max_tokens - self._written, self.limit - len(self.text.ids)) - 1

    def draws(self, count: int) -> list[float]:
        """The numbers in 0..1 that decide its next ids: each id has its own, so no schedule or guess changes a text."""
        if not self.request.sampling.temperature:
            return [0.0] * count
        missing = count - len(self._draws)
        self._draws += [float(torch.rand(1, generator=self.random)) for _ in range(missing)]
        return self._draws[:count]

    def accept(self, token: int, logprob: TokenLogprob | None) -> FinishReason | None:
        """Add an id; why it is the last one, if it is."""
        sampling = self.request.sampling
        self.text.ids.append(token)
        del self._draws[:1]
        if logprob is not None:
            self.logprobs.append(logprob)
        if (self.stops is not None and self.stops.feed(self.answer)) or token in sampling.stop_ids:
            return "stop"
        full = self._written >= sampling.max_tokens or len(self.text.ids) >= self.limit
        return "length" if full else None

    def news(self) -> tuple[int, ...]:
        """The ids that have become certain since it was last asked: once it is finished, all that it keeps."""
        certain = self._written if self.stops is None else self.stops.certain
        if self.finished:
            certain = self._kept
        begin = len(self.request.prompt)
        new, self._released = self.text.ids[begin + self._released : begin + certain], max(self._released, certain)
        return tuple(new)

    def completion(self) -> Completion:
        """What became of it. It has to be finished."""
        assert self.finished is not None
        logprobs = None if self.request.sampling.logprobs is None else tuple(self.logprobs[: self._kept])
        text = None if self.stops is None else self.stops.text
        return Completion(tuple(self.answer[: self._kept]), logprobs, self.finished, text)

    @property
    def _written(self) -> int:
        return len(self.text.ids) - len(self.request.prompt)

    @property
    def _kept(self) -> int:
        return self.stops.certain if self.stops is not None and self.stops.found else self._written


def choose(logits: Tensor, places: Sequence[tuple[Sample, Sequence[int]]]) -> Tensor:
    """The id each sample goes on with after ids that are guessed to follow it: (B, V) -> (B,)."""
    asked = [each.request.sampling for each, _ in places]
    if any(sampling.changes_logits for sampling in asked):
        logits = penalized(logits, [_penalties(each, guess) for each, guess in places])
    drawn = [each.draws(len(guess) + 1)[-1] for each, guess in places]
    return sample(logits, Filters.of(asked, logits.device), drawn)


def _penalties(each: Sample, guess: Sequence[int]) -> tuple[Sampling, Sequence[int], Sequence[int]]:
    """A row of `penalized`; long texts are not copied for nothing."""
    sampling = each.request.sampling
    return (sampling, each.request.prompt, [*each.answer, *guess]) if sampling.changes_logits else (sampling, (), ())
