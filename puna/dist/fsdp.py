"""FSDP2 as a function applied to a model: every rank keeps a part of each parameter, its gradient and its moments."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from puna.device import cast
from puna.ranks import rank, ranks


def shard(model: nn.Module) -> None:
    """Divide the parameters of `model` among the ranks, in place; its blocks are gathered one at a time.

    Gradients are *summed* over ranks: `fit` has divided by the n of all of them. Frozen bf16 weights and fp32 adapters
    share a group; only those that train need one dtype.
    """
    if ranks() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (ranks(),))
    for layer in model.get_submodule("layers").children():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)  # embedding, last norm and head stay gathered from forward to backward: the loss
    for module in _sharded(model):  # takes the head's weight after the model's own forward
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor
        # The buffers that gathering fills, made here: generation would make them in inference mode, which no
        # gradient can pass through.
        module.unshard()
        module.reshard()


def reshard(model: nn.Module) -> None:
    """Give back what a forward without a backward left gathered: from now on parameters are this rank's parts."""
    for module in _sharded(model) if ranks() > 1 else ():
        module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The tensor that the ranks hold parts of; a collective if it is one."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def gathered(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Whole tensors in the CPU memory of rank 0, nothing on the others; one at a time on the device.

    Raises:
        NumericError: a weight that `dtype` cannot hold.
    """
    found = {}
    for name, tensor in tensors.items():
        one = whole(tensor.detach())
        if rank() == 0:
            found[name] = cast(one, dtype or one.dtype, name).cpu().contiguous()
    return found


def _sharded(model: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]
