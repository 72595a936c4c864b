"""Which model a torchtune config tunes, and what of it: builders, checkpointers, tokenizers, quantizers, teachers."""

from pathlib import PurePosixPath
from shlex import quote

from puna.errors import UsageError
from puna.migrate.asked import Asked
from puna.migrate.page import DEFAULT, Page

_ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "output_proj": "o_proj"}
_MLP = ("gate_proj", "up_proj", "down_proj")
_LORA = {"lora_rank": ("rank", 8), "lora_alpha": ("alpha", 16), "lora_dropout": ("dropout", 0.0)}
_TEMPLATES = {"llama2_tokenizer": "llama2", "llama3_tokenizer": "llama3"}
_DIVERGENCES = {"Forward": "forward", "Reverse": "reverse", "Symmetric": "symmetric"}
_QUANTIZERS = {"Int8DynActInt4WeightQAT": "int8-int4", "Int4WeightOnlyQAT": "int4"}


def model(asked: Asked, page: Page) -> None:
    """Weights, adapters and what the base is stored in; in `page.method` how such a run is called."""
    builder = asked.name("model")
    page.put("model", folder(asked, page, "checkpointer"), "checkpointer.checkpoint_dir")
    quantized = asked.flag("model.quantize_base") or builder.startswith("qlora_")
    if builder.startswith(("lora_", "qlora_")):
        _adapters(asked, page)
        page.put("quantize", "nf4" if quantized else None, "the builder" if quantized else DEFAULT)
        named = ("Q" if quantized else "") + ("DoRA" if page.given()["lora.dora"] else "LoRA")
        page.method = f"{named} of {builder.partition('lora_')[2]}"
    else:
        page.put("lora", None, f"the builder {builder}")
        page.method = f"Full fine-tuning of {builder}"
        if asked.values.get("dtype", "bf16") == "bf16":
            page.lost["dtype of the weights"] = (
                "torchtune keeps weights and optimizer in bf16, puna in fp32 (about twice the memory, and small steps "
                "are not rounded away); train.optimizer.kind: adamw8bit takes most of it back; puna plan tells how much"
            )
    if asked.take("model.tie_word_embeddings") is not None:
        page.same.append("tie_word_embeddings as the weights have it")


def _adapters(asked: Asked, page: Page) -> None:
    for theirs, (ours, default) in _LORA.items():
        source = f"model.{theirs}" if asked.has(f"model.{theirs}") else DEFAULT
        page.put(f"lora.{ours}", asked.take(f"model.{theirs}", default), source)
    given = asked.take("model.lora_attn_modules") or []
    names = [str(name) for name in (given if isinstance(given, list) else [given])]
    if unknown := [name for name in names if name not in _ATTENTION]:
        fix = f"of {', '.join(_ATTENTION)}"
        raise UsageError(f"model.lora_attn_modules: no layer `{unknown[0]}`", where=asked.where, fix=fix)
    targets = [_ATTENTION[name] for name in names]
    targets += _MLP if asked.flag("model.apply_lora_to_mlp") else ()
    targets += ["lm_head"] if asked.flag("model.apply_lora_to_output") else []
    page.put("lora.targets", targets, "lora_attn_modules, apply_lora_to_mlp, apply_lora_to_output")
    page.put("lora.dora", asked.flag("model.use_dora"), "model.use_dora")
    if asked.flag("save_adapter_weights_only"):
        page.same.append("save_adapter_weights_only: True")
    else:
        output = page.given()["output"]
        page.after["The whole model, which torchtune wrote beside the adapter:"] = (
            f"puna merge {quote(str(output))} {quote(f'{output}-merged')}"
        )


def folder(asked: Asked, page: Page, section: str) -> str:
    """The folder of weights that a checkpointer reads.

    Raises:
        UsageError: it names none, or weights that puna cannot read.
    """
    kind = asked.name(section)
    found = asked.take(f"{section}.checkpoint_dir")
    if not isinstance(found, str) or not found:
        raise UsageError(f"`{section}.checkpoint_dir` is missing", where=asked.where, fix="the folder of the weights")
    if kind in ("FullModelTorchTuneCheckpointer", "DistributedCheckpointer"):
        raise UsageError(
            f"{kind} reads weights under torchtune's own names", where=asked.where,
            cause="puna opens Hugging Face's and Meta's layouts",
            fix="FullModelHFCheckpointer with the folder that the model came from",
        )  # fmt: skip
    for key in ("checkpoint_files", "model_type", "output_dir", "safe_serialization"):
        asked.take(f"{section}.{key}")
    if adapter := asked.take(f"{section}.adapter_checkpoint"):
        page.lost[f"{section}.adapter_checkpoint"] = f"to go on from {adapter}: puna merge it, and set model to that"
    state = asked.take(f"{section}.recipe_checkpoint")
    if section == "checkpointer" and (asked.flag("resume_from_checkpoint") or state):
        page.lost["resume_from_checkpoint"] = "the state of torchtune's optimizer: puna starts anew from the weights"
    return found.rstrip("/") or "/"


def tokenizer(asked: Asked, page: Page) -> None:
    """The template that torchtune's tokenizer writes turns by; the ids come from the tokenizer beside the weights."""
    kind = asked.name("tokenizer")
    if kind not in _TEMPLATES:
        raise UsageError(
            f"`{asked.component('tokenizer')}` is not a tokenizer of a text Llama", where=asked.where,
            fix=" or ".join(f"torchtune.models.{name[:6]}.{name}" for name in _TEMPLATES),
        )  # fmt: skip
    page.put("template", _TEMPLATES[kind], f"{kind} writes these turns")
    path, weights = asked.take("tokenizer.path"), page.given()["model"]
    if path and not _beside(str(path), weights):
        page.lost["tokenizer.path"] = f"{path}: puna takes the tokenizer that lies beside the weights"
    if special := asked.take("tokenizer.special_tokens_path"):
        page.lost["tokenizer.special_tokens_path"] = f"{special}: puna takes the control tokens beside the weights"


def _beside(path: str, weights: str) -> bool:
    """Whether the tokenizer lies in the folder of the weights, or in Meta's folder within it."""
    places = PurePosixPath(path).parents
    return PurePosixPath(weights) in places


def quantizer(asked: Asked, page: Page) -> None:
    """Quantization-aware training."""
    if asked.take("quantizer", "") in ("", None):
        return
    kind = asked.name("quantizer")
    scheme = next((ours for theirs, ours in _QUANTIZERS.items() if kind.startswith(theirs)), None)
    if scheme is None:
        fix = "Int8DynActInt4WeightQATQuantizer, or puna quantize after training"
        raise UsageError(f"puna does not train for `{kind}`", where=asked.where, fix=fix)
    page.put("qat.scheme", scheme, kind)
    group = asked.count("quantizer.groupsize", 256)
    if scheme == "int4" and group == 256:
        page.lost["quantizer.groupsize"], group = "256: puna's int4 has groups of 32, 64 or 128", 128
    page.put("qat.group", group, "quantizer.groupsize")
    if "lora.rank" in page.given():
        page.lost["quantizer beside an adapter"] = (
            "torchtune rounds the frozen base alone; puna rounds base and adapter as the one weight they are merged to"
        )
    if page.given().get("lora.dropout"):
        page.lost["model.lora_dropout"] = "base and adapter are rounded as one weight, with one input to both"
        page.put("lora.dropout", 0.0, "not under qat")
    page.method = page.method.replace("Full fine-tuning", "QAT").replace("LoRA", "QAT with LoRA")
    output = page.given()["output"]
    source = f"{output}-merged" if page.given().get("lora", "") is not None else output
    target = quote(f"{output}-{scheme}")
    command = f"puna quantize {quote(str(source))} {target} --scheme {scheme} --group {group}"
    page.after["What was trained for:"] = command
    for key in ("fake_quant_after_n_steps", "quantizer.precision", "quantizer.scales_precision"):
        if (value := asked.take(key)) is not None:
            page.lost[key] = f"{value}: puna rounds from the first step on, scales in fp32"


def teacher(asked: Asked, page: Page) -> None:
    """Knowledge distillation."""
    if "teacher_checkpointer" not in asked.values:
        return
    asked.take("teacher_model")
    page.put("distill.teacher", folder(asked, page, "teacher_checkpointer"), "teacher_checkpointer.checkpoint_dir")
    page.put("distill.ratio", asked.take("kd_ratio", 0.5), "kd_ratio")
    kind = asked.name("kd_loss")
    divergence = next((ours for theirs, ours in _DIVERGENCES.items() if kind.startswith(theirs)), None)
    if divergence is None:
        raise UsageError(f"puna has no `{kind}`", where=asked.where, fix="kd_loss: ForwardKLLoss, Reverse or Symmetric")
    page.put("distill.divergence", divergence, f"kd_loss: {kind}")
    page.put("distill.temperature", 1.0)
    asked.take("kd_loss.num_output_chunks")
    asked.take("kd_loss.ignore_index")
    if (share := asked.take("kd_loss.sym_kd_ratio", 0.5)) != 0.5:
        page.lost["kd_loss.sym_kd_ratio"] = f"{share}: puna's symmetric divergence weighs both directions alike"
    page.method = f"Distillation into {page.method}"
