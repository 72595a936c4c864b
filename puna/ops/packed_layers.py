"""Layers over packed weights, in the places of `Linear` and `nn.Embedding`. Frozen: their codes take no gradient."""

from typing import Any

from torch import Tensor, nn

from puna.ops.packed import Packed, dequantize, packed_linear

TENSORS = ("codes", "scales", "mins", "table", "scale_table", "scale_max", "scale_offset")
"""The parts of a `Packed`, and the buffers of a layer."""


class _PackedLayer(nn.Module):
    """The parts of a packed weight as buffers, so that they move with the model and are no parameters."""

    codes: Tensor

    def __init__(self, packed: Packed):
        super().__init__()
        self._kind: dict[str, Any] = {name: getattr(packed, name) for name in ("bits", "group", "activations")}
        self._packed: Packed | None = packed
        for name in TENSORS:
            self.register_buffer(name, getattr(packed, name))

    @property
    def packed(self) -> Packed:
        """The weight as it lies: one object while its tensors are the same, since kernels keep their places in it."""
        packed = self._packed
        if packed is None or any(self._buffers[name] is not getattr(packed, name) for name in TENSORS):
            packed = self._packed = Packed(**{name: getattr(self, name) for name in TENSORS}, **self._kind)
        return packed

    @property
    def weight(self) -> Tensor:
        """The weight dequantized anew, (out, in) fp32."""
        return dequantize(self.packed)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves to a device, but keeps dtypes when a model changes its own: they belong to the codes."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has other tensors; and where they lie in memory cannot be copied."""
        return {**self.__dict__, "_packed": None}


class PackedLinear(_PackedLayer):
    """A frozen linear map without bias."""

    def __init__(self, packed: Packed):
        super().__init__(packed)
        self.out_features, self.in_features = packed.shape

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in x's dtype."""
        return packed_linear(x, self.packed)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.packed.bits} bits, groups of {self.packed.group}"


class PackedEmbedding(_PackedLayer):
    """An embedding whose rows are dequantized when they are looked up."""

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) int64 -> (..., dim) fp32."""
        return dequantize(self.packed.rows(tokens.flatten())).view(*tokens.shape, -1)


def packed_layers(model: nn.Module) -> dict[str, PackedLinear | PackedEmbedding]:
    """The layers of a model that are packed, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear | PackedEmbedding)}
