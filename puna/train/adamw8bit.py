"""AdamW with moments of 8 bits (Dettmers et al. 2022): two bytes a weight where fp32 moments are eight."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from puna.quant.dynamic import BLOCK, dequantize, quantize, table_on

SMALL = 4096
"""Tensors of fewer numbers keep fp32 moments: norms are nothing in memory, and their moments matter most."""
_MOMENTS = ("exp_avg", "exp_avg_sq")
_PART = 1 << 20  # numbers that are fp32 at a time, whole blocks: they stay in a CPU's cache


class AdamW8bit(torch.optim.Optimizer):
    """torch's AdamW, whose moments are read from 8 bits and written back at every step.

    The first moment has a sign, the second does not; each block of 256 has a scale of its own, its largest number. The
    update is made of the moments before they are rounded.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 0.0, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    _step(p, p.grad, self.state[p] or _start(self.state[p], p), group)


def _start(state: dict[str, Any], p: Tensor) -> dict[str, Any]:
    state["step"] = torch.zeros((), dtype=torch.float32)
    for moment in _MOMENTS:
        if p.numel() < SMALL:
            state[moment] = torch.zeros_like(p)
        else:  # the code of zero is not 0, but the scale is
            state[f"{moment}_code"] = torch.zeros(p.shape, dtype=torch.uint8, device=p.device)
            state[f"{moment}_scale"] = torch.zeros(-(-p.numel() // BLOCK), device=p.device)
    return state


def _step(p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    state["step"] += 1
    if "exp_avg" in state:
        _update(p, grad, state["exp_avg"], state["exp_avg_sq"], float(state["step"]), group)
        return
    weights, grads = p.view(-1), grad.reshape(-1)  # a view, or the weights would not be the ones that change
    stored = [(state[f"{name}_code"].view(-1), state[f"{name}_scale"], name == "exp_avg") for name in _MOMENTS]
    for start in range(0, p.numel(), _PART):
        part, blocks = slice(start, start + _PART), slice(start // BLOCK, -(-(start + _PART) // BLOCK))
        m, v = (dequantize(code[part], scale[blocks], table_on(sign, p.device)) for code, scale, sign in stored)
        _update(weights[part], grads[part], m, v, float(state["step"]), group)
        for moment, (code, scale, sign) in zip((m, v), stored, strict=True):
            code[part], scale[blocks] = quantize(moment, sign)


def _update(p: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: float, group: dict[str, Any]) -> None:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2) in place: weight p (n,), its gradient and moments."""
    beta1, beta2 = group["betas"]
    grad = grad.to(m.dtype)
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    p.mul_(1 - group["lr"] * group["weight_decay"])
    spread = v.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    p.addcdiv_(m, spread, value=-group["lr"] / (1 - beta1**step))
