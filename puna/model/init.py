"""From a config to a model with weights: on the meta device first, then filled in one place."""

import hashlib

import torch
from torch import nn

from puna.model.config import ModelConfig
from puna.model.transformer import Transformer


def build_model(config: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> Transformer:
    """The model without storage (meta device). Follow with `init_weights` or a checkpoint's `load`."""
    with torch.device("meta"):
        return Transformer(config, compute_dtype)


def materialize(model: Transformer, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
    """Give every parameter storage, uninitialised, and tie what the config ties."""
    model.to(dtype).to_empty(device=device)
    if model.config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight


@torch.no_grad()
def init_weights(model: Transformer, seed: int) -> None:
    """Fill the parameters. Meta published no scheme; this is the common one for small Llamas.

    Matrices are normal with std dim^-0.5; those that write to the residual stream (o_proj, down_proj) start at zero,
    so every block is the identity at step 0. A tied model so begins by predicting its own input with confidence (loss
    14 instead of ln V), forgets that in some twenty steps and then learns faster than from embeddings of std 0.02.
    Each tensor draws from a generator of its own, seeded by (seed, name): values do not depend on order or sharding.
    """
    std = model.config.dim**-0.5
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.ones_(parameter)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(parameter)
        else:
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest[:7], "little"))
            nn.init.normal_(parameter, std=std, generator=generator)
