"""What training does to the blocks of a model: compile them, or keep less of them and compute it again."""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from puna.device import compile_problem
from puna.log import log
from puna.model.cache import Cache
from puna.model.transformer import Block, Transformer

Checkpointed = Literal["none", "selective", "full"]


def compile_blocks(model: Transformer, apart: Iterable[nn.Module] = ()) -> bool:
    """Compile what lies before and after attention in every block; without a working compiler all stays eager.

    Attention runs on products that no compiler makes faster, and one graph of the whole model takes minutes. The
    first step pays for it: some 20 to 40 s on two cores, a few when the cache of the last time is there.

    Args:
        apart: layers that stay as they are: packed ones call native kernels, which the compiler tries to look into.
    """
    if problem := compile_problem():
        log.warning("no torch.compile here, training eagerly: %s", problem)
        return False
    for module in apart:
        module.forward = torch.compiler.disable(module.forward)
    for layer in model.layers:
        assert isinstance(layer, Block)
        layer.before, layer.after = _in_training(layer.before), _in_training(layer.after)  # type: ignore[method-assign]
    return True


def checkpoint_blocks(model: Transformer, which: Checkpointed, offload: bool = False) -> None:
    """Keep of a block nothing but its input, and compute it again for its gradient (Chen et al. 2016).

    The second computation draws the dropout of the first, so gradients are those of the plain model, bit for bit.
    Applied after `compile_blocks` and `add_lora`, before `shard`: FSDP gathers a block once for both.

    Args:
        which: full: every block; selective: every second one. Parts of a block were measured too (docs/memory.md):
            none saves as much for the time it costs.
        offload: what is kept of a block waits in pinned CPU memory for its backward; for CUDA devices.
    """
    every = {"none": 0, "selective": 2, "full": 1}[which]
    for layer in list(model.layers)[every - 1 :: every] if every else ():
        assert isinstance(layer, Block)
        layer.forward = _twice(layer.forward, offload)  # type: ignore[method-assign]


def _in_training(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled where gradients are made; generation has a new shape at every call and would compile for each."""
    compiled = torch.compile(function)
    return lambda *given: (compiled if torch.is_grad_enabled() else function)(*given)


def _twice(forward: Callable[..., Tensor], offload: bool) -> Callable[..., Tensor]:
    def recomputed(x: Tensor, rope: Any, mask: Any, cache: Cache | None, *rest: Any) -> Tensor:
        if cache is not None or not torch.is_grad_enabled():  # a cache would be extended a second time
            return forward(x, rope, mask, cache, *rest)
        with _in_cpu_memory() if offload else contextlib.nullcontext():
            return checkpoint(forward, x, rope, mask, cache, *rest, use_reentrant=False)  # type: ignore[no-any-return]

    return recomputed


def _in_cpu_memory() -> saved_tensors_hooks:
    """Floats that are kept for a backward lie in pinned memory until then; the device's own stream copies them."""

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        if not tensor.is_floating_point():  # positions, the same for all blocks
            return tensor.device, tensor
        there = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")
        return tensor.device, there.copy_(tensor, non_blocking=True)

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = packed
        return tensor.to(device, non_blocking=True)

    return saved_tensors_hooks(pack, unpack)
