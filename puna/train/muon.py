"""Muon (Jordan et al. 2024): momentum whose matrices are made orthogonal, so that no direction of a weight lags behind.

For the matrices of the blocks alone; embeddings, head and norms take AdamW in the same optimizer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_STEPS = 5
_A, _B, _C = 3.4445, -4.7750, 2.0315  # Jordan's quintic: singular values from 1e-3 to 1 end near 1 after five steps


class Muon(torch.optim.AdamW):
    """AdamW; groups with `orthogonal: True` take Muon's update, with their own lr, weight decay and betas[1] unused."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        for group in self.param_groups:
            if group.get("orthogonal"):
                self._orthogonal_step(group)
        return super().step(closure)

    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        """p <- p (1 - lr decay) - lr sqrt(max(1, rows / columns)) orthogonal(g + b m), m <- b m + g (Nesterov)."""
        beta = group["betas"][0]
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for p in (p for p in group["params"] if p.grad is not None):
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.mul_(beta).add_(p.grad)
            by_shape.setdefault(p.shape, []).append((p, p.grad.add(momentum, alpha=beta)))
            p.grad = None  # AdamW passes it by
        for (rows, columns), members in by_shape.items():
            updates = orthogonalize(torch.stack([update for _, update in members]))
            scale = group["lr"] * max(1.0, rows / columns) ** 0.5
            for (p, _), update in zip(members, updates, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=scale)


def orthogonalize(matrices: Tensor) -> Tensor:
    """(N, rows, columns) -> the nearest semi-orthogonal matrices, roughly: singular values between 0.7 and 1.2.

    Newton-Schulz in bf16, which its purpose does not notice, on the smaller side.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).bfloat16()
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = _A * x + torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C) @ x
    return (x.mT if tall else x).to(matrices.dtype)
