"""Lets a model of few rows run by native kernels: a function applied to a loaded model, which keeps its weights.

A block whose linear layers are plain or packed becomes two calls around its attention. Everything else a model may be
(training, many rows, adapters, fp64, a GPU) goes on as it was.
"""

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from puna.model.transformer import Block, Linear, Rope, Transformer
from puna.ops.linear import FEW_ROWS, linear
from puna.ops.native import block as by_native
from puna.ops.native.library import Block as Weights
from puna.ops.native.library import Native, native
from puna.ops.native.linear import plain_weight, takes
from puna.ops.packed import Packed

_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def use_native(model: Transformer) -> bool:
    """Let the blocks and the head of `model` use the native kernels where they can; False where there are none.

    The module's classes change, in place; parameters, their names and what else is on the modules stay.
    """
    if native() is None:
        return False
    for layer in model.layers:
        if type(layer) is Block:
            layer.__class__ = NativeBlock
    if type(model.lm_head) is Linear:
        model.lm_head.__class__ = NativeLinear
    return True


class NativeLinear(Linear):
    """A linear layer that reads its weight once for a few rows."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight)


class NativeBlock(Block):
    """A block whose parts before and after attention are one call each, for a few rows without gradients."""

    def before(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """See `Block`."""
        found = self._native(x)
        return super().before(x, rope) if found is None else by_native.before(*found, x, *rope)

    def after(self, x: Tensor, heads: Tensor) -> Tensor:
        """See `Block`."""
        found = self._native(x)
        return super().after(x, heads) if found is None else by_native.after(*found, x, heads)

    def _native(self, x: Tensor) -> tuple[Native, Weights] | None:
        """The kernels and what they read, or None where this input or these weights are not theirs."""
        if x.numel() > FEW_ROWS * x.shape[-1] or torch.is_grad_enabled() or not takes(x):
            return None
        library, weights = native(), _weights(self)
        return None if library is None or weights is None else (library, weights)


class _Known(NamedTuple):
    sources: list[Tensor | Packed]
    places: list[tuple[int, torch.dtype] | None]
    weights: Weights | None


# Not on the modules: what holds addresses must not be copied with them.
_known: WeakKeyDictionary[Block, _Known] = WeakKeyDictionary()


def _weights(block: Block) -> Weights | None:
    """The addresses of a block's weights, made again when one of them has moved."""
    sources = _sources(block)
    places = [(x.data_ptr(), x.dtype) if isinstance(x, Tensor) else None for x in sources]
    known = _known.get(block)
    if known is None or known.places != places or any(a is not b for a, b in zip(known.sources, sources, strict=True)):
        known = _known[block] = _Known(sources, places, _described(block, sources))
    return known.weights


def _sources(block: Block) -> list[Tensor | Packed]:
    """What the seven linear layers and two norms compute with; fewer where a layer is something else."""
    parts = block._modules  # a tenth of the time that nn.Module's attributes take, some hundred times a token
    linears = {**parts["self_attn"]._modules, **parts["mlp"]._modules}  # type: ignore[union-attr]
    found = [_source(linears[name]) for name in _NAMES]
    norms = [parts[name]._parameters["weight"] for name in ("input_layernorm", "post_attention_layernorm")]  # type: ignore[union-attr]
    return [x for x in (*found, *norms) if x is not None]


def _source(layer: nn.Module | None) -> Tensor | Packed | None:
    if layer is None or layer._forward_hooks:  # an adapter that adds to what the layer itself gives
        return None
    if type(layer) is Linear:
        return layer._parameters["weight"]
    return getattr(layer, "packed", None)


def _described(block: Block, sources: list[Tensor | Packed]) -> Weights | None:
    if len(sources) < len(_NAMES) + 2:
        return None
    linears = [x.native if isinstance(x, Packed) else plain_weight(x) for x in sources[: len(_NAMES)]]
    weights = [weight for weight in linears if weight is not None]
    norms = [x for x in sources[len(_NAMES) :] if isinstance(x, Tensor)]
    dtypes = {x.dtype for x in norms}
    if len(weights) < len(_NAMES) or dtypes not in ({torch.float32}, {torch.bfloat16}):
        return None
    dim = block.self_attn.head_dim
    heads, kv_heads = (weight.out // dim for weight in weights[:2])
    pointers = (x.data_ptr() for x in norms)
    bf16 = dtypes == {torch.bfloat16}
    return Weights(*weights, *pointers, heads, kv_heads, dim, block.input_layernorm.eps, bf16)
