"""Many requests written at once over one cache: add, schedule, run, postprocess. Ids only.

A step is one forward over a flat row of tokens: the next token of every text that is being written, and as much of the
prompts that wait as fits beside them (Orca, Yu et al. 2022; chunked prefill, Agrawal et al. 2023). What a request gets
does not depend on the others: `generate` is the oracle.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import ref

import torch
from torch import Tensor

from puna.errors import ResourceError, UsageError
from puna.infer.paged_cache import PagedCache
from puna.infer.request import Event, FinishReason, Likelihood, Request, Result, Sampling, TokenLogprob
from puna.infer.sample import Sample
from puna.infer.sampling import Filters, penalized, sample
from puna.infer.stopping import Decode
from puna.model.mode import evaluating
from puna.model.transformer import Transformer
from puna.ops.paged_attention import BLOCK, Piece

_CACHE_BYTES = 2**30  # unless one whole context takes more
_LOGITS = 2**23  # values of logits that scoring holds at a time


class Chunk(NamedTuple):
    """The ids start .. start + length - 1 of a sample, computed by this step."""

    sample: Sample
    start: int
    length: int


class Engine:
    """Continues and scores prompts with `model`, whose weights it uses where they are.

    Weights may be trained between steps: what the cache holds of older ones is not used for new requests.

    Args:
        decode: ids -> text, needed for stop strings only.
        tokens: what the cache holds; by default `batch` whole contexts, in at most 1 GB.
        batch: most texts written at a time.
        chunk: most tokens of a step, as long as every text gets one.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        decode: Decode | None = None,
        tokens: int | None = None,
        batch: int = 32,
        chunk: int = 512,
    ):
        self.model, self.decode, self.batch, self.chunk = model, decode, batch, chunk
        self.device = next(model.parameters()).device
        config = model.config
        size = 2 * config.n_layers * config.n_kv_heads * config.head_dim * model.compute_dtype.itemsize
        whole = config.max_seq_len
        tokens = tokens or max(whole, min(batch * whole, _CACHE_BYTES // size))
        self.cache = PagedCache(config, -(-tokens // BLOCK), model.compute_dtype, self.device)
        self._waiting: deque[Sample] = deque()
        self._running: list[Sample] = []
        self._open: dict[int, list[Sample]] = {}
        self._events: list[Event] = []
        self._added = 0
        self._weights, self._changes = _versions(model), 0

    # what users call

    def add(self, request: Request) -> int:
        """Take a request in; its number, which its events have.

        Raises:
            UsageError: a prompt that is empty, too long, or has ids outside the vocabulary; stop strings without
                `decode`. ResourceError: the cache could not hold it even alone.
        """
        self._check(request)
        number, sampling = self._added, request.sampling
        self._added += 1
        limit = self.model.config.max_seq_len
        samples = [Sample(number, index, request, limit, self.decode) for index in range(sampling.n)]
        self._open[number] = samples
        for each in samples:
            if each.goal:
                self._waiting.append(each)
            else:
                self._finish(each, "length")
        return number

    @property
    def busy(self) -> bool:
        """Whether there is anything to do or to tell."""
        return bool(self._open or self._events)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One forward, and what it did. Nothing to do: nothing."""
        chunks = self._schedule()
        if chunks:
            try:
                self._postprocess(chunks, self._run(chunks))
            except BaseException:  # what the cache believes it holds may never have been computed
                self._abandon()
                raise
        events, self._events = self._events, []
        return events

    def cancel(self, number: int) -> None:
        """End a request with what it has. Its last event comes with the next step; a finished one is left alone."""
        for each in self._open.get(number, []):
            if each.finished is None:
                self._finish(each, "cancelled")

    def run(self, requests: Sequence[Request], on_event: Callable[[Event], None] | None = None) -> list[Result]:
        """The results of these requests, in their order.

        Args:
            on_event: called with what each step did; it may cancel.
        """
        numbers = [self.add(request) for request in requests]
        results: dict[int, Result] = {}
        try:
            while len(results) < len(numbers):
                for event in self.step():
                    if event.result is not None:
                        results[event.request] = event.result
                    if on_event is not None:
                        on_event(event)
        except BaseException:  # Ctrl-C above all: the engine stays usable
            self._abandon()
            raise
        return [results[number] for number in numbers]

    def score(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Likelihood]:
        """log p(continuation | context) of each (context ids, continuation ids); what rows share is computed once."""
        nothing = Sampling(max_tokens=0)
        # Sorted, texts with a common beginning follow each other, and it is still in the cache.
        order = sorted(range(len(rows)), key=lambda i: [*rows[i][0], *rows[i][1]])
        asked = [Request([*rows[i][0], *rows[i][1]], nothing, score_from=len(rows[i][0])) for i in order]
        found = dict(zip(order, self.run(asked), strict=True))
        return [_likelihood(found[i]) for i in range(len(rows))]

    def forget(self) -> None:
        """Do not use what is cached for new requests. Needed only after weights changed unseen (through `.data`)."""
        self._changes += 1
        self.cache.blocks.forget()

    def release(self) -> None:
        """Give the cache's memory back, until it is needed again.

        Raises:
            UsageError: requests are still being written.
        """
        if self._open:
            raise UsageError("the engine is still writing", fix="finish or cancel its requests first")
        self.cache.release()

    # schedule

    def _schedule(self) -> list[Chunk]:
        """What this step computes: texts being written get their token first, prompts what is left."""
        budget = max(self.chunk, len(self._running))
        share: dict[Sample, int] = {}
        for each in sorted(self._running, key=lambda s: s.goal - s.text.stored > 1):  # stable: the oldest first
            self.cache.take_shared(each.text, each.reusable)
            share[each] = min(each.goal - each.text.stored, budget)
            budget -= share[each]
        chunks = []
        for each in list(self._running):  # in order of age: those who lose their blocks come last, with nothing planned
            if each in self._running and share[each] and self._make_room(each, share[each]):
                chunks.append(self._plan(each, share[each]))
        return chunks + self._admit(budget)

    def _make_room(self, each: Sample, count: int) -> bool:
        """Blocks for the next `count` ids, if need be those of the youngest, who will be computed again."""
        while not self.cache.reserve(each.text, count):
            youngest = self._running.pop()
            self.cache.end(youngest.text)
            self._waiting.appendleft(youngest)
            if youngest is each:
                return False
        return True

    def _admit(self, budget: int) -> list[Chunk]:
        chunks, later = [], []
        if self._waiting and budget > 0:
            self._notice_new_weights()
        while self._waiting and budget > 0 and len(self._running) < self.batch:
            each = self._waiting.popleft()
            if not self.cache.begin(each.text, self._first_key(each), each.reusable):
                later.append(each)  # another one computes its beginning now
                continue
            count = min(each.goal - each.text.stored, budget)
            if not self.cache.reserve(each.text, count, spare=len(self._running)):
                self.cache.end(each.text)
                later.append(each)
                break
            self._running.append(each)
            chunks.append(self._plan(each, count))
            budget -= count
        self._waiting.extendleft(reversed(later))
        return chunks

    def _plan(self, each: Sample, count: int) -> Chunk:
        start = each.text.stored
        self.cache.plan(each.text, count)
        return Chunk(each, start, count)

    def _first_key(self, each: Sample) -> bytes:
        return f"{self._changes} {each.request.adapter}".encode()

    def _notice_new_weights(self) -> None:
        if not _same_versions(self.model, self._weights):
            self._weights = _versions(self.model)
            self.forget()

    # run

    def _run(self, chunks: list[Chunk]) -> Tensor:
        """The final hidden states of the chunks' tokens: (N, dim)."""
        ids = [i for s, start, length in chunks for i in s.text.ids[start : start + length]]
        positions = [p for _, start, length in chunks for p in range(start, start + length)]
        tokens, places = torch.tensor([[ids], [positions]], device=self.device)
        cache = self.cache.step([Piece(start, length, s.text.table) for s, start, length in chunks])
        with evaluating(self.model):
            hidden = self.model(tokens, positions=places, cache=cache, head=False)[0]
        self.cache.blocks.computed()
        return hidden

    # postprocess

    def _postprocess(self, chunks: list[Chunk], hidden: Tensor) -> None:
        self._score(chunks, hidden)
        first, written, rows = 0, list[Sample](), list[int]()
        for each, start, length in chunks:
            first += length
            if start + length == len(each.text.ids):
                written.append(each)
                rows.append(first - 1)
            elif start + length == each.goal:
                self._finish(each, "length")
        if written:
            self._extend(written, self.model.lm_head(hidden[rows]))

    def _extend(self, samples: list[Sample], logits: Tensor) -> None:
        """Choose the next id of each sample: logits (B, V)."""
        asked = [each.request.sampling for each in samples]
        changed = penalized(logits, [(each.request.sampling, each.request.prompt, each.answer) for each in samples])
        filters = Filters.of(asked, logits.device)
        drawn = [float(torch.rand(1, generator=s.random)) if s.request.sampling.temperature else 0.0 for s in samples]
        chosen = sample(changed, filters, drawn)
        told = _logprobs(logits, chosen, [sampling.logprobs for sampling in asked])
        for each, token, logprob in zip(samples, chosen.tolist(), told, strict=True):
            new = each.accept(token, logprob)
            if each.finished:
                self._finish(each, each.finished, new)
            elif new:
                self._events.append(Event(each.number, each.index, new))

    def _score(self, chunks: list[Chunk], hidden: Tensor) -> None:
        """Give each sample the log-probabilities of the prompt ids that this step's tokens predict."""
        first, rows, targets, owners = 0, list[int](), list[int](), list[Sample]()
        for each, start, length in chunks:
            places = range(max(start, each.scored.start), min(start + length, each.scored.stop))
            rows += [first + p - start for p in places]
            targets += [each.text.ids[p + 1] for p in places]
            owners += [each] * len(places)
            first += length
        size = max(1, _LOGITS // self.model.config.vocab_size)
        for at in range(0, len(rows), size):
            logits = self.model.lm_head(hidden[rows[at : at + size]]).float()
            wanted = torch.tensor(targets[at : at + size], device=logits.device)[:, None]
            logp = (logits.gather(-1, wanted) - logits.logsumexp(-1, keepdim=True))[:, 0].tolist()
            best = (logits.argmax(-1) == wanted[:, 0]).tolist()
            for each, p, is_best in zip(owners[at : at + size], logp, best, strict=True):
                each.prompt_logprobs.append(p)
                each.prompt_greedy &= is_best

    def _finish(self, each: Sample, reason: FinishReason, new: tuple[int, ...] = ()) -> None:
        each.finished = reason
        if each in self._running:
            self._running.remove(each)
        if each in self._waiting:
            self._waiting.remove(each)
        self.cache.end(each.text)
        samples = self._open[each.number]
        result = _result(samples) if all(s.finished for s in samples) else None
        if result is not None:
            del self._open[each.number]
        if new or result is not None:
            self._events.append(Event(each.number, each.index, new, result))

    def _abandon(self) -> None:
        """Drop every request and whatever the cache may hold of them."""
        for samples in self._open.values():
            for each in samples:
                self.cache.end(each.text)
        self._open.clear()
        self._waiting.clear()
        self._running.clear()
        self._events.clear()
        self.forget()

    def _check(self, request: Request) -> None:
        sampling, length, limit = request.sampling, len(request.prompt), self.model.config.max_seq_len
        if not length:
            raise UsageError(
                "an empty prompt has nothing to continue", fix="a prompt of at least one token, BOS will do"
            )
        vocab_size = self.model.config.vocab_size
        if any(not 0 <= token < vocab_size for token in request.prompt):
            raise UsageError(f"a prompt has an id outside 0..{vocab_size - 1}", cause="ids of another tokenizer")
        if length + (sampling.max_tokens > 0) > limit:
            raise UsageError(f"the prompt has {length} tokens, the context holds {limit}", fix="a shorter prompt")
        if request.score_from is not None and not 1 <= request.score_from <= length:
            raise UsageError(f"score_from={request.score_from}: nothing predicts the first id", fix=f"1..{length}")
        if sampling.stop and self.decode is None:
            raise UsageError("stop strings need text, the engine has ids", fix="Engine(model, decode=tokenizer.decode)")
        needed = -(-min(limit, length + sampling.max_tokens) // BLOCK)
        if needed > self.cache.blocks.count:
            held = self.cache.blocks.count * BLOCK
            raise ResourceError(f"the cache holds {held} tokens, the request may need {needed * BLOCK}",
                                fix="Engine(tokens=...) or fewer max_tokens")  # fmt: skip


def _result(samples: list[Sample]) -> Result:
    first = samples[0]
    scored = first.request.score_from is not None
    return Result(
        tuple(each.completion() for each in samples),
        tuple(first.prompt_logprobs) if scored else None,
        first.prompt_greedy if scored else None,
    )


def _likelihood(result: Result) -> Likelihood:
    assert result.prompt_logprobs is not None
    assert result.prompt_greedy is not None
    return Likelihood(sum(result.prompt_logprobs), result.prompt_greedy, result.prompt_logprobs)


def _logprobs(logits: Tensor, chosen: Tensor, counts: list[int | None]) -> list[TokenLogprob | None]:
    """What each row asked for: None, or the chosen id and that many of the most likely ones."""
    rows = [row for row, count in enumerate(counts) if count is not None]
    told: list[TokenLogprob | None] = [None] * len(counts)
    if rows:
        logp = logits[rows].float().log_softmax(-1)
        taken = logp.gather(-1, chosen[rows][:, None])[:, 0].tolist()
        best = logp.topk(min(max(counts[row] or 0 for row in rows), logp.shape[-1]))
        for row, p, ids, values in zip(rows, taken, best.indices.tolist(), best.values.tolist(), strict=True):
            told[row] = TokenLogprob(p, tuple(zip(ids, values, strict=True))[: counts[row]])
    return told


def _versions(model: torch.nn.Module) -> list[tuple[ref[Tensor], int]]:
    """Every weight and how often it was written to. Weak: an engine does not keep weights that a model dropped."""
    return [(ref(p), 0 if p.is_inference() else p._version) for p in model.parameters()]


def _same_versions(model: torch.nn.Module, seen: list[tuple[ref[Tensor], int]]) -> bool:
    now = list(model.parameters())
    same = zip(now, seen, strict=False)
    return len(now) == len(seen) and all(
        r() is p and v == (0 if p.is_inference() else p._version) for p, (r, v) in same
    )
