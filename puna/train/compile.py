"""torch.compile where it pays: the two halves of a block around attention, one graph for all layers."""

from collections.abc import Callable
from typing import Any

import torch

from puna.device import compile_problem
from puna.log import log
from puna.model.transformer import Block, Transformer


def compile_blocks(model: Transformer) -> bool:
    """Compile what lies before and after attention in every block; without a working compiler all stays eager.

    Attention runs on products that no compiler makes faster, and one graph of the whole model takes minutes. The
    first step pays for it: some 20 to 40 s on two cores, a few when the cache of the last time is there.
    """
    if problem := compile_problem():
        log.warning("no torch.compile here, training eagerly: %s", problem)
        return False
    for layer in model.layers:
        assert isinstance(layer, Block)
        layer.before, layer.after = _in_training(layer.before), _in_training(layer.after)  # type: ignore[method-assign]
    return True


def _in_training(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled where gradients are made; generation has a new shape at every call and would compile for each."""
    compiled = torch.compile(function)
    return lambda *given: (compiled if torch.is_grad_enabled() else function)(*given)
