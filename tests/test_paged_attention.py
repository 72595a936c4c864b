"""Attention over blocks against its oracle, which is attention over each text laid out in a row."""

import random

import pytest
import torch
from torch import Tensor

from puna.ops.attention import attention_eager
from puna.ops.paged_attention import BLOCK, Piece, Pieces, paged_attention, paged_attention_eager

H, K, D = 4, 2, 16
STEPS = {
    "one prompt": [(0, 70)],
    "prompts of many lengths": [(0, n) for n in (1, 2, 3, 31, 32, 33, 64, 90)],
    "single tokens": [(n, 1) for n in (0, 1, 31, 32, 33, 95)],
    "one token": [(40, 1)],
    "prompts that go on": [(5, 40), (64, 32), (90, 6)],
    "all of it": [(0, 50), (33, 1), (64, 3), (0, 1), (10, 50), (95, 1), (3, 9), (0, 45)],
}


def texts_of(step: list[tuple[int, int]], blocks: int) -> list[Piece]:
    """Pieces whose blocks lie anywhere in the pool."""
    places = list(range(blocks))
    random.Random(0).shuffle(places)
    return [
        Piece(start, length, [places.pop() for _ in range(-(-(start + length) // BLOCK))]) for start, length in step
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", STEPS)
def test_pieces_equal_texts_in_a_row(step: str, dtype: torch.dtype) -> None:
    """A token that sees its padding, its neighbour's blocks or its own future; a group that comes back shuffled."""
    random_ = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random_, dtype=torch.float64).to(dtype)

    pieces = texts_of(STEPS[step], 40)
    count = sum(piece.length for piece in pieces)
    q, k, v = numbers(1, H, count, D), numbers(1, K, count, D), numbers(1, K, count, D)
    keys, values = numbers(40, K, BLOCK, D), numbers(40, K, BLOCK, D)
    pools = [(keys.clone(), values.clone()) for _ in range(2)]
    with torch.inference_mode():
        places = Pieces(pieces, torch.device("cpu"))
        expected = paged_attention_eager(q, k, v, *pools[0], places)
        found = paged_attention(q, k, v, *pools[1], places)
    assert torch.equal(pools[0][0], pools[1][0])
    assert torch.equal(pools[0][1], pools[1][1])
    first = 0
    for start, length, table in pieces:  # the oracle itself, by its words: a text's keys one after another
        own = slice(first, first + length)
        rows = [torch.stack([pool[table[p // BLOCK], :, p % BLOCK] for p in range(start)], 1)[None] if start
                else pool.new_empty(1, K, 0, D) for pool in (keys, values)]  # fmt: skip
        whole = (torch.cat([row, x[:, :, own]], 2) for row, x in zip(rows, (k, v), strict=True))
        mask = torch.ones(length, start + length, dtype=torch.bool).tril(start)[None, None]
        torch.testing.assert_close(expected[:, :, own], attention_eager(q[:, :, own], *whole, mask))
        first += length
    wide = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(found, expected, atol=wide, rtol=wide)
