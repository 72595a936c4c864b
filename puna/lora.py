"""LoRA (Hu et al. 2021): y = W x + (alpha / r) B A x with W frozen. A transform of any model with Linear layers."""

import math

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from puna.config import Config, nearest
from puna.errors import UsageError
from puna.model.transformer import Linear
from puna.ops.low_rank import low_rank_linear

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoraConfig(Config):
    """Low-rank adapters on the named linear layers."""

    rank: PositiveInt = 16
    """Higher: closer to full fine-tuning, more memory."""
    alpha: PositiveFloat = 32.0
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of the adapter's input; helps when rows are few."""
    targets: list[str] = list(LINEARS)
    """All linear layers of a block by default; fewer learn less and cost less."""


class LoraLinear(nn.Module):
    """A frozen linear layer with an adapter. B starts at zero, so nothing changes before the first step."""

    def __init__(self, base: nn.Linear, config: LoraConfig):
        super().__init__()
        self.base = base
        self.scale, self.dropout = config.alpha / config.rank, config.dropout
        with torch.device(base.weight.device):
            self.lora_A = Linear(base.in_features, config.rank)
            self.lora_B = Linear(config.rank, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out). The adapter computes in x's dtype, whatever it is stored in."""
        if self.dropout and self.training:
            return self.base(x) + self.scale * self.lora_B(self.lora_A(F.dropout(x, self.dropout)))
        base, a, b = (layer.weight.to(x.dtype) for layer in (self.base, self.lora_A, self.lora_B))
        return low_rank_linear(x, base, a, b, self.scale)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The base layer with the adapter added into its weight; the sum is made in fp32 at least."""
        wide = torch.promote_types(self.base.weight.dtype, torch.float32)
        delta = self.scale * (self.lora_B.weight.to(wide) @ self.lora_A.weight.to(wide))
        self.base.weight.copy_(self.base.weight.to(wide) + delta)
        return self.base


def add_lora(model: nn.Module, config: LoraConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
    """Freeze `model` and put adapters on its target layers, in place. A is kaiming uniform, as PEFT has it; B zero.

    Raises:
        UsageError: a target that names no layer.
    """
    model.requires_grad_(False)
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    names = {name.rpartition(".")[2] for name, _ in found}
    for target in config.targets:
        if target not in names:
            raise UsageError(
                f"lora.targets: no layer `{target}`" + nearest(target, sorted(names)), fix=", ".join(LINEARS)
            )
    generator = torch.Generator().manual_seed(seed)
    for name, base in found:
        parent, _, leaf = name.rpartition(".")
        if leaf not in config.targets:
            continue
        layer = LoraLinear(base, config)
        bound = 1 / math.sqrt(base.in_features)  # kaiming_uniform(a=sqrt(5)) in closed form
        start = torch.empty(config.rank, base.in_features).uniform_(-bound, bound, generator=generator)
        layer.lora_A.weight.data = start.to(base.weight.device, dtype)
        layer.lora_B.weight.data = torch.zeros_like(layer.lora_B.weight, dtype=dtype)
        setattr(model.get_submodule(parent), leaf, layer)


def merge_lora(model: nn.Module) -> None:
    """Add every adapter into its base weight and take it off, in place."""
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLinear)]:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.merged())
    model.requires_grad_(True)


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """`layers.0.self_attn.q_proj.lora_A.weight` and so on."""
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}
