"""Evaluation amid training."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off inside the block, whatever the model was doing; its mode comes back after it."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
