"""An adapter on the head: the loss multiplies by the head's weight in pieces and never calls the layer."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from puna.data.loader import Batch
from puna.errors import UsageError
from puna.lora import LoraConfig, add_lora, lora_parameters
from puna.model.config import ModelConfig
from puna.model.init import build_model, init_weights
from puna.train.objectives import next_token


def adapted(shape: ModelConfig, **settings: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_model(shape.model_copy(update={"tie_embeddings": False}))
    model.to_empty(device="cpu")
    init_weights(model, 0)
    add_lora(model.double(), LoraConfig(rank=4, targets=["lm_head", "q_proj"], **settings), dtype=torch.float64)
    for parameter in lora_parameters(model).values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.train()


@pytest.mark.parametrize("dora", [False, True])
def test_the_loss_sees_the_heads_adapter(dora: bool, shape: ModelConfig) -> None:
    """No weight to multiply by, or that of the base alone: the head's adapter would never learn."""
    model = adapted(shape, dora=dora)
    tokens = torch.randint(0, shape.vocab_size, (2, 9))
    batch = Batch(tokens[:, :-1], tokens[:, 1:].contiguous(), 16)
    loss = next_token(model, batch).sum  # type: ignore[arg-type]
    logits = model(batch.tokens)
    expected = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    named = lora_parameters(model)
    found, wanted = (torch.autograd.grad(value, list(named.values())) for value in (loss, expected))
    for name, ours, theirs in zip(named, found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_dropout_of_the_heads_adapter_is_refused(shape: ModelConfig) -> None:
    """Asked for and left out: another model than the config says."""
    model = adapted(shape, dropout=0.1)
    batch = Batch(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long), 4)
    with pytest.raises(UsageError, match="lm_head"):
        next_token(model, batch)  # type: ignore[arg-type]
    assert model(batch.tokens).shape == (1, 4, shape.vocab_size)
