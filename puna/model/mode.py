"""Evaluation amid training."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off inside the block, whatever the model was doing; each module's mode comes back after it."""
    training = _training(model)  # often none: `eval()` costs what a layer does
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _training(model: nn.Module) -> list[nn.Module]:
    """Modules in training; not by `modules()`, which takes a millisecond to name those of a small model."""
    found, open_ = set[nn.Module](), [model]
    while open_:
        module = open_.pop()
        open_ += filter(None, module._modules.values())
        if module.training:
            found.add(module)
    return list(found)
