"""Perplexity of a model on held-out text, in the unit that compares across tokenizers: bits per byte."""

import math
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna.model.mode import evaluating
from puna.model.transformer import Transformer
from puna.ops.cross_entropy import linear_cross_entropy
from puna.tokenizer.tokenizer import Tokenizer

_ROWS = 512  # of logits at a time: 100 MB of Llama 2's, 260 of Llama 3's


class Ids(Protocol):
    """A text as ids: token shards, or `InMemory`."""

    @property
    def tokens(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def read(self, start: int, length: int) -> np.ndarray: ...


class InMemory:
    """Ids in memory, read as shards are."""

    def __init__(self, ids: list[int], size: int):
        self.ids, self.tokens, self.bytes = np.asarray(ids), len(ids), size

    def read(self, start: int, length: int) -> np.ndarray:
        return self.ids[start : start + length]


@torch.no_grad()
def bits_per_byte(
    model: Transformer, shards: Ids, seq_len: int, batch_size: int, max_windows: int | None = None
) -> float:
    """-log2 p(text) / bytes, over windows of `seq_len` end to end; a window sees nothing of the one before.

    Every token but the very first is scored once. With `max_windows` only that many, spread evenly, are scored
    and bytes are counted in proportion: an estimate, good for watching a run.
    """
    device = next(model.parameters()).device
    count = -(-(shards.tokens - 1) // seq_len)
    chosen = range(count) if max_windows is None else range(0, count, max(1, -(-count // max_windows)))
    nats = torch.zeros((), dtype=torch.float64)
    scored = 0
    with evaluating(model):
        for start in range(0, len(chosen), batch_size):
            for rows in _windows(shards, chosen[start : start + batch_size], seq_len):
                rows = rows.to(device)
                hidden = model(rows[:, :-1], head=False).flatten(0, 1)
                nats += _nats(model, hidden, rows[:, 1:].flatten()).double().cpu()
                scored += rows.numel() - len(rows)
    return float(nats) / math.log(2) / (shards.bytes * scored / (shards.tokens - 1))


def text_bits_per_byte(
    model: Transformer, tokenizer: Tokenizer, text: str, seq_len: int | None = None
) -> tuple[float, float, int]:
    """(bits per byte, perplexity per token, tokens scored) of a text after BOS; windows of the whole context.

    Without a BOS in the vocabulary the first token is not scored.
    """
    bos = tokenizer.named_id("bos_token")
    ids = InMemory([*([] if bos is None else [bos]), *tokenizer.encode(text)], len(text.encode()))
    length = min(seq_len or model.config.max_seq_len, 2048)
    bits = bits_per_byte(model, ids, length, batch_size=max(1, 4096 // length))
    scored = ids.tokens - 1
    return bits, 2 ** (bits * ids.bytes / scored), scored


def _nats(model: Transformer, hidden: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log p of labels (N,) after hidden (N, dim). A packed head is asked: it may round what enters it."""
    if isinstance(model.lm_head, nn.Linear):
        return linear_cross_entropy(hidden, model.lm_head.weight, labels)
    parts = zip(hidden.split(_ROWS), labels.split(_ROWS), strict=True)
    return sum((F.cross_entropy(model.lm_head(x).float(), y, reduction="sum") for x, y in parts), hidden.new_zeros(()))


def _windows(shards: Ids, chosen: range, seq_len: int) -> list[Tensor]:
    """The chosen windows as batches of one length: the last window of the split may be shorter than the rest."""
    rows: dict[int, list[Tensor]] = {}
    for index in chosen:
        length = min(seq_len + 1, shards.tokens - index * seq_len)
        rows.setdefault(length, []).append(torch.from_numpy(shards.read(index * seq_len, length)))
    return [torch.stack(same) for same in rows.values()]
