"""Every fast path against its slow oracle: values and gradients."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from test_model import BASE, build
from torch import Tensor

from puna.log import log
from puna.model.config import ModelConfig
from puna.ops.attention import Documents, attention, attention_eager
from puna.ops.blocked_attention import BLOCK, KEEP
from puna.ops.low_rank import low_rank_linear, low_rank_linear_eager
from puna.ops.norm import rms_norm, rms_norm_eager
from puna.ops.swiglu import swiglu, swiglu_eager
from puna.train.blocks import compile_blocks


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def gradients(inputs: list[Tensor], output: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return [output, *torch.autograd.grad((output * weights).sum(), inputs)]


def close(fast: list[Tensor], slow: list[Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(fast, slow, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("length", [1, 7, BLOCK, BLOCK + 1, 3 * BLOCK - 5, KEEP + 3])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
def test_blocked_attention(length: int, heads: tuple[int, int]) -> None:
    """A block's border, the last short block, grouped heads, weights kept or made again."""
    q, k, v = inputs = tensors((2, heads[0], length, 8), (2, heads[1], length, 8), (2, heads[1], length, 8))
    close(gradients(inputs, attention(q, k, v)), gradients(inputs, attention_eager(q, k, v)))


def test_documents_of_many_lengths() -> None:
    """Texts are grouped and padded: one that reads its group's padding, or writes into a neighbour, is seen here."""
    spans = ((0, 0, 5), (0, 5, 12), (0, 12, 40), (0, 40, 340), (1, 0, 9), (1, 9, 10), (1, 10, 140), (1, 150, 283))
    documents = Documents(spans)
    assert any(not real.all() and rows.shape[1] > BLOCK for rows, _, real in documents.groups)
    q, k, v = inputs = tensors((2, 4, 340, 8), (2, 2, 340, 8), (2, 2, 340, 8))
    covered = torch.zeros(2, 1, 340, 1, dtype=torch.float64)
    for row, start, end in spans:
        covered[row, :, start:end] = 1
    fast = gradients(inputs, attention(q, k, v, documents) * covered)
    close(fast, gradients(inputs, attention_eager(q, k, v, documents) * covered))


def test_norm_and_gate() -> None:
    """What is made again in the backward must be what the forward used."""
    x, weight = inputs = tensors((3, 5, 16), (16,))
    close(gradients(inputs, rms_norm(x, weight, 1e-5)), gradients(inputs, rms_norm_eager(x, weight, 1e-5)))
    gate, up = inputs = tensors((3, 5, 16), (3, 5, 16))
    close(gradients(inputs, swiglu(gate, up)), gradients(inputs, swiglu_eager(gate, up)))


def low_rank_inputs(rows: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, a frozen weight, A and B."""
    x, weight, a, b = tensors((*rows, 48), (64, 48), (4, 48), (64, 4), dtype=dtype)
    return [x, weight.detach(), a, b]


def low_rank_gradients(inputs: list[Tensor], function: Callable[..., Tensor]) -> list[Tensor]:
    x, weight, a, b = inputs
    return gradients([x, a, b], function(x, weight, a, b, 0.5))


def test_low_rank() -> None:
    """The scale belongs to the adapter alone, in both directions; a trained base would get no gradient."""
    inputs = low_rank_inputs((3, 5))
    close(low_rank_gradients(inputs, low_rank_linear), low_rank_gradients(inputs, low_rank_linear_eager))
    first = [inputs[0].detach(), *inputs[1:]]  # the layer above the embedding of a frozen model
    low_rank_linear(*first, 0.5).sum().backward()
    with pytest.raises(RuntimeError, match="frozen"):
        low_rank_linear(inputs[0], inputs[1].requires_grad_(), *inputs[2:], 0.5)


def test_bf16_low_rank_is_as_close_to_fp32() -> None:
    """Adding into a rounded output must not round more than adding two rounded ones."""
    rough = low_rank_inputs((200,), torch.bfloat16)
    exact = [r.detach().float().requires_grad_(r.requires_grad) for r in rough]
    truth = low_rank_gradients(exact, low_rank_linear_eager)
    found, oracle = low_rank_gradients(rough, low_rank_linear), low_rank_gradients(rough, low_rank_linear_eager)
    for ours, theirs, true in zip(found, oracle, truth, strict=True):
        assert (ours.float() - true).norm() <= 1.2 * (theirs.float() - true).norm()


@pytest.mark.parametrize("dim", [64, 80, 128])
def test_bf16_is_as_close_to_fp32_as_the_oracle(dim: int) -> None:
    """Faster must not mean rougher: the distance to fp32 is that of the eager bf16 computation, whatever the scale."""
    rough = tensors((2, 6, 200, dim), (2, 2, 200, dim), (2, 2, 200, dim), dtype=torch.bfloat16)
    exact = [r.detach().float().requires_grad_() for r in rough]
    truth = gradients(exact, attention_eager(*exact))
    for fast, slow, true in zip(
        gradients(rough, attention(*rough)), gradients(rough, attention_eager(*rough)), truth, strict=True
    ):
        assert (fast.float() - true).norm() <= 1.5 * (slow.float() - true).norm()


def test_bf16_norm_and_gate_are_as_close_to_fp32() -> None:
    """The same for what is made again in the backward."""
    cases = [
        (tensors((64, 512), (512,), dtype=torch.bfloat16), rms_norm, rms_norm_eager, (1e-5,)),
        (tensors((64, 512), (64, 512), dtype=torch.bfloat16), swiglu, swiglu_eager, ()),
    ]
    for rough, fast, slow, more in cases:
        exact = [r.detach().float().requires_grad_() for r in rough]
        truth = gradients(exact, slow(*exact, *more))
        found, oracle = gradients(rough, fast(*rough, *more)), gradients(rough, slow(*rough, *more))
        for ours, theirs, true in zip(found, oracle, truth, strict=True):
            assert (ours.float() - true).norm() <= 1.2 * (theirs.float() - true).norm()


def test_second_derivatives_are_refused() -> None:
    """A hand-written backward that is differentiated again gives a number, and a wrong one."""
    q, k, v = tensors((1, 2, 5, 4), (1, 2, 5, 4), (1, 2, 5, 4))
    (gradient,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_compiled_halves_equal_eager(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A compiler that is missing must not stop training; one that works must not change it."""
    tokens = torch.arange(24).view(2, 12)
    model = build(ModelConfig(**{**BASE, "n_kv_heads": 2}))
    expected = model(tokens)
    expected.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}

    def broken(*_: object) -> None:
        raise RuntimeError("g++ not found\nmore")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", broken)
        patch.setattr(log, "propagate", True)
        assert compile_blocks(model) is False
    assert "g++ not found" in caplog.text
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    assert compile_blocks(model) is True
    model.zero_grad()
    compiled = model(tokens)
    assert (compiled - expected).abs().max() < 1e-5
    compiled.square().sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad - gradients[name]).norm() <= 1e-5 * gradients[name].norm(), name


@pytest.mark.parametrize("queries", [1, 4])
def test_masked_attention(queries: int) -> None:
    """Generation's: grouped heads beside a ragged mask, where a query of another head or time would be seen."""
    q, k, v = tensors((3, 6, queries, 8), (3, 2, 9, 8), (3, 2, 9, 8))
    positions = torch.tensor([2, 5, 8 - queries])[:, None] + torch.arange(queries)
    mask = torch.arange(9) <= positions[:, None, :, None]
    with torch.no_grad():
        close([attention(q, k, v, mask)], [attention_eager(q, k, v, mask)])
