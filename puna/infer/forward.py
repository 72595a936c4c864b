"""One forward over pieces of several texts, laid out in a flat row."""

from typing import NamedTuple

import torch
from torch import Tensor

from puna.infer.cache.paged_cache import PagedCache
from puna.infer.native import use_native
from puna.model.mode import evaluating
from puna.model.transformer import Transformer
from puna.ops.paged_attention import Piece


class Row(NamedTuple):
    """Ids of a text from place `start` on, and the blocks of all of it so far."""

    ids: list[int]
    start: int
    table: list[int]


def forward(model: Transformer, cache: PagedCache, rows: list[Row]) -> Tensor:
    """The final hidden states of the rows' ids, one row after another: (N, dim).

    Whoever generates comes through here, so here the model is told that it may use the native kernels.
    """
    use_native(model)
    ids = [i for row in rows for i in row.ids]
    places = [p for row in rows for p in range(row.start, row.start + len(row.ids))]
    tokens, positions = torch.tensor([[ids], [places]], device=cache.device)
    step = cache.step([Piece(row.start, len(row.ids), row.table) for row in rows])
    with evaluating(model):
        return model(tokens, positions=positions, cache=step, head=False)[0]
