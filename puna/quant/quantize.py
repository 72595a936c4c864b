"""A model whose weights are packed, in place and one at a time: the model file knows nothing of it."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from puna.errors import UsageError
from puna.model.transformer import Linear, Transformer
from puna.ops.packed import Packed
from puna.ops.packed_layers import PackedEmbedding, PackedLinear, packed_layers
from puna.quant.schemes import Kind, Scheme, scheme


def quantize_model(model: Transformer, to: Scheme | str) -> None:
    """Replace linear layers, head and embedding by packed ones, as `to` says; what was replaced is let go of.

    Raises:
        UsageError: a layer whose size does not divide, adapters, or a model that is packed already.
        NumericError: weights that are not finite.
    """
    pack_layers(model, planned(model, scheme(to) if isinstance(to, str) else to))


@torch.no_grad()
def pack_layers(
    model: Transformer, plan: Mapping[str, Kind], progress: Callable[[str], None] = lambda name: None
) -> None:
    """Round the layers of a plan to the nearest; `progress` is told the name of each that is done."""
    for name, kind in plan.items():
        packed = kind.pack(_plain(model, name))
        put(model, name, packed, packed.codes.device)
        progress(name)
    model.requires_grad_(False)


def planned(model: Transformer, to: Scheme) -> dict[str, Kind]:
    """The layers that `to` packs, with what they become; a tied head goes with its embedding.

    Raises:
        UsageError: see `quantize_model`.
    """
    if packed_layers(model):
        raise UsageError(
            "the model is quantized already", fix="the one it was quantized from, or puna convert it first"
        )
    if any(".lora_" in name for name, _ in model.named_parameters()):
        raise UsageError("the model carries adapters", fix="merge them first: puna merge")
    plan = {name: to.linears for name, m in model.layers.named_modules(prefix="layers") if isinstance(m, nn.Linear)}
    tied = model.config.tie_embeddings
    if to.embedding is not None:
        plan["embed_tokens"] = to.head if to.head and tied else to.embedding
    if to.head is not None and not (tied and to.embedding):
        plan["lm_head"] = to.head
    for name, kind in plan.items():
        if problem := kind.problem(_plain(model, name).shape[1]):
            raise UsageError(f"{name}: {problem}", fix="--scheme int8, or smaller groups: --group 32")
    return plan


def put(model: Transformer, name: str, packed: Packed, device: torch.device) -> None:
    """Put a packed weight, on `device`, in the place of the layer `name`: of a tied embedding, of the head, too.

    A tied head that is packed alone is tied no more.
    """
    parent, _, leaf = name.rpartition(".")
    if name != "embed_tokens":
        setattr(model.get_submodule(parent), leaf, PackedLinear(packed).to(device))
        untied = name == "lm_head" and model.config.tie_embeddings
        model.config = model.config.model_copy(update={"tie_embeddings": False}) if untied else model.config
        return
    head = PackedLinear(packed).to(device)
    setattr(model, name, PackedEmbedding(replace(head.packed, activations="float")))
    if model.config.tie_embeddings:
        setattr(model, "lm_head", head)  # noqa: B010


@torch.no_grad()
def unpack_layers(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Replace packed linear layers by plain ones of the dequantized weights, in place and one at a time.

    Raises:
        UsageError: layers that round what enters them: no plain weight computes the same.
    """
    for name, layer in packed_layers(model).items():
        if not isinstance(layer, PackedLinear):
            continue
        if layer.packed.activations != "float":
            raise UsageError(
                f"{name} rounds what enters it to 8 bits: no plain weight computes the same",
                fix="the unquantized base (puna merge --onto original)",
            )
        with torch.device("meta"):
            plain = Linear(layer.in_features, layer.out_features)
        plain.weight = nn.Parameter(layer.weight.to(dtype), requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)


def _plain(model: Transformer, name: str) -> Tensor:
    return model.get_parameter(f"{name}.weight")
