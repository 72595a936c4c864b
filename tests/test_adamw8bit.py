"""Moments of 8 bits: codes against the search and bitsandbytes, steps against the formula and bitsandbytes, memory."""

import math

import pytest
import torch
from test_model import BASE, build

from puna.model.config import ModelConfig
from puna.quant.dynamic import dequantize, dynamic_table, quantize, quantize_eager
from puna.train.adamw8bit import AdamW8bit
from puna.train.optim import OptimizerConfig, build_optimizer

LR, DECAY, BETAS, EPS = 1e-2, 0.1, (0.9, 0.95), 1e-8


def numbers(count: int, seed: int = 0) -> torch.Tensor:
    """Of many magnitudes, with zeros, and one that rounds to each end."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.rand(count, generator=generator) * 8
    values = torch.randn(count, generator=generator) * 10.0**-exponents
    values[::7] = 0
    return values


@pytest.mark.parametrize("signed", [True, False])
def test_codes_without_a_search(signed: bool) -> None:
    """Every bound between two codes, and what lies just beside it: a cell with two bounds would be off by one."""
    table = dynamic_table(signed)
    bounds = (table[:-1] + table[1:]) / 2
    up, down = (torch.nextafter(bounds, torch.tensor(end)) for end in (2.0, -2.0))
    for values in (torch.cat([table, bounds, up, down, torch.ones(9)]), numbers(5000), torch.zeros(300)):
        values = values if signed else values.abs()
        ours, theirs = quantize(values, signed), quantize_eager(values, signed)
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_bitsandbytes(signed: bool) -> None:
    """Another table, or blocks that begin elsewhere, is another optimizer than the published one."""
    theirs = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes: codes are compared with its own")
    values = numbers(1000) if signed else numbers(1000).abs()
    table = dynamic_table(signed)
    assert torch.equal(table, theirs.create_dynamic_map(signed=signed))
    codes, state = theirs.quantize_blockwise(values, code=table, blocksize=256)
    ours, scales = quantize(values, signed)
    assert torch.equal(scales, state.absmax)
    found = dequantize(ours, scales, table)
    assert torch.equal(dequantize(codes, scales, table), theirs.dequantize_blockwise(codes, state))
    # Its C++ for CPUs looks some numbers up one code too far, and what is nearly zero several: ours are the nearest.
    assert ((found - values).abs() <= (dequantize(codes, scales, table) - values).abs()).all()
    far = values.abs() > 1e-4 * scales.repeat_interleave(256)[:1000]
    assert (ours.int() - codes.int())[far].abs().max() <= 1


def written_out(p: torch.Tensor, grads: list[torch.Tensor]) -> torch.Tensor:
    """AdamW by the paper, a block of 256 at a time, moments rounded to 8 bits after each step."""
    p = p.clone().flatten()
    for start in range(0, len(p), 256):
        block = slice(start, start + 256)
        m = v = torch.zeros_like(p[block])
        for t, grad in enumerate(grads, 1):
            g = grad.flatten()[block]
            m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
            hat_m, hat_v = m / (1 - BETAS[0] ** t), v / (1 - BETAS[1] ** t)
            p[block] -= LR * (hat_m / (hat_v.sqrt() + EPS) + DECAY * p[block])
            m, v = rounded(m, dynamic_table()), rounded(v, dynamic_table(signed=False))
    return p


def rounded(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The nearest of the table's values, by looking at all of them."""
    scale = values.abs().max().clamp(min=1e-38)
    return table[(values[:, None] / scale - table).abs().argmin(1)] * scale


def test_steps_follow_the_formula() -> None:
    """Moments rounded before the update, a missing correction of the bias, decay through the gradient: each drifts."""
    start = torch.randn(41, 127, generator=torch.Generator().manual_seed(1))  # blocks that end within rows, one short
    grads = [torch.randn(start.shape, generator=torch.Generator().manual_seed(s)) for s in range(5)]
    p = torch.nn.Parameter(start.clone())
    optimizer = AdamW8bit([p], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    apart = (p.detach().flatten() - written_out(start, grads)).abs()
    # Two orders of the same sums may round a moment to neighbouring codes, here and there.
    assert (apart > 1e-5).float().mean() < 2e-3
    assert apart.max() < 1e-2


def test_steps_are_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside its CPU backend on a matrix and on a tensor too small for 8 bits, both with codes that are the nearest."""
    optim = pytest.importorskip("bitsandbytes.optim", reason="bitsandbytes: steps are compared with its own")
    backend = pytest.importorskip("bitsandbytes.backends.cpu.ops")

    def nearest(values: torch.Tensor, table: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor, _: int) -> None:
        found, largest = quantize_eager(values, signed=bool(table[0] < 0))
        codes.copy_(found.view_as(codes))
        scales.copy_(largest)

    monkeypatch.setattr(backend, "_quant_blockwise_fp32_direct", nearest)
    for shape in ((64, 96), (3, 7)):
        start = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
        our_optimizer = AdamW8bit([ours], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
        their_optimizer = optim.AdamW8bit([theirs], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
        for seed in range(8):
            grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            ours.grad, theirs.grad = grad.clone(), grad.clone()
            our_optimizer.step()
            their_optimizer.step()
        apart = (ours - theirs).abs()
        # Sums in another order round a moment to the neighbouring code, here and there.
        assert (apart > 1e-6).float().mean() < 2e-3, shape
        assert apart.max() < 1e-3, shape


def test_small_tensors_are_torchs_adamw() -> None:
    """Below 4,096 numbers nothing is rounded."""
    start = torch.randn(60, 60, generator=torch.Generator().manual_seed(3))
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    words = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
    optimizers = AdamW8bit([ours], **words), torch.optim.AdamW([theirs], **words)
    for seed in range(5):
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed))
            optimizer.step()
    assert (ours - theirs).abs().max() < 1e-6


def test_moments_take_a_quarter() -> None:
    """What the 8 bits are for: bytes of all moments against fp32 AdamW's, and none of them hidden elsewhere."""
    model = build(ModelConfig(**{**BASE, "dim": 128, "ffn_dim": 344, "vocab_size": 512}))
    sizes = []
    for kind in ("adamw", "adamw8bit"):
        optimizer = build_optimizer(model, OptimizerConfig(kind=kind, lr=1e-3))  # type: ignore[arg-type]
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        sizes.append(sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim))
    assert sizes[0] == 8 * sum(p.numel() for p in model.parameters())
    assert sizes[1] <= 0.27 * sizes[0]


def test_it_learns_as_well_as_fp32() -> None:
    """A small regression to about the same loss: rounding must not bias what is learned."""
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(256, 64, generator=generator), torch.randn(64, 96, generator=generator)
    y = torch.tanh(x @ target) + 0.1 * torch.randn(256, 96, generator=generator)
    losses = {}
    for kind in (torch.optim.AdamW, AdamW8bit):
        w = torch.nn.Parameter(torch.zeros(64, 96))
        optimizer = kind([w], lr=0.02, betas=BETAS, weight_decay=0.0)
        for _ in range(150):
            loss = (torch.tanh(x @ w) - y).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[kind] = loss.item()
    assert math.isclose(losses[AdamW8bit], losses[torch.optim.AdamW], rel_tol=0.05), losses
