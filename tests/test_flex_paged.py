"""FlexAttention over the paged cache against the oracle: its masks and lists on any machine, its kernel on a card."""

import os

import pytest
import torch
from torch import Tensor

from puna.ops import paged_attention as paged
from puna.ops.flex_paged import flex_mask, flex_problem, uncompiled
from puna.ops.paged_attention import BLOCK, Piece, Pieces, Rows, paged_attention, paged_attention_eager

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # it is the oracle
BLOCKS, DIM = 24, 8
STEPS = {
    "chunks of prompts": [Piece(20, 100, [5, 4, 2, 0]), Piece(64, 90, [5, 4, 6, 11, 12]), Piece(0, 7, [8])],
    "single tokens": [Piece(70, 1, [3, 1, 7]), Piece(31, 1, [9]), Piece(32, 1, [10, 0])],
    "shared beginnings": [Piece(64, 1, [3, 1, 8]), Piece(70, 1, [3, 1, 7]), Piece(64, 3, [3, 1, 9])],
    "both": [Piece(70, 1, [3, 1, 7]), Piece(40, 50, [5, 4, 2]), Piece(95, 1, [6, 0, 10]), Piece(33, 9, [8, 9])],
}


def pool(kv_heads: int, as_on_a_card: bool) -> tuple[Tensor, Tensor]:
    if as_on_a_card:
        keys, values = torch.randn(2, BLOCKS, BLOCK, kv_heads, DIM, dtype=torch.float64).transpose(2, 3)
    else:
        keys, values = torch.randn(2, BLOCKS, kv_heads, BLOCK, DIM, dtype=torch.float64)
    return keys, values


def of_step(pieces: Pieces, heads: int, kv_heads: int) -> list[Tensor]:
    """q, k, v."""
    return [torch.randn(1, count, pieces.tokens, DIM, dtype=torch.float64) for count in (heads, kv_heads, kv_heads)]


@pytest.fixture
def on_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention as on a card, uncompiled."""
    monkeypatch.setattr(paged, "usable", lambda q, keys: True)
    monkeypatch.setattr(paged, "compiled", lambda fixed: uncompiled)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (6, 2), (5, 1)])
@pytest.mark.usefixtures("on_flex")
def test_flex_attention_equals_the_oracle(step: str, heads: tuple[int, int]) -> None:
    """A query that sees another text's block, a slot past its own, or the wrong key head."""
    torch.manual_seed(0)
    pieces, (keys, values) = Pieces(STEPS[step], torch.device("cpu")), pool(heads[1], True)
    given = of_step(pieces, *heads)
    want = paged_attention_eager(*given, keys, values, pieces)
    torch.testing.assert_close(paged_attention(*given, keys, values, pieces), want)


@pytest.mark.parametrize("step", STEPS)
def test_the_kernel_reads_what_is_seen_and_nothing_else(step: str) -> None:
    """A block that the mask shows but no list names, which only a compiled kernel leaves out; a list too long."""
    keys, _ = pool(2, True)
    for group in Pieces(STEPS[step], torch.device("cpu")).groups:
        mask = flex_mask(group.tables, group.positions, keys, 6)
        queries, slots = 3 * group.rows.shape[1], torch.arange(BLOCKS * BLOCK)
        for text, lists in enumerate(mask.kv_indices[:, 0]):
            for row, listed in enumerate(lists):
                at = torch.arange(128 * row, min(128 * (row + 1), queries))
                seen = mask.mask_mod(torch.tensor(text), torch.tensor(0), at[:, None], slots[None])
                blocks = seen.any(0).view(BLOCKS, BLOCK).any(1).nonzero()[:, 0].tolist()
                count = int(mask.kv_num_blocks[text, 0, row])
                assert sorted(listed[:count].tolist()) == blocks


@pytest.mark.skipif(not (torch.cuda.is_available() or os.environ.get("PUNA_TEST_COMPILE")),
                    reason="compiles for a minute: PUNA_TEST_COMPILE=1 runs it, a card always does")  # fmt: skip
@pytest.mark.parametrize("shared", [1, 3, 4])
def test_the_compiled_kernel_equals_the_oracle(shared: int) -> None:
    """A kernel that reads lists otherwise than they are meant; a shape that it does not take."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.inference_mode():
        assert not flex_problem(device, torch.bfloat16, shared, BLOCK, 64)


@pytest.mark.parametrize("as_on_a_card", [False, True])
def test_rows_on_the_device_equal_pieces(as_on_a_card: bool) -> None:
    """A captured step that stores or looks elsewhere than the same step with lists; the card's layout without Flex."""
    torch.manual_seed(0)
    singles = [piece for step in STEPS.values() for piece in step if piece.length == 1 and piece.start != 64]
    pieces, (keys, values) = Pieces(singles, torch.device("cpu")), pool(2, as_on_a_card)
    tables = torch.tensor([[*table, *[0] * (6 - len(table))] for _, _, table in singles])
    rows = Rows(tables, torch.tensor([start for start, _, _ in singles]))
    given = of_step(pieces, 4, 2)
    others = keys.clone(), values.clone()
    want = paged_attention_eager(*given, *others, pieces)
    torch.testing.assert_close(paged_attention(*given, keys, values, rows), want)
    assert torch.equal(keys, others[0])
    assert torch.equal(values, others[1])
