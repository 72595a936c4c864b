"""LoRA adapters by request: one base, computed once for all rows, and on each text's rows what its adapter adds.

The model is not changed: while a step runs, hooks on its linear layers add the low-rank parts (many adapters in one
batch as in S-LoRA, Sheng et al. 2023; here a group of rows for each adapter).
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from puna.checkpoint.adapter import adapter_config, embedding_rows, quantized_base_of, read_adapter
from puna.config import nearest
from puna.errors import UsageError
from puna.log import log
from puna.lora import LoraLinear, dora_stretch, with_low_rank
from puna.model.transformer import Transformer
from puna.ops.packed_layers import PackedLinear, packed_layers


class LowRank(NamedTuple):
    """What an adapter does to a layer's output y = W x: (y + scale B A x), times `stretch` where it is DoRA."""

    a: Tensor
    """(r, in)."""
    b: Tensor
    """(out, r), scaled."""
    stretch: Tensor | None
    """(out,): m / ||W + scale B A||."""


class Part(NamedTuple):
    """The rows first .. last - 1 of a step, and what is added to them."""

    first: int
    last: int
    low_rank: LowRank


class Adapters:
    """Named adapters of one model.

    Args:
        folders: adapter directories by name.

    Raises:
        CheckpointError: one that does not fit the model, or that puna does not compute.
    """

    def __init__(self, model: Transformer, folders: Mapping[str, str | Path] | None = None):
        self.model = model
        self._layers: dict[str, dict[str, LowRank]] = {}
        self._keys: dict[str, int] = {}
        self._added = 0
        for name, folder in (folders or {}).items():
            self.add(name, folder)

    @property
    def names(self) -> list[str]:
        """Those that can be asked for."""
        return list(self._layers)

    def add(self, name: str, folder: str | Path) -> None:
        """Read an adapter; one of the same name is replaced.

        Raises:
            CheckpointError: it does not fit the model, or puna does not compute it.
            UsageError: the model has an adapter of its own already.
        """
        if any(isinstance(module, LoraLinear) for module in self.model.modules()):
            raise UsageError("the model has an adapter of its own", where=str(folder), fix="merge it, or load its base")
        self._layers[name] = self._read(Path(folder))
        self._added += 1
        self._keys[name] = self._added

    def remove(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            UsageError: there is none of this name.
        """
        self.check(name)
        del self._layers[name]

    def check(self, name: str | None) -> None:
        """
        Raises:
            UsageError: there is no adapter of this name. None, the base alone, is always there.
        """
        if name is not None and name not in self._layers:
            raise UsageError(f"no adapter `{name}`" + nearest(name, self.names), fix=", ".join(self.names) or "add it")

    def key(self, name: str | None) -> str:
        """What keys and values computed with it depend on: not its name, which another one may get."""
        return "" if name is None else str(self._keys[name])

    @contextlib.contextmanager
    def on(self, rows: Iterable[tuple[str | None, int]]) -> Iterator[None]:
        """Inside, the rows of a flat step (1, N, dim) are computed with adapters: (name, number of rows) in a row."""
        parts: dict[str, list[Part]] = {}
        for first, last, adapter in _grouped(rows):
            for layer, low_rank in self._layers[adapter].items():
                parts.setdefault(layer, []).append(Part(first, last, low_rank))
        hooks = [self.model.get_submodule(name).register_forward_hook(partial(_add, p)) for name, p in parts.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _read(self, folder: Path) -> dict[str, LowRank]:
        if adapter_config(folder).modules_to_save or embedding_rows(folder) is not None:
            raise UsageError(
                "an adapter with layers of its own (modules_to_save) is not told apart by request", where=folder,
                fix=f"puna merge {folder} FOLDER, or load it alone",
            )  # fmt: skip
        if (trained_on := quantized_base_of(folder)) and not packed_layers(self.model):
            log.warning("%s was trained on a base in %s, this one is not quantized", folder, trained_on)
        config, tensors = read_adapter(self.model, folder)
        if any(tensor.startswith("lm_head.") for tensor in tensors):
            raise UsageError("adapters of lm_head are not told apart by request", where=folder, fix="puna merge")
        dtype, device = self.model.compute_dtype, next(self.model.parameters()).device
        layers: dict[str, LowRank] = {}
        for name in dict.fromkeys(tensor.partition(".lora_")[0] for tensor in tensors):
            scale = config.of(name)[1]
            a, b = (tensors[f"{name}.lora_{part}.weight"].to(device) for part in "AB")
            stretch = None
            if config.dora:
                base = self.model.get_submodule(name)
                assert isinstance(base, nn.Linear | PackedLinear)
                magnitude = tensors[f"{name}.lora_magnitude_vector"].to(device)
                # Of the base as it is now: one that is trained on needs `add` again.
                stretch = dora_stretch(magnitude, with_low_rank(base.weight, a, b, scale)).to(dtype)
            layers[name] = LowRank(a.to(dtype), (scale * b).to(dtype), stretch)
        return layers


def _add(parts: list[Part], module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
    for first, last, (a, b, stretch) in parts:
        x, y = inputs[0][0, first:last], output[0, first:last]
        y.addmm_(x @ a.T, b.T)
        if stretch is not None:
            y.mul_(stretch)


def _grouped(rows: Iterable[tuple[str | None, int]]) -> Iterator[tuple[int, int, str]]:
    """(first, last + 1, adapter) of neighbours with one adapter; nothing for rows of the base alone."""
    first = 0
    for name, group in groupby(rows, key=itemgetter(0)):
        count = sum(n for _, n in group)
        if name is not None:
            yield first, first + count, name
        first += count
