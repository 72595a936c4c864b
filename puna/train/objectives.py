"""What is minimised: functions (model, batch) -> Loss."""

from typing import NamedTuple

from torch import Tensor

from puna.data.loader import Batch
from puna.model.transformer import Transformer
from puna.ops.cross_entropy import linear_cross_entropy


class Loss(NamedTuple):
    """A *sum* over the batch's trained units and any further sums to report. `fit` alone divides, by the step's n."""

    sum: Tensor
    metrics: dict[str, Tensor]


def next_token(model: Transformer, batch: Batch) -> Loss:
    """Sum of -log p(next token) over the trained positions."""
    hidden = model(batch.tokens, positions=batch.positions, mask=batch.documents, head=False)
    return Loss(linear_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, batch.labels.flatten()), {})
