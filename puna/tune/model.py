"""A trained model made ready to be tuned, and what is written of it afterwards."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from puna.checkpoint.adapter import save_adapter
from puna.checkpoint.model_directory import save_model
from puna.checkpoint.names import DTYPES
from puna.config import RecipeConfig
from puna.device import choose_dtype
from puna.errors import DataError, UsageError
from puna.infer.llama import Llama, load
from puna.log import log
from puna.lora import LoraConfig, add_lora, lora_layers, lora_parameters
from puna.quant.qat import QatConfig, qat_plan, round_layers, rounded_product
from puna.quant.schemes import SCHEMES


class TunedModel(RecipeConfig):
    """The part of a recipe's config that says which model is tuned, and what of it."""

    model: str = "runs/pretrain"
    """What to start from: a model or run folder, a .gguf file, or smollm2-135m."""
    lora: LoraConfig | None = LoraConfig()
    """Adapters on a frozen base; null trains every weight."""
    qat: QatConfig | None = None
    """Train under the rounding that `puna quantize` will make: a 4-bit model loses less, a step takes longer."""
    save_dtype: Literal["bf16", "fp32", "fp16"] = "bf16"
    """Of a fully trained model; adapters are fp32. Under qat also what `puna merge --save-dtype` has to be."""


def check_tuned(config: TunedModel) -> None:
    """
    Raises:
        UsageError: settings that exclude each other, before a model is loaded.
    """
    if config.qat and config.lora and config.lora.dropout:
        raise UsageError(
            "qat with lora.dropout", cause="base and adapter are rounded as one weight, so there is one input to both",
            fix="lora.dropout=0",
        )  # fmt: skip
    if config.qat and config.qat.group not in (groups := SCHEMES[config.qat.scheme].groups):
        listed = ", ".join(map(str, groups))
        raise UsageError(f"qat.scheme={config.qat.scheme} has no groups of {config.qat.group}", fix=f"one of: {listed}")


def trained_for(config: TunedModel) -> dict[str, Any]:
    """What puna.json says of it, for `puna quantize` to round by the same scales."""
    return {"trained_for": config.qat.model_dump()} if config.qat else {}


def load_tuned(config: TunedModel, variables: Mapping[str, Any]) -> Llama:
    """The base in the compute dtype under adapters, or in fp32 with that compute dtype to train every weight.

    Raises:
        DataError: the model is an adapter itself.
    """
    dtype = config.dtype if config.lora else "fp32"
    llama = load(config.model, dtype=dtype, device=config.device, variables=variables)
    if lora_parameters(llama.model):
        raise DataError("the model is an adapter itself", where=config.model, fix="puna merge it first")
    plan = qat_plan(llama.model, config.qat) if config.qat else {}
    if config.lora:
        add_lora(llama.model, config.lora, config.seed)
        count = sum(p.numel() for p in lora_parameters(llama.model).values())
        log.info("training %s adapter weights of rank %d", f"{count:,}", config.lora.rank)
    else:
        llama.model.compute_dtype = choose_dtype(config.dtype, next(llama.model.parameters()).device)
    if config.qat:
        stored = DTYPES[config.save_dtype]
        for name, layer in lora_layers(llama.model).items():  # rounded with the adapter in it: as it is once merged
            layer.product = rounded_product(plan.pop(name), stored)
        round_layers(llama.model, plan, stored)
        log.info("training under the rounding of %s, in groups of %d", config.qat.scheme, config.qat.group)
    return llama


def saver(config: TunedModel, llama: Llama) -> Callable[..., None]:
    """(folder, lineage=...) -> the adapter, or the whole model, in that folder."""
    if config.lora:
        return partial(
            save_adapter, model=llama.model, config=config.lora, base=config.model, tokenizer=llama.tokenizer
        )
    return partial(
        save_model, model=llama.model, save_dtype=config.save_dtype, tokenizer=llama.tokenizer, stop_ids=llama.stop_ids
    )
