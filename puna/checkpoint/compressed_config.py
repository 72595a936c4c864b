"""config.json's section of compressed-tensors: groups of layers, and which layer is in which."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from puna.errors import CheckpointError, UsageError
from puna.lora import simple_pattern
from puna.ops.packed import Activations, Packed

PACKED, INTEGERS, MIXED = "pack-quantized", "int-quantized", "mixed-precision"
_SIZES = (0, 32, 64, 128, 256)
_IDLE = (
    "quantization_status",
    "global_compression_ratio",
    "version",
    "quant_method",
    "format",
    "config_groups",
    "ignore",
)


class Group(NamedTuple):
    """How the layers that `targets` names are stored. A size of 0 is a whole row."""

    targets: tuple[str, ...]
    bits: int
    size: int
    activations: Activations

    @property
    def form(self) -> str:
        """int8 products have kernels for `int-quantized` alone."""
        return INTEGERS if self.bits == 8 and self.activations == "int8" else PACKED


def group_of(packed: Packed, targets: tuple[str, ...] = ()) -> Group:
    """What a packed weight is, as a config tells it."""
    size = 0 if packed.group == packed.shape[1] else packed.group
    return Group(targets, packed.bits, size, packed.activations)


def quantization_config(layers: Mapping[str, Packed], plain: Iterable[str]) -> dict[str, Any]:
    """config.json's section: the commonest kind is told of all linear layers, others by their names.

    Args:
        layers: packed ones by their disk names.
        plain: linear layers that are not packed.
    """
    kinds = {name: group_of(packed) for name, packed in layers.items()}
    common = Counter(kinds.values()).most_common(1)[0][0]
    named: dict[Group, list[str]] = {}
    for name, kind in kinds.items():
        if kind != common or "embed" in name:
            named.setdefault(kind, []).append(name)
    groups = [*(kind._replace(targets=tuple(names)) for kind, names in named.items())]
    groups.append(common._replace(targets=("Linear",)))
    forms = {group.form for group in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": forms.pop() if len(forms) == 1 else MIXED,
        "quantization_status": "compressed",
        "ignore": list(plain),
        "config_groups": {f"group_{i}": _told(group) for i, group in enumerate(groups)},
    }


def read_groups(section: Mapping[str, Any], where: object) -> list[Group]:
    """The groups of a config's section. What it ignores has no parts of a packed weight, and is not looked at.

    Raises:
        CheckpointError: anything that would compute something else than these groups do.
    """
    odd = {key: value for key, value in section.items() if key not in _IDLE and value}
    if section.get("format") not in (PACKED, INTEGERS, MIXED):
        odd["format"] = section.get("format")
    groups = section.get("config_groups")
    if odd or not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise CheckpointError(
            f"quantization_config: not supported: {str(odd or groups)[:200]}", where=where,
            cause="a compressed-tensors scheme that puna does not compute", fix="the model it was quantized from",
        )  # fmt: skip
    return [_read_group(group, where) for group in groups.values()]


def matched(name: str, groups: list[Group]) -> Group | None:
    """The group of a layer by its disk name: names before patterns before classes, as compressed-tensors decides it."""
    kind = "Embedding" if name.endswith("embed_tokens") else "Linear"
    by_name = [group for group in groups if name in group.targets]
    by_pattern = [g for g in groups for t in g.targets if t.startswith("re:") and _matches(t, name)]
    return next(iter([*by_name, *by_pattern, *(group for group in groups if kind in group.targets)]), None)


def _told(group: Group) -> dict[str, Any]:
    strategy = {"strategy": "group", "group_size": group.size} if group.size else {"strategy": "channel"}
    weights = {"num_bits": group.bits, "type": "int", "symmetric": True, "dynamic": False, **strategy}
    rows = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    inputs = rows if group.activations == "int8" else None
    return {"targets": list(group.targets), "weights": weights, "input_activations": inputs, "format": group.form}


def _read_group(told: Mapping[str, Any], where: object) -> Group:
    weights, inputs = told.get("weights"), told.get("input_activations")
    odd: dict[str, Any] = {"output_activations": told["output_activations"]} if told.get("output_activations") else {}
    if not isinstance(weights, dict) or not (inputs is None or isinstance(inputs, dict)):
        raise CheckpointError("quantization_config: a group without weights", where=where)
    size = weights.get("group_size") if weights.get("strategy") == "group" else 0
    wanted = {
        "num_bits": (4, 8), "type": ("int",), "symmetric": (True,), "strategy": ("group", "channel"),
        "actorder": (None, False), "block_structure": (None,), "dynamic": (False, None),
    }  # fmt: skip
    odd |= {key: weights.get(key) for key, usual in wanted.items() if weights.get(key) not in usual}
    if inputs:
        rows = {"num_bits": (8,), "type": ("int",), "symmetric": (True,), "dynamic": (True,), "strategy": ("token",)}
        odd |= {f"input_{key}": inputs.get(key) for key, usual in rows.items() if inputs.get(key) not in usual}
    targets = told.get("targets")
    if odd or type(size) is not int or size not in _SIZES or not isinstance(targets, list):
        raise CheckpointError(
            f"quantization_config: not supported: {str(odd or {'group_size': size})[:200]}", where=where,
            cause="integers of 4 or 8 bits, symmetric, in groups of 32 to 256 or whole rows are computed",
            fix="the model it was quantized from",
        )  # fmt: skip
    return Group(tuple(map(str, targets)), weights["num_bits"], size, "int8" if inputs else "float")


def _matches(target: str, name: str) -> bool:
    try:
        return re.match(simple_pattern(target.removeprefix("re:")), name) is not None
    except UsageError as error:
        raise CheckpointError(f"quantization_config: {error.what}") from None
