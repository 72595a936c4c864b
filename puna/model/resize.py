"""A model with another number of rows in its embedding and head."""

import torch
from torch import Tensor, nn

from puna.errors import UsageError
from puna.model.init import build_model
from puna.model.transformer import Linear, Transformer
from puna.ops.packed_layers import packed_layers


@torch.no_grad()
def resize_embeddings(model: Transformer, vocab_size: int, known: int | None = None) -> Transformer:
    """`model` with `vocab_size` rows; it shares all other weights with the given one, which keeps its own rows.

    New rows are the mean of the old ones, taken in fp32, in the embedding and in the head: a token of which nothing is
    known is then about as likely as an average one, where random rows would outshine trained ones. Rows cut off are
    gone; a tied head stays tied.

    Args:
        known: how many of the old rows have a token; those behind are padding, and are new as well.

    Raises:
        UsageError: no rows at all, or an embedding or a head that carries an adapter or is quantized.
    """
    if vocab_size < 1:
        raise UsageError(f"vocab_size={vocab_size}", fix="at least one row")
    _check(model)
    known = min(known or vocab_size, model.config.vocab_size, vocab_size)
    resized = build_model(model.config.model_copy(update={"vocab_size": vocab_size}), model.compute_dtype)
    resized.layers, resized.norm = model.layers, model.norm
    resized.embed_tokens.weight = _resized(model.embed_tokens.weight, known, vocab_size)
    tied = model.config.tie_embeddings
    resized.lm_head.weight = resized.embed_tokens.weight if tied else _resized(model.lm_head.weight, known, vocab_size)
    return resized.train(model.training)


def _check(model: Transformer) -> None:
    """Subclasses pass: they compute the same sooner."""
    if any(layer in packed_layers(model) for layer in ("embed_tokens", "lm_head")):
        raise UsageError(
            "the embedding or the head is quantized: rows cannot be added",
            fix="puna.load(..., packed=False), or puna convert",
        )
    if not (isinstance(model.embed_tokens, nn.Embedding) and isinstance(model.lm_head, Linear)):
        raise UsageError("the embedding or the head carries an adapter", fix="merge it first: puna merge")


def _resized(weight: Tensor, known: int, rows: int) -> nn.Parameter:
    mean = weight[:known].float().mean(0, keepdim=True).to(weight.dtype)  # (1, D)
    return nn.Parameter(torch.cat([weight[:known], mean.expand(rows - known, -1)]), weight.requires_grad)
