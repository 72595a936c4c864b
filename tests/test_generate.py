"""The reference generation loop against full forwards."""

import pytest
import torch
from test_model import BASE, build

from puna.errors import UsageError
from puna.infer.generate import generate
from puna.infer.request import Sampling
from puna.infer.sampling import Filters, sample
from puna.model.config import ModelConfig

CONFIG = ModelConfig(**{**BASE, "n_kv_heads": 2, "max_seq_len": 24})
PROMPTS = [[5, 6, 7], [1], [9, 8, 7, 6, 5, 4, 3, 2]]


def greedy(model, prompt: list[int], n: int) -> list[int]:
    """The oracle: a full forward for every token, no cache, no batch."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt) :]


def test_cached_ragged_batch_equals_full_forwards() -> None:
    """A cache slot, mask or position off by one changes text only for the shorter rows of a batch."""
    model = build(CONFIG, torch.float64).eval()
    assert generate(model, PROMPTS, max_tokens=10) == [greedy(model, p, 10) for p in PROMPTS]


def test_a_shared_beginning_is_computed_once() -> None:
    """Solved examples before every question; a position or slot off by the shared length garbles every row."""
    model = build(CONFIG, torch.float64).eval()
    prompts = [[7, 7, 3, *p] for p in ([5], [5, 6, 7], [1, 2])]
    expected = [greedy(model, p, 6) for p in prompts]
    sizes: list[int] = []
    handle = model.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].numel()))
    assert generate(model, prompts, max_tokens=6) == expected
    assert sizes[:3] == [3, 9, 3]
    handle.remove()
    assert generate(model, [[4, 4]] * 2, max_tokens=6) == [greedy(model, [4, 4], 6)] * 2


def test_stop_ids_end_a_row_and_not_the_others() -> None:
    """A stop id has to end its own row, be the last id of it, and leave the rest alone."""
    model = build(CONFIG, torch.float64).eval()
    full = [greedy(model, p, 10) for p in PROMPTS]
    stop = full[0][3]
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in full]
    assert generate(model, PROMPTS, max_tokens=10, stop_ids=[stop]) == expected


def test_the_context_ends_generation() -> None:
    """Beyond max_seq_len there is no cache slot."""
    model = build(CONFIG).eval()
    rows = generate(model, PROMPTS, max_tokens=1000)
    assert [len(p) + len(r) for p, r in zip(PROMPTS, rows, strict=True)] == [24, 24, 24]
    with pytest.raises(UsageError, match="24"):
        generate(model, [[1] * 24], max_tokens=1)
    with pytest.raises(UsageError, match="empty prompt"):
        generate(model, [[]], max_tokens=1)


def test_a_rows_sample_does_not_depend_on_its_neighbours() -> None:
    """Same seed, same text, alone or in a batch."""
    model = build(CONFIG, torch.float64).eval()
    options = {"max_tokens": 8, "temperature": 1.0, "top_p": 0.9}
    batch = generate(model, PROMPTS, seed=3, **options)
    assert batch == [generate(model, [p], seed=3 + i, **options)[0] for i, p in enumerate(PROMPTS)]
    assert batch != generate(model, PROMPTS, seed=4, **options)


def test_top_p_keeps_the_id_that_crosses() -> None:
    """Llama 2's rule; without the crossing id top_p=0 would keep nothing."""
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(2000, 4)
    drawn = [i / 2000 for i in range(2000)]
    for top_p, kept in ((0.6, {0, 1}), (0.0, {0})):
        filters = Filters.of([Sampling(temperature=1.0, top_p=top_p)] * 2000, logits.device)
        assert set(sample(logits, filters, drawn).tolist()) == kept
