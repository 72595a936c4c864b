"""Evaluation amid training."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off inside the block, whatever the model was doing; each module's mode comes back after it."""
    training = [module for module in model.modules() if module.training]  # often none: `eval()` costs what a layer does
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
