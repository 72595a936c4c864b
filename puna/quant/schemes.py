"""What each layer of a model is rounded to, as rows: a kind for the linears of the blocks, one for the head."""

from typing import NamedTuple

from torch import Tensor

from puna.config import nearest
from puna.errors import UsageError
from puna.ops.packed import Activations, Packed
from puna.quant.nf4 import BLOCK, round_nf4, with_nested_scales
from puna.quant.rounding import round_symmetric


class Kind(NamedTuple):
    """How one weight is stored. A group of 0 is a whole row."""

    bits: int
    group: int = 0
    activations: Activations = "float"
    nf4: bool = False
    nested: bool = False
    """Whether the scales are in 8 bits, too (of nf4)."""

    def pack(self, weight: Tensor) -> Packed:
        """(out, in) -> the nearest weight of this kind."""
        if self.nf4:
            packed = round_nf4(weight)
            return with_nested_scales(packed) if self.nested else packed
        return round_symmetric(weight, self.bits, self.group or weight.shape[1], self.activations)

    def problem(self, columns: int) -> str:
        """Why a weight with that many columns cannot be stored so; empty if it can."""
        group = self.group or (32 if self.bits == 4 else 4)  # runs of nibbles; words of four bytes on disk
        return f"{columns} columns are not whole groups of {group}" if columns % group else ""


class Scheme(NamedTuple):
    """None leaves a weight as it is."""

    summary: str
    linears: Kind
    head: Kind | None = None
    """A tied head becomes one of its own: the embedding stays as it is, since a look-up reads one row of it."""
    embedding: Kind | None = None
    groups: tuple[int, ...] = ()
    """What `linears.group` may be instead."""


_ROW = Kind(8)
_NF4 = Kind(4, BLOCK, nf4=True)
SCHEMES = {
    "int8": Scheme("8 bits, a scale for each row", _ROW, _ROW, groups=(0, 32, 64, 128)),
    "int4": Scheme("4 bits in groups of 32, the head 8", Kind(4, 32), _ROW, groups=(32, 64, 128)),
    "int8-int4": Scheme(
        "Llama 3.2's: as int4, and what enters a product is rounded to 8 bits, row by row",
        Kind(4, 32, "int8"), Kind(8, 0, "int8"), groups=(32, 64, 128, 256),
    ),
    "nf4": Scheme("QLoRA's 4 bits in blocks of 64, the head as it is", _NF4),
    "nf4-double": Scheme("nf4 with scales of 8 bits", _NF4._replace(nested=True)),
}  # fmt: skip
"""Of weights alone, unless a summary says otherwise."""
BASES = {"nf4": SCHEMES["nf4-double"].linears, **{n: SCHEMES[n].linears for n in ("int8", "int4", "int8-int4")}}
"""What the linear layers of a frozen base become under adapters; head and embedding stay as they are."""


def scheme(name: str, group: int | None = None, compact: bool = False) -> Scheme:
    """A row of SCHEMES, with other groups if asked for.

    Args:
        compact: the embedding in 8 bits, too, and stored once where it is tied.

    Raises:
        UsageError: no such scheme, or what it does not have.
    """
    if name not in SCHEMES:
        raise UsageError(f"no scheme `{name}`{nearest(name, list(SCHEMES))}", fix=", ".join(SCHEMES))
    found = SCHEMES[name]
    if group is not None and group not in found.groups:
        listed = ", ".join(map(str, found.groups)) or "none"
        raise UsageError(f"{name} has no groups of {group}", where="--group", fix=f"one of: {listed} (0: whole rows)")
    if compact and found.head is None:
        raise UsageError(f"{name} leaves the embedding as it is", where="--compact", fix="int8, int4 or int8-int4")
    linears = found.linears if group is None else found.linears._replace(group=group)
    return found._replace(linears=linears, embedding=_ROW if compact else None)
