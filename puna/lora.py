"""LoRA (Hu et al. 2021): y = W x + s B A x with W frozen; rsLoRA and DoRA. Of any model with Linear layers."""

import math
import re
from collections.abc import Callable, Iterable
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from puna.config import Config, nearest
from puna.errors import UsageError
from puna.model.transformer import Linear
from puna.ops.low_rank import low_rank_linear
from puna.ops.packed_layers import PackedEmbedding, PackedLinear

AnyLinear = nn.Linear | PackedLinear
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL = "all-linear"
# No quantifier on a group: what matches nothing would otherwise be tried in exponentially many ways.
_PATTERN = re.compile(r"(?:[\w|^$()-]|\.[*+]?|\\[.dw][*+]?|\[[\w-]+\][*+]?)*")
_QUANTIFIERS = 4


class LoraConfig(Config):
    """Low-rank adapters on the named linear layers."""

    rank: PositiveInt = 16
    """Higher: closer to full fine-tuning; memory and the adapter's file grow with it."""
    alpha: PositiveFloat = Field(default=32.0, allow_inf_nan=False)
    """The adapter's output is scaled by alpha / rank. Higher: learns faster, like a higher rate, until it diverges."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of the adapter's input. Higher: learns few rows less by heart; costs steps, and a pass over the input."""
    targets: list[str] | str = list(LINEARS)
    """Layers by name, `all-linear`, or a pattern of whole names such as `.*[.]mlp[.].*`; fewer cost less."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank), so that a high rank learns as fast as a low one (Kalajdzievski 2023)."""
    dora: bool = False
    """Train the length of each row apart from its direction (Liu et al. 2024); slower, better at low ranks."""
    rank_pattern: dict[str, PositiveInt] = {}
    """Other ranks for some layers, by the end of their name or a pattern of it: {q_proj: 8, layers.0.mlp.up_proj: 4}"""
    alpha_pattern: dict[str, PositiveFloat] = {}
    """Likewise other alphas."""
    modules_to_save: list[Annotated[str, Field(min_length=1)]] = []
    """Layers trained whole beside the adapters, by the end of their names: embed_tokens and lm_head (for new tokens or
    a new language), norm (every norm). Each costs its weights four times in fp32, and lies in the adapter's file."""

    def of(self, name: str) -> tuple[int, float]:
        """(rank, scale) of the layer `name`."""
        rank = self.rank_pattern.get(_pattern_of(self.rank_pattern, name) or "", self.rank)
        alpha = self.alpha_pattern.get(_pattern_of(self.alpha_pattern, name) or "", self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


class LoraLinear(nn.Module):
    """A frozen linear layer with an adapter. B starts at zero, so nothing changes before the first step."""

    def __init__(self, base: AnyLinear, rank: int, scale: float, dropout: float = 0.0, dora: bool = False):
        super().__init__()
        self.base, self.scale, self.dropout = base, scale, dropout
        self.product: Callable[[Tensor, Tensor], Tensor] | None = None
        """(x, whole weight) -> (..., out), in place of base and adapter apart: of a weight that is rounded whole."""
        with torch.device(_matrix(base).device):
            self.lora_A = Linear(base.in_features, rank)
            self.lora_B = Linear(rank, base.out_features)
            magnitude = nn.Parameter(torch.empty(base.out_features)) if dora else None
        self.lora_magnitude_vector: nn.Parameter | None
        self.register_parameter("lora_magnitude_vector", magnitude)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out). The adapter computes in x's dtype, whatever it is stored in."""
        if self.product is not None:
            return self.product(x, self.full_weight())
        stretch = self._stretch()
        if self.dropout and self.training:
            dropped = F.dropout(x, self.dropout)
            added = self.scale * self.lora_B(self.lora_A(dropped))
            if stretch is None:
                return self.base(x) + added
            stretch = stretch.to(x.dtype)  # W x itself is kept, what DoRA adds to it is dropped (the official code)
            return self.base(x) + (stretch - 1) * self.base(dropped) + stretch * added
        if isinstance(self.base, PackedLinear):  # its product keeps the packed weight alone for the backward
            out = self.base(x) + self.scale * self.lora_B(self.lora_A(x))
        else:
            base, a, b = (layer.weight.to(x.dtype) for layer in (self.base, self.lora_A, self.lora_B))
            out = low_rank_linear(x, base, a, b, self.scale)
        return out if stretch is None else out * stretch.to(x.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The base layer with the adapter added into its weight.

        Raises:
            UsageError: a quantized base: its few values have no room for what an adapter adds.
        """
        if isinstance(self.base, PackedLinear):
            raise UsageError(
                "an adapter cannot be merged into quantized weights", cause="most of it would be rounded away",
                fix="puna merge, which dequantizes the base, and puna quantize after it",
            )  # fmt: skip
        self.base.weight.copy_(self.full_weight())
        return self.base

    def full_weight(self) -> Tensor:
        """The base weight with the adapter in it, (out, in), in fp32 at least; gradients flow to the adapter."""
        stretch, weight = self._stretch(), self._sum()
        return weight if stretch is None else stretch[:, None] * weight

    def _stretch(self) -> Tensor | None:
        """DoRA's m / ||W + s B A|| of each row, (out,). The norm is a constant (section 4.3): half the memory."""
        magnitude = self.lora_magnitude_vector
        if magnitude is None:
            return None
        with torch.no_grad():
            whole = self._sum()
        return dora_stretch(magnitude, whole)

    def _sum(self) -> Tensor:
        return with_low_rank(self.base.weight, self.lora_A.weight, self.lora_B.weight, self.scale)

    @property
    def weight(self) -> Tensor:
        """(out, in) with the adapter in it: the loss multiplies by the head's weight, and never calls the head.

        Raises:
            UsageError: training with dropout, which is of an input that this product does not see.
        """
        if self.dropout and self.training:
            raise UsageError(
                "lora.dropout with an adapter on lm_head", cause="the loss multiplies by its weight as a whole",
                fix="lora.dropout=0, or lora.targets without lm_head",
            )  # fmt: skip
        return self.full_weight()


def with_low_rank(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + s B A, (out, in), in fp32 at least."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(wide) + scale * (b.to(wide) @ a.to(wide))


def dora_stretch(magnitude: Tensor, weight: Tensor) -> Tensor:
    """DoRA's m / ||W + s B A|| of each row (Liu et al. 2024, equation 5): (out,), of the whole `weight`."""
    norm = weight.norm(dim=1)
    return magnitude.to(norm.dtype) / norm.clamp(min=torch.finfo(norm.dtype).tiny)  # a row of zeros stays one


def add_lora(model: nn.Module, config: LoraConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
    """Freeze `model` and put adapters on its target layers, in place. A is kaiming uniform, as PEFT has it; B zero.

    DoRA's magnitudes start as the rows' lengths, so the weights have to be there. What `config.modules_to_save` names
    is thawed, in `dtype`; a tied head stays tied.

    Raises:
        UsageError: a target that names no layer.
    """
    model.requires_grad_(False)
    for parameter in whole_parameters(model, config).values():
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    for name, base in adapted_layers(model, config).items():
        rank, scale = config.of(name)
        layer = LoraLinear(base, rank, scale, config.dropout, config.dora)
        bound = 1 / math.sqrt(base.in_features)  # kaiming_uniform(a=sqrt(5)) in closed form
        start = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        layer.lora_A.weight.data = start.to(_matrix(base).device, dtype)
        layer.lora_B.weight.data = torch.zeros_like(layer.lora_B.weight, dtype=dtype)
        if layer.lora_magnitude_vector is not None:
            weight = base.weight.detach()
            wide = torch.promote_types(weight.dtype, dtype)
            layer.lora_magnitude_vector.data = weight.to(wide).norm(dim=1).to(dtype)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)


def adapted_layers(model: nn.Module, config: LoraConfig) -> dict[str, AnyLinear]:
    """The layers that `config.targets` means, by name.

    Raises:
        UsageError: a target that names no layer, or a tied head; a pattern that could take forever.
    """
    chosen = _chosen(model, config)
    if both := [name for name in chosen if _is_saved(name, config)]:
        raise UsageError(
            f"{both[0]} is among lora.targets and among lora.modules_to_save",
            cause="trained whole, it needs no adapter", fix=f"lora.targets without {both[0].rpartition('.')[2]}",
        )  # fmt: skip
    embeddings = [_matrix(m) for m in model.modules() if isinstance(m, nn.Embedding | PackedEmbedding)]
    if tied := [n for n, m in chosen.items() if any(_matrix(m) is matrix for matrix in embeddings)]:
        raise UsageError(
            f"lora.targets: {tied[0]} is tied to the embedding", cause="merging its adapter would change both",
            fix="other layers, or a model with a head of its own",
        )  # fmt: skip
    return chosen


def merge_lora(model: nn.Module) -> None:
    """Add every adapter into its base weight and take it off, in place."""
    for name, layer in lora_layers(model).items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.merged())
    model.requires_grad_(True)


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The layers with an adapter, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoraLinear)}


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """`layers.0.self_attn.q_proj.lora_A.weight` and so on."""
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


def whole_parameters(model: nn.Module, config: LoraConfig) -> dict[str, nn.Parameter]:
    """`embed_tokens.weight` and so on of what `config.modules_to_save` names; of a tied head only the embedding's.

    Names are matched by their ends as PEFT matches them: `norm` is every norm, `model.norm` the last one.

    Raises:
        UsageError: a name of no layer, or a layer that is quantized.
    """
    # By parameters: a layer may have its place taken by one of another kind that keeps its weight (quant/qat.py).
    named = {name: p for name, p in model.named_parameters(remove_duplicate=False) if ".lora_" not in name}
    weights = {name.removesuffix(".weight"): p for name, p in named.items() if name.endswith(".weight")}
    packed = [name for name, m in model.named_modules() if isinstance(m, PackedLinear | PackedEmbedding)]
    for target in config.modules_to_save:
        if not any(_on_disk(name).endswith(target) for name in (*weights, *packed)):
            fix = "embed_tokens, lm_head, norm"
            raise UsageError(f"lora.modules_to_save: no layer `{target}`" + nearest(target, fix.split(", ")), fix=fix)
    if frozen := [name for name in packed if _is_saved(name, config)]:
        raise frozen_whole(frozen[0])
    chosen = {id(p) for name, p in weights.items() if _is_saved(name, config)}
    return {name: p for name, p in model.named_parameters() if id(p) in chosen}


def frozen_whole(name: str) -> UsageError:
    """What to say of a packed layer in `modules_to_save`."""
    return UsageError(
        f"lora.modules_to_save: {name} is quantized", cause="packed weights are frozen",
        fix="an adapter on it (lora.targets), or a base that is not quantized",
    )  # fmt: skip


def _is_saved(name: str, config: LoraConfig) -> bool:
    return any(_on_disk(name).endswith(target) for target in config.modules_to_save)


def _on_disk(name: str) -> str:
    return name if name == "lm_head" else f"model.{name}"


def _chosen(model: nn.Module, config: LoraConfig) -> dict[str, AnyLinear]:
    found = {name: m for name, m in model.named_modules() if isinstance(m, AnyLinear)}
    if isinstance(config.targets, str):
        pattern = r".*\.(" + "|".join(LINEARS) + ")" if config.targets == ALL else simple_pattern(config.targets)
        chosen = {n: m for n, m in found.items() if re.fullmatch(pattern, n) or re.fullmatch(pattern, f"model.{n}")}
        if not chosen:
            raise UsageError(
                f"lora.targets: no layer matches `{config.targets}`", fix=f"{ALL}, or {', '.join(LINEARS)}"
            )
        return chosen
    for target in config.targets:
        if not any(_ends(name, target) for name in found):
            leaves = sorted({name.rpartition(".")[2] for name in found})
            raise UsageError(f"lora.targets: no layer `{target}`" + nearest(target, leaves), fix=", ".join(LINEARS))
    return {n: m for n, m in found.items() if any(_ends(n, target) for target in config.targets)}


def _matrix(layer: AnyLinear | nn.Embedding | PackedEmbedding) -> Tensor:
    """What two tied layers share."""
    return layer.codes if isinstance(layer, PackedLinear | PackedEmbedding) else layer.weight


def _ends(name: str, target: str) -> bool:
    """Whether `target` is the last names of a layer; on disk a name begins with `model.`"""
    return f".model.{name}".endswith(f".{target}")


def _pattern_of(patterns: Iterable[str], name: str) -> str | None:
    """The first pattern that the end of a layer's name on disk matches, as PEFT decides it."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({simple_pattern(p)})$", f"model.{name}")), None)


def simple_pattern(pattern: str) -> str:
    """`pattern`, if it is one that a stranger's file may name: matched in no time, whatever it is held against.

    Raises:
        UsageError: anything else.
    """
    if not _PATTERN.fullmatch(pattern) or sum(pattern.count(c) for c in "*+") > _QUANTIFIERS:
        raise UsageError(f"lora: `{pattern[:60]}` is not a simple pattern", fix="names, `.*`, `[0-9]+` and (a|b)")
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(f"lora: `{pattern[:60]}` is not a pattern: {error}") from None
    return pattern
