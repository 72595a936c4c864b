"""One of the n samples of a request while it is being written."""

from dataclasses import dataclass, field

import torch

from puna.infer.paged_cache import CachedText
from puna.infer.request import Completion, FinishReason, Request, TokenLogprob
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
    """Of what its keys and values depend on besides ids; set before it is scheduled."""
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

    def draw(self) -> float:
        """The number in 0..1 that decides its next id; one for each id, so that no schedule changes a text."""
        return float(torch.rand(1, generator=self.random)) if self.request.sampling.temperature else 0.0

    def accept(self, token: int, logprob: TokenLogprob | None) -> tuple[int, ...]:
        """Add an id; the ids that have become certain by it."""
        sampling = self.request.sampling
        self.text.ids.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        answer = self.answer
        if (self.stops is not None and self.stops.feed(answer)) or token in sampling.stop_ids:
            self.finished = "stop"
        elif len(answer) >= sampling.max_tokens or len(self.text.ids) >= self.limit:
            self.finished = "length"
        return self._release(answer)

    def completion(self) -> Completion:
        """What became of it. It has to be finished."""
        assert self.finished is not None
        kept = self._kept(len(self.answer))
        logprobs = None if self.request.sampling.logprobs is None else tuple(self.logprobs[:kept])
        text = None if self.stops is None else self.stops.text
        return Completion(tuple(self.answer[:kept]), logprobs, self.finished, text)

    def _release(self, answer: list[int]) -> tuple[int, ...]:
        certain = len(answer) if self.stops is None else self.stops.certain
        if self.finished:
            certain = self._kept(len(answer))
        new, self._released = answer[self._released : certain], max(self._released, certain)
        return tuple(new)

    def _kept(self, count: int) -> int:
        return self.stops.certain if self.stops is not None and self.stops.found else count
