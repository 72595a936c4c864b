"""Lets a model make its next tokens by native kernels: a function applied to a loaded model, which keeps its weights.

A step of the engine with few tokens is then one call for all decoder blocks, plain or packed. Everything else a model
may be in (training, a long prompt, another cache, adapters, fp64, a GPU) goes on as it was.
"""

import ctypes
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module

from puna.infer.cache.paged_cache import StepCache
from puna.model.transformer import MLP, Attention, Block, Linear, Transformer
from puna.ops.linear import linear
from puna.ops.native import library
from puna.ops.native.block import forward
from puna.ops.native.library import KINDS, Native, native
from puna.ops.native.linear import DTYPES, plain_weight, takes
from puna.ops.norm import RMSNorm
from puna.ops.packed import Packed
from puna.ops.packed_layers import TENSORS, PackedLinear
from puna.ops.rope import rope_tables

FEW_TOKENS = 32
"""Up to here a step takes the time of reading the weights, or of torch's many small calls; beyond, torch is faster, but
for bf16 weights by AVX-512, which have kernels of their own for many rows."""


def use_native(model: Transformer) -> bool:
    """Let `model` use the native kernels where it can; False where there are none.

    Classes of modules change, in place; parameters, their names and everything else on the modules stay.
    """
    if native() is None:
        return False
    if type(model) is Transformer:
        model.__class__ = NativeTransformer
    if type(model.lm_head) is Linear:
        model.lm_head.__class__ = NativeLinear
    return True


class NativeLinear(Linear):
    """A linear layer that reads its weight once for a few rows."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight)


class NativeTransformer(Transformer):
    """A model whose blocks are one call for a few tokens over a paged cache."""

    def forward(self, tokens: Tensor, **options: Any) -> Tensor:  # type: ignore[override]
        """See `Transformer`."""
        if (cache := options.get("cache")) is None or (found := _usable(self, tokens, cache)) is None:
            return super().forward(tokens, **options)
        if self.frequencies.device != tokens.device:
            self.frequencies = self.frequencies.to(tokens.device)
        cos, sin = (table[0, 0] for table in rope_tables(self.frequencies, options["positions"]))
        x = self.embed_tokens(tokens[0]).to(self.compute_dtype)
        forward(*found, x, cos, sin, cache.keys, cache.values, cache.pieces.each)
        x = self.norm(x[None])
        return self.lm_head(x) if options.get("head", True) else x


def _usable(model: Transformer, tokens: Tensor, cache: object) -> "tuple[Native, ctypes.Array[library.Block]] | None":
    """The kernels and the weights they read, or None where this step or these weights are not theirs."""
    if not isinstance(cache, StepCache) or torch.is_grad_enabled():
        return None
    if cache.keys.dtype != model.compute_dtype or model.config.head_dim % 32 or not takes(cache.keys):
        return None
    if (kernels := native()) is None or (weights := _weights(model)) is None:
        return None
    many = kernels.wide and cache.keys.dtype == torch.bfloat16 and weights.half
    return (kernels, weights.blocks) if many or tokens.numel() <= FEW_TOKENS else None


# Not on the model: what holds addresses must not be copied with it.
_known: WeakKeyDictionary[Transformer, "_Weights"] = WeakKeyDictionary()


def _weights(model: Transformer) -> "_Weights | None":
    """The addresses of all weights, taken again when one has moved or a module is another; None: not the kernels'."""
    known = _known.get(model)
    if known is None or not known.hold():
        known = _known[model] = _Weights(model)
    return known if known.usable else None


class _Weights:
    """Addresses of the weights of all blocks, and how to see, some hundred times a second, that they still hold."""

    def __init__(self, model: Transformer):
        self._same: list[tuple[dict[str, Any], str, object]] = []
        self._places: list[tuple[Tensor, int]] = []
        self._hooks: list[dict[Any, Any]] = [every_module._global_forward_hooks, every_module._global_forward_pre_hooks]
        self._kept: list[Packed] = []
        made = [self._block(model.layers, name) for name in model.layers._modules]
        whole = [block for block in made if block is not None]
        self._hooked = any(self._hooks)
        self.usable = len(whole) == len(made) and not self._hooked
        self.blocks = (library.Block * len(whole))(*whole)
        self.half = all(weight.kind == KINDS["bfloat16"] for b in whole
                        for weight in (b.q, b.k, b.v, b.o, b.gate, b.up, b.down))  # fmt: skip

    def hold(self) -> bool:
        """Whether every module and tensor is the one that was seen, where it was, and called as it was."""
        return (
            all(names.get(name) is found for names, name, found in self._same)
            and all(tensor.data_ptr() == address for tensor, address in self._places)
            and any(self._hooks) == self._hooked
        )

    def _block(self, layers: nn.ModuleList, name: str) -> library.Block | None:
        block = self._child(layers, name)
        if type(block) is not Block:
            return None
        attention, mlp = self._child(block, "self_attn"), self._child(block, "mlp")
        norms = [self._child(block, name) for name in ("input_layernorm", "post_attention_layernorm")]
        if [type(part) for part in (attention, mlp, *norms)] != [Attention, MLP, RMSNorm, RMSNorm]:
            return None
        named = [(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
        named += [(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")]
        linears = [self._linear(self._child(part, name)) for part, name in named]
        first, second = (self._tensor(norm._parameters, "weight") for norm in norms)
        known = [weight for weight in linears if weight is not None]
        if len(known) < len(linears) or first.dtype != second.dtype or first.dtype not in DTYPES:
            return None
        eps, bf16 = block.input_layernorm.eps, first.dtype == torch.bfloat16
        return library.Block(*known, first.data_ptr(), second.data_ptr(), eps, bf16)

    def _linear(self, layer: nn.Module) -> library.Weight | None:
        if type(layer) is Linear:
            return plain_weight(self._tensor(layer._parameters, "weight"))
        if type(layer) is not PackedLinear:
            return None
        self._same += [(layer._buffers, name, layer._buffers[name]) for name in TENSORS]
        self._kept.append(layer.packed)
        return layer.packed.native

    def _child(self, parent: nn.Module, name: str) -> nn.Module:
        child = parent._modules[name]
        assert child is not None
        self._same.append((parent._modules, name, child))
        self._hooks += [child._forward_hooks, child._forward_pre_hooks]
        return child

    def _tensor(self, names: Any, name: str) -> Tensor:
        tensor = names[name]
        self._same.append((names, name, tensor))
        self._places.append((tensor, tensor.data_ptr()))
        return tensor
