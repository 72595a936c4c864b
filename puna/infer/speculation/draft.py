"""A model that guesses for another one (Leviathan et al. 2023): a smaller one, or its own copy in fewer bits."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import nn

from puna.errors import UsageError
from puna.infer.cache.paged_cache import CachedText, PagedCache
from puna.infer.forward import Row, forward
from puna.infer.sample import Sample, choose
from puna.infer.speculation.speculate import Proposer
from puna.model.transformer import Transformer
from puna.quant.quantize import quantize_model

_AT_ONCE = 32  # ids it may be behind and still guess: reading more takes a step of its own


@dataclass
class Drafted:
    """What a draft's own cache holds of a sample."""

    text: CachedText = field(default_factory=lambda: CachedText([]))
    known: int = 0
    """Length of the text when it was last guessed how it goes on,"""
    guess: list[int] = field(default_factory=list)
    """and how."""

    def keep(self, ids: Sequence[int]) -> None:
        """Count as stored only what the text became."""
        right = next((n for n, (a, b) in enumerate(zip(self.guess, ids[self.known :], strict=False)) if a != b), None)
        if right is not None:
            self.text.stored = min(self.text.stored, self.known + right)


class Draft(Proposer):
    """Any model with the ids of `target`, over a cache of its own.

    Args:
        chunk: most ids of a prompt that it reads in a step.

    Raises:
        UsageError: another number of ids than the target's.
    """

    def __init__(self, model: Transformer, target: Transformer, chunk: int = 512):
        ours, theirs = target.config.vocab_size, model.config.vocab_size
        if ours != theirs:
            raise UsageError(f"a draft of {theirs} ids cannot guess for a model of {ours}", cause="another tokenizer")
        self.model, self.chunk = model, chunk
        self._cache: PagedCache | None = None
        self._known: WeakKeyDictionary[Sample, Drafted] = WeakKeyDictionary()

    def propose(self, samples: Sequence[Sample], counts: Sequence[int], cache: PagedCache) -> list[list[int]]:
        """See `Proposer`. Nothing for texts that it has yet to read, which it does instead."""
        if self._cache is None:
            config, dtype = self.model.config, self.model.compute_dtype
            self._cache = PagedCache(config, cache.blocks.count, dtype, cache.device)
        asked = [s for s, n in zip(samples, counts, strict=True) if n and len(s.text.ids) + n <= self._limit]
        behind = [s for s in asked if self._behind(s) > _AT_ONCE]
        if behind:
            self._read(behind, self._cache)
            return [[] for _ in samples]
        ready = {s: n for s, n in zip(samples, counts, strict=True) if s in asked and self._reserve(s, n, self._cache)}
        rows = [Row(s.text.ids[d.text.stored :], d.text.stored, d.text.table) for s in ready for d in [self._known[s]]]
        guesses = dict(zip(ready, write(self.model, self._cache, list(ready), rows, list(ready.values())), strict=True))
        for sample, guess in guesses.items():
            drafted = self._known[sample]
            drafted.known, drafted.guess = len(sample.text.ids), guess
            drafted.text.stored = drafted.known + len(guess) - 1  # the last one was not put in
        return [guesses.get(sample, []) for sample in samples]

    def end(self, sample: Sample) -> None:
        """See `Proposer`."""
        drafted = self._known.pop(sample, None)
        if drafted is not None and self._cache is not None:
            self._cache.end(drafted.text)

    def release(self) -> None:
        """See `Proposer`."""
        self._cache = None
        self._known.clear()

    @property
    def _limit(self) -> int:
        return self.model.config.max_seq_len

    def _behind(self, sample: Sample) -> int:
        drafted = self._known.setdefault(sample, Drafted())
        drafted.keep(sample.text.ids)
        return len(sample.text.ids) - drafted.text.stored

    def _reserve(self, sample: Sample, count: int, cache: PagedCache) -> bool:
        return cache.reserve(self._known[sample].text, self._behind(sample) + count - 1)

    def _read(self, samples: list[Sample], cache: PagedCache) -> None:
        """The next ids of texts it is behind with."""
        budget, rows = self.chunk, list[Row]()
        for sample in samples:
            text, count = self._known[sample].text, min(budget, self._behind(sample) - 1)
            if count and cache.reserve(text, count):
                rows.append(Row(sample.text.ids[text.stored : text.stored + count], text.stored, text.table))
                text.stored, budget = text.stored + count, budget - count
        if rows:
            forward(self.model, cache, rows)


class SelfDraft(Proposer):
    """A copy of `target` in fewer bits, over the target's own cache: it has nothing to read, and no memory but weights.

    It attends to what the target stored, and what it stores itself the target overwrites when it looks at the guesses.

    Raises:
        UsageError: keys and values of another shape than the target's.
    """

    def __init__(self, model: Transformer, target: Transformer):
        ours, theirs = (_cached_shape(m) for m in (target, model))
        if ours != theirs:
            raise UsageError(f"a draft of {theirs} cannot use the cache of {ours}", fix="a copy of the model, or Draft")
        self.model = model

    def propose(self, samples: Sequence[Sample], counts: Sequence[int], cache: PagedCache) -> list[list[int]]:
        """See `Proposer`."""
        ready = {s: n for s, n in zip(samples, counts, strict=True) if n}
        rows = [Row(s.text.ids[-1:], len(s.text.ids) - 1, s.text.table) for s in ready]
        guesses = dict(zip(ready, write(self.model, cache, list(ready), rows, list(ready.values())), strict=True))
        return [guesses.get(sample, []) for sample in samples]


def packed_copy(model: Transformer, scheme: str = "int4") -> Transformer:
    """A copy in fewer bits; what is not packed (norms, the embedding) is the model's own memory.

    Raises:
        UsageError: see `quantize_model`; a model that is packed already is as small as its copy.
    """
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    packed = copy.deepcopy(model, memo=dict(shared))
    quantize_model(packed, scheme)
    return packed


def write(
    model: Transformer, cache: PagedCache, samples: list[Sample], rows: list[Row], counts: list[int]
) -> list[list[int]]:
    """Let `model` continue each sample by so many ids, drawn by the numbers that the sample itself will draw them by.

    Args:
        rows: what it has not read of each; there have to be blocks for that and all guesses but the last.
    """
    guesses: list[list[int]] = [[] for _ in samples]
    going = [i for i, count in enumerate(counts) if count]
    while going:
        hidden = forward(model, cache, [rows[i] for i in going])
        ends, end = list[int](), 0
        for i in going:
            end += len(rows[i].ids)
            ends.append(end - 1)
        chosen = choose(model.lm_head(hidden[ends]), [(samples[i], guesses[i]) for i in going])
        for i, token in zip(going, chosen.tolist(), strict=True):
            guesses[i].append(token)
            rows[i] = Row([token], rows[i].start + len(rows[i].ids), rows[i].table)
        going = [i for i in going if len(guesses[i]) < counts[i]]
    return guesses


def _cached_shape(model: Transformer) -> str:
    c = model.config
    shape = f"{c.n_layers} layers x {c.n_kv_heads} heads x {c.head_dim}"
    return f"{shape} in {str(model.compute_dtype)[6:]}, {c.vocab_size} ids"
