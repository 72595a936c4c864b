"""Guessing ahead: it may change when ids come and nothing else."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_engine import CONFIG, alone, answers, mixed
from test_model import BASE, build

from puna.errors import UsageError
from puna.infer.cache.paged_cache import PagedCache
from puna.infer.engine import Engine
from puna.infer.request import Request, Sampling
from puna.infer.sample import Sample
from puna.infer.sampling import Filters, penalized, probabilities
from puna.infer.speculation.draft import Draft, SelfDraft
from puna.infer.speculation.goodput import Goodput
from puna.infer.speculation.speculate import Guesses, Lookup, Proposer, Speculation
from puna.model.config import ModelConfig
from puna.model.transformer import Transformer


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build(CONFIG, torch.float64).eval()


@pytest.fixture(scope="module")
def expected(model: Transformer) -> list[list[int]]:
    """What `generate` says to each request alone."""
    return [alone(model, request) for request in mixed(64)]


class Eager(Goodput):
    """As many guesses as there is room for, always."""

    def counts(self, samples: Sequence[Sample], rooms: Sequence[int]) -> list[int]:
        return list(rooms)


def eager(proposer: Proposer, most: int = 5) -> Speculation:
    speculation = Speculation(proposer, most)
    speculation.goodput = Eager()
    return speculation


def oracle(texts: list[list[int]], right: float) -> Guesses:
    """Knows what will be written, and says it with probability `right` an id."""
    r = random.Random(0)

    def guess(ids: Sequence[int], count: int) -> list[int]:
        known = next((t[len(ids) :] for t in texts if t[: len(ids)] == list(ids)), [])
        known = (known + [0] * count)[:count]
        return [i if r.random() < right else (i + 1) % 97 for i in known]

    return Guesses(guess)


@pytest.mark.parametrize("right", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("size", [{}, {"tokens": 200, "chunk": 16, "batch": 8}])
def test_guesses_change_no_text(right: float, size: dict, model: Transformer, expected: list[list[int]]) -> None:
    """A kept wrong guess, keys of a rejected one, a random number used twice, a block counted twice or lost."""
    requests = mixed(64)
    texts = [[*q.prompt, *answer] for q, answer in zip(requests, expected, strict=True)]
    speculation = eager(oracle(texts, right))
    engine = Engine(model, speculate=speculation, **size)
    for _ in range(2):  # the second time the cache holds what guesses left
        assert answers(engine, requests) == expected
        assert engine.cache.blocks.used == 0
    assert (speculation.right > 0) == (right > 0)
    assert (speculation.right < speculation.guessed) or right == 1


def drafts(model: Transformer) -> dict[str, Proposer]:
    """The model itself, nearly it, something else; with a cache of its own and over the model's."""
    near, other = (build(CONFIG, torch.float64, seed).eval() for seed in (0, 1))
    with torch.no_grad():
        for parameter in near.parameters():
            parameter += 0.002 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)).double()
    small = build(ModelConfig(**{**BASE, "n_layers": 1, "max_seq_len": 90}), torch.float64).eval()
    return {
        "itself": Draft(model, model), "near": Draft(near, model, chunk=40), "small": Draft(small, model),
        "itself over its own cache": SelfDraft(model, model), "near over its cache": SelfDraft(near, model),
        "other over its cache": SelfDraft(other, model), "look-up": Lookup((2, 1)),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["itself", "near", "small", "itself over its own cache", "near over its cache",
                                  "other over its cache", "look-up"])  # fmt: skip
def test_no_proposer_changes_a_text(name: str, model: Transformer, expected: list[list[int]]) -> None:
    """A draft that spoils the cache it shares; one that goes on from keys of guesses that were wrong."""
    speculation = eager(drafts(model)[name], 4)
    engine = Engine(model, tokens=600, chunk=48, batch=12, speculate=speculation)
    assert answers(engine, mixed(64)) == expected
    assert engine.cache.blocks.used == 0
    if "itself" in name:  # it guesses by the same random numbers
        assert speculation.right == speculation.guessed > 100
    if "near" in name:
        assert 0.5 < speculation.right / speculation.guessed < 1
    if isinstance(speculation.proposer, Draft):
        assert speculation.proposer._cache is not None
        assert speculation.proposer._cache.blocks.used == 0


def test_drafts_of_other_shapes_are_refused(model: Transformer) -> None:
    """Guesses of another tokenizer's ids, keys of another shape in the model's cache."""
    with pytest.raises(UsageError, match="another tokenizer"):
        Draft(build(SMALL), model)
    with pytest.raises(UsageError, match="cannot use the cache"):
        SelfDraft(build(CONFIG, torch.float32), model)


def test_right_guesses_save_steps(model: Transformer) -> None:
    """Guesses that are computed and then thrown away would change no text either."""
    asked = Request([1, 2, 3], Sampling(max_tokens=61))
    text = [1, 2, 3, *alone(model, asked)]
    steps = []
    handle = model.register_forward_hook(lambda module, inputs, output: steps.append(inputs[0].shape[1]))
    assert answers(Engine(model, speculate=eager(oracle([text], 1.0))), [asked]) == [text[3:]]
    handle.remove()
    assert steps == [3] + [6] * 10  # one id from the prompt, six from each step


def test_stop_ids_and_strings_logprobs_and_samples_stay(model: Transformer) -> None:
    """What ends an answer may lie amid right guesses: ids after it must not be told, scored or kept."""

    def decode(ids: Sequence[int]) -> str:
        return "".join(chr(48 + i) for i in ids)

    full = alone(model, Request([4, 5], Sampling(max_tokens=30)))
    requests = [
        Request([4, 5], Sampling(max_tokens=30, stop_ids=(full[7],), logprobs=2)),
        Request([4, 5], Sampling(max_tokens=30, stop=(decode(full[9:11]),), logprobs=0)),
        Request([4, 5], Sampling(max_tokens=30, temperature=1.0, n=3, seed=5, logprobs=1)),
        Request([4, 5], Sampling(max_tokens=30, temperature=0.8, repetition_penalty=1.3, presence_penalty=0.5)),
    ]  # fmt: skip
    plain = Engine(model, decode=decode).run(requests)
    texts = [[4, 5, *c.token_ids] for result in plain for c in result.completions] + [[4, 5, *full]]
    for right in (0.6, 1.0):
        events = []
        engine = Engine(model, decode=decode, speculate=eager(oracle(texts[::-1], right)))
        found = engine.run(requests, events.append)
        for a, b in zip(found, plain, strict=True):
            for x, y in zip(a.completions, b.completions, strict=True):
                assert (x.token_ids, x.finish_reason, x.text) == (y.token_ids, y.finish_reason, y.text)
                assert [p.chosen for p in x.logprobs or ()] == pytest.approx([p.chosen for p in y.logprobs or ()])
                assert [[i for i, _ in p.top] for p in x.logprobs or ()] == [
                    [i for i, _ in p.top] for p in y.logprobs or ()
                ]
        told = Counter(i for e in events for i in [(e.request, e.sample)] * len(e.token_ids))
        assert told == {(n, i): len(c.token_ids) for n, r in enumerate(found) for i, c in enumerate(r.completions)}


def test_cancelled_amid_guesses(model: Transformer, expected: list[list[int]]) -> None:
    """Blocks reserved for guesses of a text that is cancelled before they are looked at."""
    requests = mixed(64)
    texts = [[*q.prompt, *a] for q, a in zip(requests, expected, strict=True)]
    engine, r, results = Engine(model, tokens=320, batch=8, speculate=eager(oracle(texts, 0.7))), random.Random(3), {}
    numbers = [engine.add(request) for request in requests]
    while engine.busy:
        results |= {event.request: event.result for event in engine.step() if event.result}
        engine.cancel(r.choice(numbers))
    for number, want in zip(numbers, expected, strict=True):
        got = results[number].completions[0].token_ids
        assert list(got) == want[: len(got)]
    assert engine.cache.blocks.used == 0


SMALL = ModelConfig(**{**BASE, "vocab_size": 6, "max_seq_len": 32})
FILTERED = {
    "plain": Sampling(max_tokens=2, temperature=1.0),
    "cold, top-k": Sampling(max_tokens=2, temperature=0.5, top_k=4),
    "top-p, min-p": Sampling(max_tokens=2, temperature=1.5, top_p=0.9, min_p=0.05),
    "penalties and bias": Sampling(
        max_tokens=2, temperature=1.2, repetition_penalty=1.5, presence_penalty=0.6, frequency_penalty=0.4,
        logit_bias={1: 1.5},
    ),
}  # fmt: skip


def exact(model: Transformer, prompt: list[int], sampling: Sampling, answer: Sequence[int] = ()) -> torch.Tensor:
    """The distribution of the id after prompt and answer, by its formula."""
    logits = model(torch.tensor([[*prompt, *answer]]))[:, -1]
    p = probabilities(penalized(logits, [(sampling, prompt, answer)]), Filters.of([sampling], logits.device))[0]
    return (p / p.sum()).double()


@pytest.mark.parametrize("name", FILTERED)
@torch.inference_mode()
def test_the_joint_distribution_is_the_models(name: str) -> None:
    """Guesses that make themselves more likely: chi-square of two ids against the exact target, p > 0.001."""
    model, prompt, sampling, count = build(SMALL, torch.float64).eval(), [1], FILTERED[name], 1500
    first = exact(model, prompt, sampling)
    joint = torch.cat([first[i] * exact(model, prompt, sampling, [i]) for i in range(6)])
    likely = int(first.argmax())
    speculation = eager(Guesses(lambda ids, n: [likely][:n]))
    engine = Engine(model, batch=64, speculate=speculation)
    seeds = random.Random(0).sample(range(10**9), count)
    results = engine.run([Request(prompt, Sampling(**{**vars(sampling), "seed": seed})) for seed in seeds])
    assert count * 0.1 < speculation.right < speculation.guessed == count
    seen = torch.zeros(36, dtype=torch.float64)
    for result in results:
        a, b = result.completions[0].token_ids
        seen[6 * a + b] += 1
    for p, observed in ((first, seen.view(6, 6).sum(1)), (joint, seen)):
        assert chi_square_p(p * count, observed) > 0.001


def chi_square_p(wanted: torch.Tensor, observed: torch.Tensor) -> float:
    """The probability of a deviation as large; cells below 5 are one."""
    assert not observed[wanted == 0].any()
    small = wanted < 5
    cells = [(wanted[~small], observed[~small]), (wanted[small].sum()[None], observed[small].sum()[None])]
    w, o = (torch.cat([cell[i] for cell in cells if cell[0].sum() > 0]) for i in range(2))
    statistic = ((o - w) ** 2 / w).sum()
    return torch.special.gammaincc(torch.tensor((len(w) - 1) / 2, dtype=torch.float64), statistic / 2).item()


def test_lookup_finds_what_followed_before() -> None:
    """The run that the text ends with is itself the last of its kind: who finds that one has nothing to say."""
    lookup, texts = Lookup(), [[5, 6, 7, 8, 9, 1, 5, 6, 7], [1, 2, 3], [4, 1, 4, 1, 4], [8, 8]]
    samples = [Sample(0, 0, Request(text), 100, None) for text in texts]
    cache = PagedCache(CONFIG, 1, torch.float32, torch.device("cpu"))
    assert lookup.propose(samples, [3, 3, 4, 3], cache) == [[8, 9, 1], [], [1, 4, 1, 4], []]
    samples[0].text.ids += [8, 2, 6, 7]
    samples[3].text.ids += [8]
    assert lookup.propose(samples, [2, 0, 1, 2], cache) == [[8, 2], [], [1], [8, 8]]
    assert lookup.propose(samples[:1], [0], cache) == [[]]


def test_lookup_costs_what_the_text_is_long() -> None:
    """A search through the whole text for every id makes long answers slow."""
    reads = 0

    class Counted(list):
        def __getitem__(self, key: Any) -> Any:
            nonlocal reads
            reads += 1
            return super().__getitem__(key)

    sample, r = Sample(0, 0, Request([1, 2]), 10**6, None), random.Random(0)
    sample.text.ids, lookup = Counted(sample.text.ids), Lookup()
    cache = PagedCache(CONFIG, 1, torch.float32, torch.device("cpu"))
    for _ in range(4000):
        sample.text.ids.append(r.randrange(4))
        lookup.propose([sample], [1], cache)
    assert reads < 4000 * 6
