"""A model whose linear layers are quantized while it is read: it is never in memory beside the packed one."""

from dataclasses import replace
from functools import partial

from puna.checkpoint.stored import Stored, Weight
from puna.config import nearest
from puna.errors import UsageError
from puna.log import log
from puna.ops.packed import Packed
from puna.quant.schemes import BASES, Kind


def rounded(stored: Stored, to: str) -> Stored:
    """`stored` with the linear layers of its blocks as `BASES[to]`: the frozen base of QLoRA (Dettmers et al. 2023).

    They are rounded from what is stored, whatever dtype the model will compute in, so the same base comes of the same
    files everywhere. Weights that lie in NF4 already are taken as they lie where NF4 is asked for.

    Raises:
        UsageError: no such kind, or a layer whose columns do not divide into its groups.
    """
    if to not in BASES:
        raise UsageError(f"no base `{to}`{nearest(to, list(BASES))}", where="quantize", fix=", ".join(BASES))
    kind, layers = BASES[to], {n: w for n, w in stored.weights.items() if n.startswith("layers.") and len(w.shape) == 2}
    for name, weight in layers.items():
        if problem := kind.problem(weight.shape[1]):
            raise UsageError(f"{name}: {problem}", where=f"quantize: {to}", fix="quantize: int8, or null")
    again = {n for n, w in layers.items() if w.quantized and not (kind.nf4 and w.kind == "NF4")}
    if again:
        log.warning("weights: %s, rounded a second time to %s", stored.storage, to)
    packed = {n: partial(_packed, weight, kind) for n, weight in layers.items() if n in again or not weight.quantized}
    plain = {n: w._replace(packed=packed.get(n, w.packed if n in layers else None)) for n, w in stored.weights.items()}
    return replace(stored, weights=plain)


def _packed(weight: Weight, kind: Kind) -> Packed:
    return kind.pack(weight.read())
