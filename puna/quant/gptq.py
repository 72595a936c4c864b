"""GPTQ (Frantar et al. 2022): round a column at a time and let the columns that follow make good for its error.

What is kept small is not the weights' error but that of the outputs on a calibration text, by the inputs' second
moments. Blocks are done in order, each on the inputs that the quantized blocks before it make.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from puna.errors import NumericError
from puna.model.transformer import Transformer
from puna.ops.packed import Packed
from puna.ops.rope import rope_tables
from puna.quant.quantize import put
from puna.quant.rounding import check_finite, packed_from, searched_scale, whole_numbers
from puna.quant.schemes import Kind

_DAMPING = 0.01  # of the mean diagonal: inputs that hardly vary must not be leant on


@torch.no_grad()
def gptq(
    model: Transformer, plan: Mapping[str, Kind], rows: Tensor, progress: Callable[[str], None] = lambda name: None
) -> None:
    """Replace the linear layers of the blocks by packed ones, in place.

    Args:
        plan: what each of them becomes, by name.
        rows: (N, T) ids of the calibration text.
        progress: is told the name of each layer that is done.
    """
    positions = torch.arange(rows.shape[1], device=rows.device)[None]
    rope = rope_tables(model.frequencies, positions)
    hidden = [model.embed_tokens(row[None]).to(model.compute_dtype) for row in rows]
    for index, block in enumerate(model.layers):
        names = [name for name in plan if name.startswith(f"layers.{index}.")]
        with _second_moments(model, names) as moments:
            for x in hidden:
                block(x, rope, None, None, index, positions)
        for name in names:
            weight = model.get_parameter(f"{name}.weight")
            packed = rounded_in_turn(weight, moments.pop(name), plan[name])
            put(model, name, packed, weight.device)
            progress(name)
        hidden = [block(x, rope, None, None, index, positions) for x in hidden]


def rounded_in_turn(weight: Tensor, moments: Tensor, kind: Kind) -> Packed:
    """(out, in) rounded so that the error of W x is small; moments (in, in) is the sum of x x^T.

    With U the upper Cholesky factor of the inverse moments, the error e of column j, over U_jj, is taken from every
    column k > j in the share U_jk.

    Raises:
        NumericError: weights or moments that are not finite.
    """
    check_finite(weight)
    if not moments.isfinite().all():
        raise NumericError(
            "what enters the layer is not finite", cause="the model had diverged, or its dtype is narrow"
        )
    left = weight.float().clone()
    group = kind.group or weight.shape[1]
    factor = _inverse_factor(moments)
    codes, scales = torch.empty_like(left), left.new_empty(len(left), left.shape[1] // group)
    for start in range(0, left.shape[1], group):
        scale = searched_scale(left[:, start : start + group], kind.bits)
        scales[:, start // group] = scale[:, 0]
        errors = torch.empty_like(left[:, start : start + group])
        stop = start + group
        for j in range(start, stop):
            codes[:, j] = whole_numbers(left[:, j : j + 1], scale, kind.bits)[:, 0]
            errors[:, j - start] = (left[:, j] - codes[:, j] * scale[:, 0]) / factor[j, j]
            left[:, j:stop] -= errors[:, j - start, None] * factor[None, j, j:stop]
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return packed_from(codes, scales, kind.bits, group, kind.activations)


@contextlib.contextmanager
def _second_moments(model: Transformer, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Sum of x x^T over the inputs x that each layer sees inside the block, by name: (in, in) fp32."""
    moments: dict[str, Tensor] = {}

    def add(name: str, _: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2).float()
        moments[name] = moments.get(name, 0) + x.T @ x

    hooks = [model.get_submodule(name).register_forward_pre_hook(partial(add, name)) for name in names]
    try:
        yield moments
    finally:
        for hook in hooks:
            hook.remove()


def _inverse_factor(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse, of moments with something added to their diagonal."""
    damped = moments.double()
    damped.diagonal().add_(_DAMPING * damped.diagonal().mean().clamp(min=1e-12))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()
