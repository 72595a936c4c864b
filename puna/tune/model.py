"""A trained model made ready to be tuned, and what is written of it afterwards."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from puna.checkpoint.adapter import CONFIG as ADAPTER
from puna.checkpoint.adapter import save_adapter
from puna.checkpoint.model_directory import save_model
from puna.checkpoint.names import DTYPES
from puna.checkpoint.registry import find_model, load_tokenizer, open_model
from puna.config import RecipeConfig
from puna.device import choose_dtype
from puna.errors import DataError, UsageError
from puna.infer.llama import Llama, load
from puna.log import log
from puna.lora import LoraConfig, adapted_layers, add_lora, frozen_whole, lora_layers, lora_parameters, whole_parameters
from puna.model.init import build_model
from puna.quant.qat import QatConfig, qat_plan, round_layers, rounded_product
from puna.quant.schemes import SCHEMES
from puna.tokenizer.tokenizer import Tokenizer


class TunedModel(RecipeConfig):
    """The part of a recipe's config that says which model is tuned, and what of it."""

    model: str = "runs/pretrain"
    """What to start from: a model or run folder, a .gguf file, or smollm2-135m."""
    new_tokens: list[str] = []
    """Control tokens at the end of the vocabulary, which text never becomes: ids for a template of one's own. Each is
    a row of embedding and head to be learned; under lora that takes modules_to_save: [embed_tokens, lm_head]."""
    quantize: Literal["nf4", "int8", "int4", "int8-int4"] | None = None
    """The linear layers of the frozen base under lora in fewer bits (QLoRA). nf4: a quarter of bf16's memory; int8:
    half of it, and nearer to the model. Costs time in every step; the adapter then belongs to the rounded base."""
    lora: LoraConfig | None = LoraConfig()
    """Adapters on a frozen base; null trains every weight."""
    qat: QatConfig | None = None
    """Train under the rounding that `puna quantize` will make: a 4-bit model loses less, a step takes longer."""
    save_dtype: Literal["bf16", "fp32", "fp16"] = "bf16"
    """Of a fully trained model; adapters are fp32. Under qat also what `puna merge --save-dtype` has to be."""


def trained_for(config: TunedModel) -> dict[str, Any]:
    """What puna.json says of it, for `puna quantize` to round by the same scales."""
    return {"trained_for": config.qat.model_dump()} if config.qat else {}


def check_tuned(config: TunedModel) -> None:
    """What of the config cannot be, told before any weight is read.

    Raises:
        UsageError: settings that exclude one another. DataError: the model is an adapter itself.
    """
    _check_qat(config)
    if config.quantize and not config.lora:
        raise UsageError(
            f"quantize: {config.quantize} without lora", cause="packed weights are frozen: nothing would be trained",
            fix="lora: {rank: 16}, or quantize: null",
        )  # fmt: skip
    if (found := find_model(config.model) / ADAPTER).exists():
        fix = f"puna merge {config.model} FOLDER, and then model=FOLDER"
        raise DataError("the model is an adapter itself", where=found.parent, fix=fix)
    if config.lora is None:
        return
    model = build_model(open_model(config.model).config)  # names without weights
    adapted, trained = adapted_layers(model, config.lora), whole_parameters(model, config.lora)
    if config.qat and "lm_head" in adapted:
        raise UsageError(
            "qat with an adapter on lm_head", cause="the loss multiplies by its weight, which would not be rounded",
            fix="lora.targets without lm_head, or lora.modules_to_save: [lm_head]",
        )  # fmt: skip
    if config.quantize and (packed := [n for n, p in trained.items() if n.startswith("layers.") and p.ndim == 2]):
        raise frozen_whole(packed[0].removesuffix(".weight"))
    ends = ["embed_tokens"] if model.config.tie_embeddings else ["embed_tokens", "lm_head"]
    if config.new_tokens and any(f"{name}.weight" not in trained for name in ends):
        raise UsageError(
            "new_tokens under lora: their rows are frozen, and nothing would be learned of them", where="new_tokens",
            fix=f"lora.modules_to_save: [{', '.join(ends)}]",
        )  # fmt: skip


def _check_qat(config: TunedModel) -> None:
    """Raise UsageError for settings that training under a rounding excludes."""
    if config.qat and config.quantize:
        raise UsageError(
            "qat with quantize", cause="a base that is rounded already is not rounded again",
            fix="quantize: null to learn the rounding of the merged model; qat: null for adapters on a rounded base",
        )  # fmt: skip
    if config.qat and config.lora and config.lora.dropout:
        raise UsageError(
            "qat with lora.dropout", cause="base and adapter are rounded as one weight, so there is one input to both",
            fix="lora.dropout=0",
        )  # fmt: skip
    if config.qat and config.qat.group not in (groups := SCHEMES[config.qat.scheme].groups):
        listed = ", ".join(map(str, groups))
        raise UsageError(f"qat.scheme={config.qat.scheme} has no groups of {config.qat.group}", fix=f"one of: {listed}")


def tuned_tokenizer(config: TunedModel) -> Tokenizer:
    """The model's tokenizer with the new tokens, of a config that `check_tuned` lets pass.

    Raises:
        UsageError: a new token that exists already.
    """
    tokenizer = load_tokenizer(config.model)
    return tokenizer.with_tokens(config.new_tokens) if config.new_tokens else tokenizer


def load_tuned(config: TunedModel, variables: Mapping[str, Any]) -> Llama:
    """The base in the compute dtype under adapters, or in fp32 with that compute dtype to train every weight.

    Of a config that `check_tuned` lets pass.
    """
    dtype = config.dtype if config.lora else "fp32"
    llama = load(config.model, dtype, config.device, variables=variables, quantize=config.quantize)
    if config.new_tokens:
        llama = llama.add_tokens(config.new_tokens)
    plan = qat_plan(llama.model, config.qat) if config.qat else {}
    if config.lora:
        add_lora(llama.model, config.lora, config.seed)
        count = sum(p.numel() for p in lora_parameters(llama.model).values())
        log.info("training %s adapter weights of rank %d", f"{count:,}", config.lora.rank)
        if whole := whole_parameters(llama.model, config.lora):
            log.info("and %s weights of %s", f"{sum(p.numel() for p in whole.values()):,}", ", ".join(whole))
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
            save_adapter, model=llama.model, config=config.lora, base=config.model, tokenizer=llama.tokenizer,
            quantize=config.quantize,
        )  # fmt: skip
    return partial(
        save_model, model=llama.model, save_dtype=config.save_dtype, tokenizer=llama.tokenizer, stop_ids=llama.stop_ids
    )
