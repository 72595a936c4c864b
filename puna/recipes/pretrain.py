"""Pretrain a Llama: token shards -> run folder with a model directory in `final/`."""

import math
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import torch
from pydantic import PositiveFloat, PositiveInt

from puna.checkpoint.model_directory import save_model
from puna.config import Config as BaseConfig
from puna.config import RecipeConfig, UserPath
from puna.data.loader import TokenLoader
from puna.data.shards import Shards
from puna.device import choose_device, choose_dtype
from puna.dist.collectives import from_first, on_first, shared_run, stop_together, use_machine
from puna.dist.fsdp import shard
from puna.errors import UsageError
from puna.eval.perplexity import bits_per_byte
from puna.files import atomic_folder, write_json
from puna.infer.generate import generate
from puna.lineage import lineage
from puna.log import clock, harmless, log
from puna.model.config import count_parameters
from puna.model.init import build_model, init_weights, materialize
from puna.model.presets import ModelChoice, ModelSpec, resolve_model
from puna.model.transformer import Transformer
from puna.run_folder import Forecast, Run
from puna.tokenizer.tokenizer import Tokenizer
from puna.train.blocks import checkpoint_blocks, compile_blocks
from puna.train.budget import steps_within
from puna.train.fit import TrainConfig, check_held_out, check_training, fit
from puna.train.objectives import next_token
from puna.train.optim import with_rate


class SampleConfig(BaseConfig):
    """Text the model writes at every validation, so that one can watch it learn."""

    prompts: list[str] = ["The "]
    max_tokens: int = 48
    temperature: float = 0.7


class Config(RecipeConfig):
    """Pretrain on packed text: next-token loss over every position."""

    recipe: Literal["pretrain"] = "pretrain"  # type: ignore[assignment]
    output: UserPath = Path("runs/pretrain")
    data: UserPath = Path("runs/data")
    """A shard folder made by the data recipe; its tokenizer comes with it."""
    mixture: dict[str, PositiveFloat] = {}
    """Passes over a source in an epoch, {kjv: 0.5}; 1 for those not named. A source is a package or a folder."""
    model: ModelSpec = ModelChoice()
    """A preset (`model=llama3.2-1b`), or a preset with changed values."""
    seq_len: PositiveInt = 256
    batch_size: PositiveInt = 8
    """Rows of seq_len tokens in a micro-batch, over all ranks: more is faster and takes more memory."""
    steps: PositiveInt = 1000
    seconds: PositiveFloat | None = None
    """Instead of steps: ten are measured and `steps` is set so that training takes at most this long, once."""
    save_dtype: Literal["bf16", "fp32", "fp16"] = "bf16"
    """What the weights of the written model are stored in; the train state keeps fp32."""
    compile: bool = False
    """Compile what lies around attention (torch.compile): worth it above some minutes of training."""
    train: TrainConfig = TrainConfig()
    samples: SampleConfig = SampleConfig()


def main(config: Config, forecast: Forecast | None = None) -> Path:
    """Train, validate, and write `final/`. Run again after an interruption, it goes on."""
    if config.seconds and config.steps != Config.model_fields["steps"].default:  # that of a resolved.yaml is
        raise UsageError("steps and seconds are both given", fix="seconds=null, or leave steps out")
    check_training(config.train, config.device)
    # A wrong path or source is told before a run folder exists.
    train, valid = Shards(config.data, "train"), Shards(config.data, "valid")
    check_held_out(config.train, valid.tokens > 0)
    batches = TokenLoader(train, config.seq_len, config.batch_size, config.seed, config.mixture)
    with shared_run(config) as run:
        device = choose_device(config.device)
        use_machine(run)
        if forecast:
            run.once("forecast", forecast)
        tokenizer = Tokenizer(config.data / "tokenizer")
        from_first(train.verify)
        model = _model(config, tokenizer, device)
        training = config.train.model_copy(update={"optimizer": with_rate(config.train.optimizer, model.config.dim)})
        evaluate = partial(_evaluate, run=run, config=config, valid=valid, tokenizer=tokenizer)
        asked = config.model_dump(mode="json")
        made_from = lineage("pretrain", [config.data], config=asked, data=train.fingerprint)
        save = partial(save_model, model=model, tokenizer=tokenizer, save_dtype=config.save_dtype, lineage=made_from)
        plan: dict[str, Any] = {"steps": config.steps}
        if config.seconds:
            measure = partial(steps_within, config.seconds, model, batches, next_token, training, evaluate)
            plan = run.once("plan", measure)
        state = fit(run, model, batches, next_token, training, plan["steps"], evaluate, save)
        result = {"steps": state.step, "tokens": state.tokens, "seconds": state.seconds}
        if config.train.keep_best:
            result["kept_step"] = state.kept
        if "seconds_probing" in plan:
            result["seconds"] += plan["seconds_probing"]
            result["seconds_compiling"] = plan["seconds_compiling"]
        if valid.tokens:
            result["bits_per_byte"] = bits_per_byte(model, valid, config.seq_len, config.batch_size)
        stop_together(run, f"all steps are saved in {run.folder}, final/ is not written yet")
        from_first(write_json, run.folder / "result.json", result)
        with on_first(atomic_folder(run.final)) as folder:
            save(folder, lineage={**made_from, "metrics": result})
        _report(run, result)
    return config.output


def _model(config: Config, tokenizer: Tokenizer, device: torch.device) -> Transformer:
    shape = resolve_model(config.model, tokenizer.vocab_size)
    if config.seq_len > shape.max_seq_len:
        raise UsageError(
            f"seq_len={config.seq_len} is more than the model's max_seq_len={shape.max_seq_len}",
            fix="model.max_seq_len=N",
        )
    model = build_model(shape, choose_dtype(config.dtype, device))
    materialize(model, device)
    init_weights(model, config.seed)
    if config.compile:
        compile_blocks(model)
    checkpoint_blocks(model, config.train.checkpoint_activations, config.train.offload_activations)
    shard(model)
    log.info("model: %s parameters, %s", f"{count_parameters(shape):,}", config.model.preset)
    return model


def _evaluate(
    model: Transformer, step: int, *, run: Run, config: Config, valid: Shards, tokenizer: Tokenizer
) -> dict[str, float]:
    """Bits per byte, and nats a token, on a part of the validation split; samples go to the log and samples.jsonl."""
    options = config.samples
    if options.prompts:
        ids = [[tokenizer.bos_id, *tokenizer.encode(p)] for p in options.prompts]
        limits = {"max_tokens": options.max_tokens, "temperature": options.temperature, "seed": config.seed}
        rows = generate(model, ids, stop_ids=tokenizer.stop_ids, **limits)
        for prompt, before, row in zip(options.prompts, ids, rows, strict=True):
            if not step:
                break  # step 0 is the measuring of a time budget
            text = prompt + tokenizer.decode_after(before, row)
            log.info("  it writes: %s", shorten(harmless(text).replace("\n", " / "), 100, placeholder=" ..."))
            run.samples.write(step=step, prompt=prompt, text=text)
    if not valid.tokens:
        return {}
    bits = bits_per_byte(model, valid, config.seq_len, config.batch_size, max_windows=128)
    return {"bits_per_byte": bits, "valid_loss": bits * math.log(2) * valid.bytes / (valid.tokens - 1)}


def _report(run: Run, result: dict[str, float]) -> None:
    compiling = f" ({result['seconds_compiling']:.0f} s compiling)" if "seconds_compiling" in result else ""
    spent = f"{result['tokens']:,} tokens in {clock(result['seconds'])}{compiling}"
    log.info("trained %s steps, %s", f"{result['steps']:,}", spent)
    if "bits_per_byte" in result:
        log.info("bits per byte on the held-out text: %.3f", result["bits_per_byte"])
    log.info("model: %s", run.final)
