"""Decode steps replayed over fixed buffers against `generate`; what replays them on a CPU is a plain call."""

import random

import pytest
import torch
from test_engine import CONFIG, answers, mixed
from test_engine import expected as expected
from test_engine import model as model
from test_flex_paged import on_flex as on_flex
from test_model import build
from torch import nn

from puna.infer.engine import Engine
from puna.infer.graphs import DecodeGraphs, Step
from puna.model.transformer import Transformer

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # it is the oracle


def again(step: Step) -> Step:
    """As a CUDA graph: what replays a step writes where the first run did."""
    out = step()
    return lambda: out.copy_(step())


def graphed(model: Transformer, **sizes: int) -> Engine:
    engine = Engine(model, **sizes)
    engine.graphs = DecodeGraphs(model, engine.cache, again)
    return engine


@pytest.mark.parametrize("sizes", [{}, {"chunk": 16, "batch": 5}, {"tokens": 200, "chunk": 16}])
def test_captured_steps_equal_generate(model: Transformer, expected: list[list[int]], sizes: dict[str, int]) -> None:
    """Padding that writes into somebody's block; inputs of the step before; a text that left and is still written."""
    engine = graphed(model, **sizes)
    assert answers(engine, mixed(64)) == expected
    rows = {rows for rows, _ in engine.graphs.captured}
    assert rows <= {1, 2, 4, 8, 16, 32}
    assert len(rows) > 2


@pytest.mark.usefixtures("on_flex")
def test_captured_steps_on_flex_attention_equal_generate(model: Transformer, expected: list[list[int]]) -> None:
    """A mask made for one layer, one step or one size of batch and used for another."""
    engine = graphed(model, tokens=320, chunk=48)
    for x in engine.cache.pool:
        x.zero_()  # uncompiled, FlexAttention multiplies also what no list names
    assert answers(engine, mixed(64)[:12]) == expected[:12]
    assert engine.graphs.captured


def test_arrivals_and_departures_between_captured_steps(model: Transformer, expected: list[list[int]]) -> None:
    """Rows that keep the table of whoever had them before."""
    engine, r, requests = graphed(model, batch=6), random.Random(3), mixed(64)
    numbers, results = {}, {}
    while len(results) < len(requests):
        if len(numbers) < len(requests) and r.random() < 0.4:
            numbers[engine.add(requests[len(numbers)])] = len(numbers)
        results |= {numbers[e.request]: e.result for e in engine.step() if e.result}
    assert [list(results[i].completions[0].token_ids) for i in range(64)] == expected
    assert engine.cache.blocks.used == 0


def test_graphs_follow_the_weights_and_the_pool() -> None:
    """A graph over weights that were replaced, or over a pool that was given back: old answers, or anybody's memory."""
    model, other = build(CONFIG, torch.float64).eval(), build(CONFIG, torch.float64, seed=1).eval()
    engine, requests = graphed(model), mixed(8)
    first = answers(engine, requests)
    kept = {size: replay for size, (_, replay) in engine.graphs.captured.items()}
    with torch.no_grad():  # an optimizer's step
        for parameter in model.parameters():
            parameter.mul_(1.5)
    trained = answers(engine, requests)
    assert trained == answers(Engine(model), requests) != first
    assert all(engine.graphs.captured[size][1] is replay for size, replay in kept.items())
    for name, parameter in other.named_parameters():
        model.get_submodule(name.rpartition(".")[0]).register_parameter(
            name.rpartition(".")[2], nn.Parameter(parameter)
        )
    assert answers(engine, requests) == answers(Engine(other), requests) != trained
    engine.release()
    assert not engine.graphs.captured
    assert answers(engine, requests) == answers(Engine(other), requests)


def test_a_step_that_cannot_be_captured_is_run_all_the_same(model: Transformer, expected: list[list[int]]) -> None:
    """An engine that stops where a card has no memory left for a graph."""

    def refused(step: Step) -> Step:
        raise RuntimeError("out of memory")

    engine = Engine(model)
    engine.graphs = DecodeGraphs(model, engine.cache, refused)
    assert answers(engine, mixed(64)[:9]) == expected[:9]
