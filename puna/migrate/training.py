"""How a torchtune config trains: optimizer, schedule, length, memory, devices, what is logged."""

from typing import Any

from puna.errors import UsageError
from puna.migrate.asked import Asked
from puna.migrate.page import DEFAULT, Page

_OPTIMIZERS = {
    "AdamW": "adamw", "PagedAdamW": "adamw", "AdamW32bit": "adamw", "PagedAdamW32bit": "adamw",
    "AdamW8bit": "adamw8bit", "PagedAdamW8bit": "adamw8bit",
}  # fmt: skip
_LOSSES = ("CEWithChunkedOutputLoss", "LinearCrossEntropyLoss", "CrossEntropyLoss")
_SPEED = ("fused", "foreach", "capturable")
_LOGGERS = {"WandBLogger": "wandb", "TensorBoardLogger": "tensorboard", "DiskLogger": "", "StdoutLogger": ""}
_SHARDING = ("custom_sharded_layers", "fsdp_reshard_after_forward", "memory_efficient_fsdp_wrap")
_ALWAYS = {"shuffle": True, "log_peak_memory_stats": True, "log_every_n_steps": 1, "log_level": "INFO"}


def optimizer(asked: Asked, page: Page) -> None:
    """The optimizer and its schedule, every value said: torchtune's defaults are not puna's."""
    kind = asked.name("optimizer")
    if kind not in _OPTIMIZERS:
        raise UsageError(
            f"puna has no optimizer `{kind}`", where=asked.where, cause="its learning rate would mean something else",
            fix="optimizer._component_: torch.optim.AdamW, with a rate for it",
        )  # fmt: skip
    ours = _OPTIMIZERS[kind]
    if ours == "adamw8bit" and page.ranks > 1:
        page.lost["optimizer (8-bit)"] = f"on {page.ranks} devices puna has adamw, whose moments they divide"
        ours = "adamw"
    page.put("train.optimizer.kind", ours, f"optimizer: {asked.component('optimizer')}")
    if kind.startswith("Paged"):
        page.lost["optimizer (paged)"] = "its state does not move to the CPU when a card is full"
    for key, default in {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}.items():
        value = asked.take(f"optimizer.{key}")
        page.put(
            f"train.optimizer.{key}",
            default if value is None else value,
            DEFAULT if value is None else f"optimizer.{key}",
        )
    for key in _SPEED:
        if asked.take(f"optimizer.{key}") is not None:
            page.same.append(f"optimizer.{key} as is fastest")
    if asked.flag("optimizer.amsgrad"):
        page.lost["optimizer.amsgrad"] = "puna's AdamW has no such variant"
    _schedule(asked, page)
    _clipping(asked, page)
    if page.given()["train.optimizer.weight_decay"] and page.given().get("lora", "") is None:
        page.lost["weight decay of norms"] = "puna's decay leaves one-dimensional weights alone"


def _schedule(asked: Asked, page: Page) -> None:
    kind = asked.name("lr_scheduler")
    if not kind:
        page.put("train.optimizer.warmup_steps", 0, "no lr_scheduler")
        page.put("train.optimizer.final_lr", 1.0, "no lr_scheduler")
        return
    if kind != "get_cosine_schedule_with_warmup":
        raise UsageError(f"puna has no schedule `{kind}`", where=asked.where, fix="get_cosine_schedule_with_warmup")
    page.put("train.optimizer.warmup_steps", asked.take("lr_scheduler.num_warmup_steps", 0), "num_warmup_steps")
    page.put("train.optimizer.final_lr", 0.0, "its cosine ends at 0")
    if (cycles := asked.take("lr_scheduler.num_cycles", 0.5)) != 0.5:
        page.lost["lr_scheduler.num_cycles"] = f"{cycles}: puna's cosine falls once"


def _clipping(asked: Asked, page: Page) -> None:
    """Accumulation and clipping, which an optimizer in the backward pass cannot have."""
    accumulate, clip = asked.take("gradient_accumulation_steps", 1), asked.take("clip_grad_norm")
    unclipped = clip is None or str(clip) == "inf"
    page.put("train.accumulate", accumulate, "gradient_accumulation_steps")
    page.put("train.optimizer.clip", 0.0 if unclipped else clip, "clip_grad_norm")
    if asked.flag("optimizer_in_bwd"):
        if accumulate != 1 or not unclipped:
            cause = "the optimizer steps before the whole gradient is there"
            fix = "gradient_accumulation_steps: 1 and clip_grad_norm: null"
            raise UsageError(
                "optimizer_in_bwd takes no accumulation or clipping", where=asked.where, cause=cause, fix=fix
            )
        if page.ranks > 1:
            page.lost["optimizer_in_bwd"] = f"on {page.ranks} devices, which divide the gradients, puna does without"
            return
        page.put("train.optimizer.in_backward", True, "optimizer_in_bwd")
        page.put("train.skip_budget", 0, "optimizer_in_bwd")


def length(asked: Asked, page: Page) -> None:
    """How long, and with which seed."""
    epochs, most = asked.count("epochs", 1) or 1, asked.count("max_steps_per_epoch")
    if most is None:
        page.put("epochs", epochs, "epochs")
    else:
        page.put("steps", most * epochs, "max_steps_per_epoch x epochs")
        page.lost["max_steps_per_epoch"] = (
            f"an epoch of fewer than {most} steps would have ended by itself; where the rows are few, "
            f"epochs: {epochs} in place of steps"
        )
    seed = asked.take("seed")
    page.put("seed", 0 if seed is None else seed, "torchtune drew one" if seed is None else "seed")
    save_every = asked.take("save_every_n_steps")
    if save_every is not None:
        page.put("train.save_every", save_every, "save_every_n_steps")
    if asked.flag("enable_async_checkpointing"):
        page.lost["enable_async_checkpointing"] = "puna stops while it saves"


def loss(asked: Asked, page: Page) -> None:
    """The loss, which is always the mean over trained ids."""
    kind = asked.name("loss")
    if kind and kind not in _LOSSES:
        raise UsageError(
            f"puna has no loss `{kind}`",
            where=asked.where,
            fix="CEWithChunkedOutputLoss, or write it: docs/objectives.md",
        )
    asked.take("loss.num_output_chunks")
    asked.take("loss.ignore_index")
    page.same.append("a chunked loss")


def memory(asked: Asked, page: Page) -> None:
    """Dtype, device, compile, and what trades time for memory."""
    dtype = asked.take("dtype", "bf16")
    if dtype in ("bf16", "fp32"):
        page.put("dtype", dtype, "dtype")
    else:
        page.lost["dtype"] = f"{dtype}: puna computes in bf16 where the hardware has it, else fp32"
    device = asked.take("device", "cuda")
    if str(device) == "cuda":
        page.same.append("device: cuda where there is one")
    else:
        page.put("device", device, "device")
    compiled = asked.take("compile") not in (None, False)
    if compiled and "qat.scheme" in page.given():
        page.lost["compile"], compiled = "under qat the products are native calls already", False
    page.put("compile", compiled, "compile")
    mode = asked.take("ac_mode")
    full = asked.flag("enable_activation_checkpointing")
    page.put(
        "train.checkpoint_activations",
        mode if mode == "selective" else "full" if full or mode == "full" else "none",
        "ac_mode" if mode else "enable_activation_checkpointing",
    )
    if (option := asked.take("ac_option")) is not None and mode == "selective":
        page.lost["ac_option"] = f"{option}: puna chooses what it keeps itself"
    offload = asked.flag("enable_activation_offloading")
    page.put("train.offload_activations", offload, "enable_activation_offloading")
    if asked.flag("low_cpu_ram"):
        page.same.append("low_cpu_ram")


def devices(asked: Asked, page: Page) -> None:
    """How the model is spread over ranks. Their number stands in no key: it was on torchrun's command line."""
    size = asked.count("batch_size", 1) or 1
    each = f"{size} x {page.ranks} devices: batch_size counts those of all" if page.ranks > 1 else "batch_size"
    page.put("batch_size", size * page.ranks, each)
    offload = [key for key in ("fsdp_cpu_offload", "fsdp.cpu_offload") if asked.flag(key)]
    if offload:
        page.lost[offload[0]] = "puna keeps weights and optimizer on the cards; lora with quantize: nf4 takes least"
    for key in _SHARDING:
        if asked.take(key) is not None:
            page.same.append(f"{key} (every block is sharded by itself)")
    for key in ("tensor_parallel_dim", "context_parallel_dim", "data_parallel_replicate_dim"):
        if (ways := asked.take(key, 1)) not in (1, None):
            page.lost[key] = f"{ways}: puna's sft shards weights and batches over all devices"
    asked.take("tensor_parallel_plan")
    asked.take("data_parallel_shard_dim")


def logging(asked: Asked, page: Page) -> None:
    """Metrics, profiles, and switches that puna has no need of."""
    kind = asked.name("metric_logger")
    section = asked.take("metric_logger")
    own = [key for key in section if key not in ("_component_", "log_dir", "filename")] if kind and section else []
    if own:
        page.lost[f"metric_logger.{', '.join(own)}"] = (
            "a run is named by its folder, its project by WANDB_PROJECT in the environment"
        )
    if _LOGGERS.get(kind):
        page.put("train.track", [_LOGGERS[kind]], "metric_logger")
    elif kind and kind not in _LOGGERS:
        page.lost["metric_logger"] = (
            f"{kind}: train.track takes tensorboard, trackio and wandb; metrics.jsonl is always"
        )
    else:
        page.same.append("metrics.jsonl")
    if asked.flag("profiler.enabled"):
        page.lost["profiler"] = "puna records no traces; each metrics row has tokens/s and memory"
    asked.take("profiler")
    for key, usual in _ALWAYS.items():
        _switch(asked, page, key, usual)
    for key in ("cudnn_deterministic_mode", "collate_fn"):
        if (value := asked.take(key)) is not None:
            page.lost[key] = f"{value}: puna decides this itself"


def _switch(asked: Asked, page: Page, key: str, usual: Any) -> None:
    if key not in asked.values:
        return
    value = asked.take(key)
    if value == usual or (key != "shuffle" and value in (None, False)):
        page.same.append(f"{key}: {usual}")
    else:
        page.lost[key] = f"{value}: puna always has {usual}"
