"""Muon against the formula, and beside AdamW in one optimizer."""

import pytest
import torch
from test_model import BASE, build

from puna.model.config import ModelConfig
from puna.train.muon import orthogonalize
from puna.train.optim import OptimizerConfig, build_optimizer

CONFIG = ModelConfig(**BASE)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 8, 24), (2, 24, 8)])
def test_orthogonal_updates(shape: tuple[int, int, int]) -> None:
    """Singular vectors stay, singular values go to about one; a transposed side would turn them."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    found = left.mT @ orthogonalize(matrices) @ right.mT
    values = torch.diagonal(found, dim1=1, dim2=2)
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert (found - torch.diag_embed(values)).abs().max() < 0.15
    assert orthogonalize(torch.zeros(shape)).abs().max() == 0


def test_steps_equal_torchs() -> None:
    """The blocks' matrices follow torch.optim.Muon, all else AdamW, over three steps.

    torch averages its momentum where we sum it: the same once the matrix is normalised.
    """
    torch.manual_seed(0)
    ours, theirs = build(CONFIG), build(CONFIG)
    inner = [n for n, p in ours.named_parameters() if p.ndim == 2 and n.startswith("layers.")]
    assert len(inner) == 7 * CONFIG.n_layers
    optimizer = build_optimizer(ours, OptimizerConfig(kind="muon", lr=1e-3, muon_lr=0.02, weight_decay=0.1))
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 * group["rate"]
    named = dict(theirs.named_parameters())
    muon = torch.optim.Muon(
        [named[n] for n in inner], lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=True, adjust_lr_fn="original"
    )
    tables = [p for n, p in named.items() if n not in inner and p.ndim == 2]
    adam = torch.optim.AdamW(tables, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    norms = torch.optim.AdamW([p for p in named.values() if p.ndim < 2], lr=1e-3, weight_decay=0, betas=(0.9, 0.95))
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        optimizer.step()
        for each in (muon, adam, norms):
            each.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        tolerance = 5e-3 if name in inner else 1e-6
        assert (p - q).abs().max() < tolerance, name
