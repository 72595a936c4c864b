"""Many requests written at once over one cache: add, schedule, run, postprocess. Ids only.

A step is one forward over a flat row of tokens: the next token of every text that is being written, and as much of the
prompts that wait as fits beside them (Orca, Yu et al. 2022; chunked prefill, Agrawal et al. 2023). What a request gets
does not depend on the others: `generate` is the oracle. So it is to the id in fp32 and fp64; in bf16 up to rounding,
for other kernels take over with more rows, and where two ids are nearly as likely they may choose the other.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from logging import DEBUG, INFO
from pathlib import Path

import torch
from torch import Tensor

from puna.device import memory
from puna.errors import ResourceError, UsageError
from puna.infer.adapters import Adapters
from puna.infer.cache.paged_cache import PagedCache
from puna.infer.forward import Row, forward
from puna.infer.graphs import DecodeGraphs
from puna.infer.request import Event, FinishReason, Likelihood, Request, Result, TokenLogprob
from puna.infer.sample import Sample, choose
from puna.infer.sampling import Sampling
from puna.infer.scheduler import Chunk, Scheduler
from puna.infer.scoring import logprobs, score_prompts
from puna.infer.speculation.speculate import Proposer, Speculation
from puna.infer.stopping import Decode
from puna.infer.weights import WeightWatch
from puna.log import log
from puna.model.transformer import Transformer
from puna.ops.paged_attention import BLOCK

_CACHE_BYTES = 2**30  # unless one whole context takes more, and there is twice that


class Engine:
    """Continues and scores prompts with `model`, whose weights it uses where they are.

    Weights may be trained between steps: what the cache holds of older ones is not used for new requests.

    Args:
        decode: ids -> text, needed for stop strings only.
        tokens: what the cache holds; by default `batch` whole contexts in at most 1 GB, or one whole context in more,
            up to half of the memory (on CUDA: of what is free).
        batch: most texts written at a time.
        chunk: most tokens of a step, as long as every text gets one.
        adapters: LoRA directories by the names that requests ask for.
        speculate: guesses ids, which makes texts come sooner and changes none of them (in bf16: see above).
    """

    def __init__(
        self,
        model: Transformer,
        *,
        decode: Decode | None = None,
        tokens: int | None = None,
        batch: int = 32,
        chunk: int = 512,
        adapters: Mapping[str, str | Path] | None = None,
        speculate: Proposer | Speculation | None = None,
    ):
        self.model, self.decode = model, decode
        self.device = next(model.parameters()).device
        count = -(-(tokens or _default_tokens(model, batch, self.device)) // BLOCK)
        self.cache = PagedCache(model.config, count, model.compute_dtype, self.device)
        self.scheduler = Scheduler(self.cache, batch, chunk)
        self.graphs = DecodeGraphs(model, self.cache)
        self.added = 0
        """Requests taken in so far: the number of the next one."""
        self._open: dict[int, list[Sample]] = {}
        self._events: list[Event] = []
        self._weights, self._forgotten = WeightWatch(model), 0
        self.adapters = Adapters(model, adapters)
        self.speculation = Speculation(speculate) if isinstance(speculate, Proposer) else speculate

    def add(self, request: Request) -> int:
        """Take a request in; its number, which its events have.

        Raises:
            UsageError: a prompt that is empty, too long, or has ids outside the vocabulary; a bias of such an id; stop
                strings without `decode`. ResourceError: the cache could not hold it even alone.
        """
        self._check(request)
        return self._take(request)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do or to tell."""
        return bool(self._open or self._events)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One forward, and what it did. Nothing to do: nothing.

        Whatever it raises ends all requests, as `failed` and with what they have; the next step tells so.

        Raises:
            NumericError: logits that are not numbers.
        """
        try:
            if chunks := self._schedule():
                if self.speculation is not None:
                    chunks = self.speculation.extend(chunks, self.cache)
                self._postprocess(chunks, self._run(chunks))
                if self.speculation is not None:
                    self.speculation.learn(chunks)
        except BaseException:  # what the cache believes it holds may never have been computed
            self._abandon()
            raise
        events, self._events = self._events, []
        return events

    def cancel(self, number: int) -> None:
        """End a request with what it has. Its last event comes with the next step; a finished one is left alone."""
        self._end(number, "cancelled")

    def run(
        self,
        requests: Sequence[Request],
        on_event: Callable[[Event], None] | None = None,
        *,
        speculate: Speculation | None = None,
    ) -> list[Result]:
        """The results of these requests, in their order. What was added before goes on beside them; its events come
        with the next step after.

        Args:
            on_event: called with what each step did for them; it may cancel. The first has the number `added` was.
            speculate: guesses ids until they are done, instead of the engine's own.

        Raises:
            UsageError, ResourceError: see `add`; none of them is begun then.
        """
        for request in requests:
            self._check(request)
        ours, others, own = range(self.added, self.added + len(requests)), list[Event](), self.speculation
        self._guess_by(speculate or own)
        try:
            for request in requests:
                self._take(request)
            return self._finished(ours, others, on_event)
        except BaseException:  # Ctrl-C above all: the engine stays usable
            for number in ours:
                self.cancel(number)
            self._events = [event for event in self._events if event.request not in ours]
            raise
        finally:
            self._events[:0] = others
            self._guess_by(own)

    def score(
        self, rows: Sequence[tuple[Sequence[int], Sequence[int]]], *, adapter: str | None = None
    ) -> list[Likelihood]:
        """log p(continuation | context) of each (context ids, continuation ids); what rows share is computed once."""
        # Sorted, texts with a common beginning follow each other while it is in the cache.
        order = sorted(range(len(rows)), key=lambda i: [*rows[i][0], *rows[i][1]])
        nothing = Sampling(max_tokens=0)
        asked = [Request([*rows[i][0], *rows[i][1]], nothing, adapter, score_from=len(rows[i][0])) for i in order]
        found = dict(zip(order, self.run(asked), strict=True))
        return [_likelihood(found[i]) for i in range(len(rows))]

    def forget(self) -> None:
        """Do not use what is cached for new requests. Needed only after weights changed unseen (through `.data`)."""
        self._forgotten += 1
        for each in self._samples():
            each.first_key = self._first_key(each.request)
        self.cache.blocks.forget()
        self.graphs.forget()

    def add_adapter(self, name: str, folder: str | Path) -> None:
        """Read a LoRA directory that requests may ask for by this name; it replaces one of the same name.

        Raises:
            CheckpointError: it does not fit the model. UsageError: requests are being written with one of this name.
        """
        self._refuse_open(name)
        self.adapters.add(name, folder)

    def remove_adapter(self, name: str) -> None:
        """Give an adapter's memory back.

        Raises:
            UsageError: there is none of this name, or requests are being written with it.
        """
        self._refuse_open(name)
        self.adapters.remove(name)

    def release(self) -> None:
        """Give the cache's memory back, until it is needed again.

        Raises:
            UsageError: requests are still being written.
        """
        if self._open:
            raise UsageError("the engine is still writing", fix="finish or cancel its requests first")
        self.cache.release()
        if self.speculation is not None:
            self.speculation.proposer.release()
        self.graphs.release()

    def _take(self, request: Request) -> int:
        number, self.added = self.added, self.added + 1
        limit = self.model.config.max_seq_len
        key = self._first_key(request)
        self._open[number] = [Sample(number, i, request, limit, self.decode, key) for i in range(request.sampling.n)]
        for each in list(self._open[number]):
            if each.goal:
                self.scheduler.waiting.append(each)
            else:  # nothing to write, nothing to score
                self._finish(each, "length")
        return number

    def _finished(self, ours: range, others: list[Event], on_event: Callable[[Event], None] | None) -> list[Result]:
        """Step until these are done. The events of all others are put aside."""
        results: dict[int, Result] = {}
        while len(results) < len(ours):
            events = self.step()
            others += [event for event in events if event.request not in ours]
            for event in events:
                if event.request in ours:
                    if event.result is not None:
                        results[event.request] = event.result
                    if on_event is not None:
                        on_event(event)
        return [results[number] for number in ours]

    def _guess_by(self, speculation: Speculation | None) -> None:
        if self.speculation is not None and self.speculation is not speculation:
            for each in self._samples():
                self.speculation.proposer.end(each)
        self.speculation = speculation

    def _first_key(self, request: Request) -> bytes:
        return f"{self._forgotten} {self.adapters.key(request.adapter)}".encode()

    def _samples(self) -> list[Sample]:
        return [each for samples in self._open.values() for each in samples]

    def _schedule(self) -> list[Chunk]:
        if self.scheduler.waiting and self._weights.changed():
            self.forget()
        return sorted(self.scheduler.plan(), key=lambda chunk: self.adapters.key(chunk.sample.request.adapter))

    def _run(self, chunks: list[Chunk]) -> Tensor:
        """The final hidden states of the chunks' tokens: (N, dim)."""
        rows = [Row(chunk.ids, chunk.start, chunk.sample.text.table) for chunk in chunks]
        adapters = [(chunk.sample.request.adapter, len(chunk.ids)) for chunk in chunks]
        if not any(name for name, _ in adapters) and (replayed := self.graphs.run(rows)) is not None:
            return replayed
        with self.adapters.on(adapters):
            return forward(self.model, self.cache, rows)

    def _postprocess(self, chunks: list[Chunk], hidden: Tensor) -> None:
        """Score prompts, and choose the next ids of every sample whose ids are all computed."""
        score_prompts(chunks, hidden, self.model.lm_head, self.model.config.vocab_size)
        first, written, rows = 0, list[Chunk](), list[int]()
        for chunk in chunks:
            each, start, length, guess = chunk
            first += length + len(guess)
            if start + length == len(each.text.ids):
                written.append(chunk)
                rows += range(first - len(guess) - 1, first)
            elif start + length == each.goal:
                self._finish(each, "length")
        if written:
            self._extend(written, self.model.lm_head(hidden[rows]))
        self.cache.blocks.computed()

    def _extend(self, written: list[Chunk], logits: Tensor) -> None:
        """Choose what each sample goes on with, for every guess as if those before it were right: logits (B, V)."""
        places = [(each, guess[:n]) for each, _, _, guess in written for n in range(len(guess) + 1)]
        chosen = choose(logits, places)
        told = iter(logprobs(logits, chosen, [each.request.sampling.logprobs for each, _ in places]))
        ids = iter(chosen.tolist())
        for each, _, _, guess in written:
            count = len(guess) + 1
            self._accept(each, guess, list(islice(ids, count)), list(islice(told, count)))

    def _accept(self, each: Sample, guess: Sequence[int], ids: list[int], told: list[TokenLogprob | None]) -> None:
        """Add ids as long as those before them were guessed right."""
        right = next((n for n, (a, b) in enumerate(zip(guess, ids, strict=False)) if a != b), len(guess))
        reason: FinishReason | None = None
        for token, logprob in zip(ids[: right + 1], told, strict=False):
            if reason := each.accept(token, logprob):
                break
        self.cache.plan(each.text, min(right, len(each.text.ids) - 1 - each.text.stored))  # already computed
        if reason:
            self._finish(each, reason)
        elif new := each.news():
            self._events.append(Event(each.number, each.index, new))

    def _refuse_open(self, adapter: str) -> None:
        if any(samples[0].request.adapter == adapter for samples in self._open.values()):
            raise UsageError(f"requests are being written with `{adapter}`", fix="finish or cancel them first")

    def _finish(self, each: Sample, reason: FinishReason) -> None:
        self._drop(each)
        each.finished = reason
        new, samples = each.news(), self._open[each.number]
        result = _result(samples) if all(s.finished for s in samples) else None
        if result is not None:
            del self._open[each.number]
        if new or result is not None:
            self._events.append(Event(each.number, each.index, new, result))

    def _end(self, number: int, reason: FinishReason) -> None:
        for each in self._open.get(number, []):
            if each.finished is None:
                self._finish(each, reason)

    def _drop(self, each: Sample) -> None:
        self.scheduler.remove(each)
        if self.speculation is not None:
            self.speculation.proposer.end(each)

    def _abandon(self) -> None:
        """Drop every request and whatever the cache may hold of them."""
        for number in list(self._open):
            self._end(number, "failed")
        self._open.clear()  # Ctrl-C may come between the end of a request and its event
        self.forget()

    def _check(self, request: Request) -> None:
        length, limit = len(request.prompt), self.model.config.max_seq_len
        vocab_size = self.model.config.vocab_size
        if not length:
            raise UsageError("an empty prompt has nothing to continue", fix="at least one token, BOS will do")
        for where, ids in (("a prompt", request.prompt), ("a logit_bias", request.sampling.logit_bias)):
            if any(not hasattr(kind, "__index__") for kind in {*map(type, ids)}):
                raise UsageError(f"{where} has an id that is no whole number", fix="int")
            if any(not 0 <= token < vocab_size for token in ids):
                raise UsageError(f"{where} has an id outside 0..{vocab_size - 1}", cause="ids of another tokenizer")
        # an answer needs room for one id; of what is only scored, the last id is predicted and never read
        if length + (1 if request.sampling.max_tokens else -1) > limit:
            raise UsageError(f"the prompt has {length} tokens, the context holds {limit}", fix="a shorter prompt")
        if request.score_from is not None and not 1 <= request.score_from <= length:
            raise UsageError(f"score_from={request.score_from}: nothing predicts the first id", fix=f"1..{length}")
        self.adapters.check(request.adapter)
        if request.sampling.stop and self.decode is None:
            raise UsageError("stop strings need text, the engine has ids", fix="Engine(model, decode=tokenizer.decode)")
        held, needed = self.cache.blocks.count * BLOCK, min(limit, length + request.sampling.max_tokens)
        if needed > held:
            raise ResourceError(f"a request of {needed} tokens, the cache holds {held}", fix="Engine(tokens=...)")


def _default_tokens(model: Transformer, batch: int, device: torch.device) -> int:
    """What `batch` contexts take, in at most _CACHE_BYTES; one whole context if half of the memory holds it."""
    config = model.config
    size = 2 * config.n_layers * config.n_kv_heads * config.head_dim * model.compute_dtype.itemsize  # bytes a token
    room = max(_CACHE_BYTES, min(config.max_seq_len * size, _memory(device) // 2))
    count = min(batch * config.max_seq_len, room // size)
    cut = count < config.max_seq_len
    told = f"less than a context of {config.max_seq_len:,}: Engine(tokens=...)" if cut else f"{batch} texts at a time"
    log.log(INFO if cut else DEBUG, "cache: %s tokens in %.1f GB (%s)", f"{count:,}", count * size / 2**30, told)
    return count


def _memory(device: torch.device) -> int:
    """Bytes. All there is on a CPU, where a cache takes only what it uses."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    known = memory()
    return known.limit or known.total


def _result(samples: list[Sample]) -> Result:
    first, completions = samples[0], tuple(each.completion() for each in samples)
    if first.request.score_from is None:
        return Result(completions)
    return Result(completions, tuple(first.prompt_logprobs), first.prompt_greedy)


def _likelihood(result: Result) -> Likelihood:
    assert result.prompt_logprobs is not None
    assert result.prompt_greedy is not None
    return Likelihood(sum(result.prompt_logprobs), result.prompt_greedy, result.prompt_logprobs)
