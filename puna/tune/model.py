"""A trained model made ready to be tuned, and what is written of it afterwards."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from puna.checkpoint.adapter import save_adapter
from puna.checkpoint.model_directory import save_model
from puna.config import RecipeConfig
from puna.device import choose_dtype
from puna.errors import DataError
from puna.infer.llama import Llama, load
from puna.log import log
from puna.lora import LoraConfig, add_lora, lora_parameters


class TunedModel(RecipeConfig):
    """The part of a recipe's config that says which model is tuned, and what of it."""

    model: str = "runs/pretrain"
    """What to start from: a model or run folder, a .gguf file, or smollm2-135m."""
    lora: LoraConfig | None = LoraConfig()
    """Adapters on a frozen base; null trains every weight."""
    save_dtype: Literal["bf16", "fp32", "fp16"] = "bf16"
    """Of a fully trained model; adapters are fp32."""


def load_tuned(config: TunedModel, variables: Mapping[str, Any]) -> Llama:
    """The base in the compute dtype under adapters, or in fp32 with that compute dtype to train every weight.

    Raises:
        DataError: the model is an adapter itself.
    """
    if config.lora:
        llama = load(config.model, dtype=config.dtype, device=config.device, variables=variables)
        if lora_parameters(llama.model):
            raise DataError("the model is an adapter itself", where=config.model, fix="puna merge it first")
        add_lora(llama.model, config.lora, config.seed)
        count = sum(p.numel() for p in lora_parameters(llama.model).values())
        log.info("training %s adapter weights of rank %d", f"{count:,}", config.lora.rank)
        return llama
    llama = load(config.model, dtype="fp32", device=config.device, variables=variables)
    llama.model.compute_dtype = choose_dtype(config.dtype, next(llama.model.parameters()).device)
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
