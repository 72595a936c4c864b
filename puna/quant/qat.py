"""Quantization-aware training: products as `puna quantize` will make them, gradients as if nothing were rounded.

A weight of full precision is trained; each forward rounds it, as it would be saved and quantized, and computes the
product of the quantized model. The gradient passes straight through the rounding of weights and activations (Bengio et
al. 2013), whose own derivative is zero. As in Llama 3.2 the head is rounded to 8 bits, and the embedding is not.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from puna.config import Config
from puna.model.transformer import Linear, Transformer
from puna.ops.packed import dequantize, packed_linear, quantize_rows
from puna.quant.quantize import planned
from puna.quant.schemes import Kind, trained_scheme


class QatConfig(Config):
    """Train under the rounding of a scheme, so that `puna quantize` afterwards changes nothing.

    Rounding from the first step is for models that are tuned already: tune without, then tune the result with it.
    """

    scheme: Literal["int8-int4", "int4"] = "int8-int4"
    """int8-int4: what enters a product is rounded to 8 bits too: faster where int8 products are, a little worse."""
    group: PositiveInt = 32
    """Weights that share a scale: 32, 64, 128, or 256 (of int8-int4). Larger: a smaller model (4.5 bits a weight at 32,
    4.06 at 256), coarser steps."""


def qat_plan(model: Transformer, config: QatConfig) -> dict[str, Kind]:
    """What each layer of a plain model is rounded to, by name: the plan of `puna quantize`.

    Raises:
        UsageError: groups that the scheme does not have, or columns that are not whole groups.
    """
    return planned(model, trained_scheme(config.scheme, config.group))


def round_layers(model: Transformer, plan: Mapping[str, Kind], stored: torch.dtype) -> None:
    """Put layers that round in the places of those of `plan`, in place; parameters keep their names.

    Args:
        stored: what the weights will be saved in, and are rounded to before all else.
    """
    for name, kind in plan.items():
        parent, _, leaf = name.rpartition(".")
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        setattr(model.get_submodule(parent), leaf, (_Head if name == "lm_head" else _Linear)(layer, kind, stored))
    if "lm_head" in plan and plan["lm_head"].activations == "int8":
        # Before the head, since the loss multiplies what leaves the norm by the head's weight itself.
        model.norm.register_forward_hook(_rounded_output)


def rounded_product(kind: Kind, stored: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """(x (..., in), weight (out, in)) -> (..., out): what an adapter's layer computes with its whole weight."""
    return partial(rounded_linear, kind=kind, stored=stored)


def rounded_linear_eager(x: Tensor, weight: Tensor, kind: Kind, stored: torch.dtype) -> Tensor:
    """The oracle: the product of rounded x (..., in) and rounded weight (out, in), in x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = straight_through(x.to(wide), round_rows) if kind.activations == "int8" else x
    return F.linear(rows.to(wide), rounded_weight(weight, kind, stored).to(wide)).to(x.dtype)


def rounded_linear(x: Tensor, weight: Tensor, kind: Kind, stored: torch.dtype) -> Tensor:
    """`rounded_linear_eager` by the quantized model's own product; autograd keeps the weight in its 4 bits."""
    return _RoundedLinear.apply(x, weight, kind, stored)  # type: ignore[no-any-return]


def rounded_weight(weight: Tensor, kind: Kind, stored: torch.dtype) -> Tensor:
    """(out, in) -> what saving, quantizing and dequantizing make of it, in its own dtype; the gradient is its own."""
    return straight_through(weight, lambda w: dequantize(kind.pack(w.to(stored))).to(w.dtype))


def round_rows(x: Tensor) -> Tensor:
    """(..., in) -> what 8 bits hold of each row, in x's dtype."""
    codes, scale = quantize_rows(x.to(torch.promote_types(x.dtype, torch.float32)))
    return (codes * scale).to(x.dtype)


def straight_through(x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """rounding(x), with the gradient of x."""
    return _StraightThrough.apply(x, rounding)  # type: ignore[no-any-return]


class _Linear(Linear):
    """A layer of the blocks. It is no `Linear` to those who read weights past it, such as the native kernels."""

    def __init__(self, layer: nn.Linear, kind: Kind, stored: torch.dtype):
        with torch.device("meta"):
            super().__init__(layer.in_features, layer.out_features)
        self.weight, self.kind, self.stored = layer.weight, kind, stored

    def forward(self, input: Tensor) -> Tensor:
        return rounded_linear(input, self.weight, self.kind, self.stored)


class _Head(nn.Module):
    """The head, whose `weight` is the rounded one: losses that fuse it with themselves take it from here.

    The parameter has the same name, so that it is saved, sharded and tied as it was.
    """

    def __init__(self, layer: nn.Linear, kind: Kind, stored: torch.dtype):
        super().__init__()
        self._parameters["weight"] = layer.get_parameter("weight")
        self.kind, self.stored = kind, stored

    @property
    def weight(self) -> Tensor:
        """(vocab, dim); while it is this rank's part alone, which FSDP looks for here, that part."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight if hasattr(weight, "full_tensor") else rounded_weight(weight, self.kind, self.stored)

    def forward(self, input: Tensor) -> Tensor:
        """(..., dim), rounded already -> (..., vocab)."""
        return F.linear(input, self.weight.to(input.dtype))


def _rounded_output(module: nn.Module, given: Any, out: Tensor) -> Tensor:
    return straight_through(out, round_rows)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:  # type: ignore[override]
        return rounding(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad, None


class _RoundedLinear(torch.autograd.Function):
    """dL/dx = dy round(W),  dL/dW = dy^T round(x)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, kind: Kind, stored: torch.dtype) -> Tensor:  # type: ignore[override]
        ctx.packed = kind.pack(weight.to(stored))
        ctx.save_for_backward(x)
        ctx.weight_dtype = weight.dtype
        return packed_linear(x, ctx.packed)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (x,) = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ dequantize(ctx.packed).to(grad.dtype)
        if ctx.needs_input_grad[1]:
            rows = round_rows(x) if ctx.packed.activations == "int8" else x
            grad_weight = (grad.flatten(0, -2).T @ rows.flatten(0, -2)).to(ctx.weight_dtype)
        return grad_x, grad_weight, None, None
