"""The engine against `generate`, whatever else it serves, however small its cache and its steps."""

import random
from typing import Any

import pytest
import torch
from test_model import BASE, build

from puna.infer.engine import Engine
from puna.infer.generate import generate
from puna.infer.request import Request, Sampling
from puna.model.config import ModelConfig
from puna.model.transformer import Transformer

CONFIG = ModelConfig(**{**BASE, "n_kv_heads": 2, "max_seq_len": 160})
SIZES: dict[str, dict[str, Any]] = {
    "default": {},
    "steps of 7": {"chunk": 7},
    "steps of 64, 5 texts at a time": {"chunk": 64, "batch": 5},
    "a cache of one context": {"tokens": 160, "batch": 8},
    "a small cache in small steps": {"tokens": 200, "chunk": 16},
}


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build(CONFIG, torch.float64).eval()


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Ragged prompts; many begin with more or less of the same 70 ids."""
    r = random.Random(seed)
    common = [r.randrange(97) for _ in range(70)]
    return [common[: r.choice([0, 0, 10, 33, 64, 70])] + [r.randrange(97) for _ in range(r.randrange(1, 40))]
            for _ in range(count)]  # fmt: skip


def mixed(count: int, seed: int = 0) -> list[Request]:
    """Requests of many lengths, some greedy, some sampled."""
    r = random.Random(seed)
    return [
        Request(p, Sampling(max_tokens=r.randrange(1, 24), temperature=r.choice([0, 0, 1.0]), seed=r.randrange(9)))
        for p in prompts(count, seed)
    ]


@pytest.fixture(scope="module")
def expected(model: Transformer) -> list[list[int]]:
    """What `generate` says to each of the 64 requests alone."""
    return [alone(model, request) for request in mixed(64)]


def alone(model: Transformer, request: Request) -> list[int]:
    s = request.sampling
    options = {"temperature": s.temperature, "seed": s.seed, "stop_ids": s.stop_ids}
    return generate(model, [request.prompt], max_tokens=s.max_tokens, **options)[0]


def answers(engine: Engine, requests: list[Request]) -> list[list[int]]:
    return [list(result.completions[0].token_ids) for result in engine.run(requests)]


@pytest.mark.parametrize("size", SIZES)
def test_64_requests_equal_generate(size: str, model: Transformer, expected: list[list[int]]) -> None:
    """A slot, mask or position off by one; a shared block that is not what it seems; a preempted text that forgets."""
    engine = Engine(model, **SIZES[size])
    for _ in range(2):  # the second time much of it is in the cache
        assert answers(engine, mixed(64)) == expected
        assert engine.cache.blocks.used == 0
    assert not engine.busy


def test_cancelled_requests_leave_the_others_alone(model: Transformer, expected: list[list[int]]) -> None:
    """A cancelled text whose blocks are given to two, or never given back."""
    engine, r = Engine(model, tokens=320, chunk=32, batch=8), random.Random(1)
    numbers = [engine.add(request) for request in mixed(64)]
    doomed, results = set(r.sample(numbers, 20)), {}
    while engine.busy:
        results |= {event.request: event.result for event in engine.step() if event.result}
        for number in [n for n in doomed if r.random() < 0.2]:
            engine.cancel(number)
            engine.cancel(number)
    for number, want in zip(numbers, expected, strict=True):
        got = results[number].completions[0]
        assert list(got.token_ids) == want[: len(got.token_ids)]
        assert (got.finish_reason == "cancelled") <= (number in doomed)
        if number not in doomed:
            assert len(got.token_ids) == len(want)
    assert sum(r.completions[0].finish_reason == "cancelled" for r in results.values()) > 5
    assert engine.cache.blocks.used == 0


def test_score_equals_full_forwards(model: Transformer) -> None:
    """Log-likelihoods off by one place, or of a context that was cut where blocks end."""
    r = random.Random(2)
    rows = [(p, [r.randrange(97) for _ in range(r.randrange(9))]) for p in prompts(40)]
    best = [(p, generate(model, [p], max_tokens=3)[0]) for p in prompts(4)]
    for sizes in SIZES.values():
        found = Engine(model, **sizes).score([*rows, *best])
        for (context, continuation), got in zip([*rows, *best], found, strict=True):
            with torch.no_grad():
                logp = model(torch.tensor([context + continuation]))[0].log_softmax(-1)[len(context) - 1 :]
            want = [float(p[i]) for p, i in zip(logp, continuation, strict=False)]
            assert got.tokens == pytest.approx(want, abs=1e-5)
            assert got.total == pytest.approx(sum(want), abs=1e-5)
            assert got.greedy == all(int(p.argmax()) == i for p, i in zip(logp, continuation, strict=False))
        assert all(likelihood.greedy for likelihood in found[-4:])
