"""Fine-tune a chat model on conversations: model + conversations -> adapter or model directory in `final/`."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from puna.checkpoint.train_state import TrainState
from puna.config import Config as BaseConfig
from puna.config import UserPath
from puna.data.conversations import ChatSource, given, passes
from puna.data.packing import PackedLoader
from puna.data.rows import Rows
from puna.dist.collectives import from_first, on_first, shared_run, stop_together, use_machine
from puna.dist.fsdp import shard
from puna.errors import UsageError
from puna.eval.conversations import mean_loss, replies
from puna.eval.tasks import TaskConfig, check_tasks, compare, evaluate_tasks
from puna.files import atomic_folder, write_json
from puna.infer.llama import Llama
from puna.infer.rehearsal import rehearsal
from puna.lineage import lineage, parent
from puna.log import clock, harmless, log
from puna.ops.packed_layers import packed_layers
from puna.ranks import rank
from puna.run_folder import Forecast, Run
from puna.tokenizer.chat.format import Encoded, has_template
from puna.train.blocks import checkpoint_blocks, compile_blocks
from puna.train.distill import DistillConfig
from puna.train.fit import Objective, TrainConfig, check_held_out, check_training, fit
from puna.train.objectives import next_token
from puna.train.optim import OptimizerConfig
from puna.tune.model import TunedModel, check_tuned, load_tuned, saver, trained_for, tuned_tokenizer
from puna.tune.objective import check_same, named_as
from puna.tune.rows import ChatRows, encode, read_rows, steps_of, template_variables
from puna.tune.teacher import check_teacher, distillation, load_teacher


# Own classes, not a changed default instance: `train.keep=3` builds the section anew from its class.
class Optimizer(OptimizerConfig):
    """Rates of fine-tuning: adapters take 1e-4 to 1e-3, full training about 2e-5."""

    lr: NonNegativeFloat | None = 5e-4
    weight_decay: float = 0.0
    warmup_steps: int = 10


class Training(TrainConfig):
    """As in pretraining, with fine-tuning's optimizer."""

    optimizer: Optimizer = Optimizer()  # type: ignore[assignment]


class SampleConfig(BaseConfig):
    """Messages the model answers before training and at every validation, so that one can watch it change."""

    prompts: list[str] = []
    max_tokens: int = 48


class Config(TunedModel, ChatRows):
    """Supervised fine-tuning: the assistant's words are trained, everything else is read."""

    recipe: Literal["sft"] = "sft"  # type: ignore[assignment]
    output: UserPath = Path("runs/sft")
    steps: PositiveInt = 200
    epochs: PositiveFloat | None = None
    """Instead of steps: passes over the conversations. Higher: learned more by heart; costs time."""
    rehearse: NonNegativeInt = 0
    """Questions the untuned chat model asks and answers itself first; trained along they keep it from forgetting."""
    watch: ChatSource = ChatSource()
    """Conversations of another kind: the loss on them tells what tuning forgets. None by default."""
    judge: TaskConfig = TaskConfig()
    """Tasks to measure before and after: before with solved examples and against the majority answer."""
    samples: SampleConfig = SampleConfig()
    distill: DistillConfig | None = None
    """A teacher to learn from, beside the rows' own words; null: none."""
    compile: bool = False
    """Compile what lies around attention (torch.compile): worth it above some minutes of training."""
    train: Training = Training()


def main(config: Config, objective: Objective | None = None, forecast: Forecast | None = None) -> Path:
    """Train on packed conversations and write `final/`. Run again after an interruption, it goes on.

    Args:
        objective: what is minimised instead of the words' own loss (docs/objectives.md).
        forecast: tells what a step will take.
    """
    _check(config, objective)
    with shared_run(config) as run:
        check_same(objective, run)
        check_tasks(config.judge.tasks)  # what can be wrong in data and tasks is told before anything is computed
        tokenizer, train, valid = read_rows(config, tuned_tokenizer(config), run.folder / "selection.json")
        if config.distill:
            check_teacher(config.distill, tokenizer)
        watched = encode(config, tokenizer, config.watch)[1] if given(config.watch) else []
        check_held_out(config.train, bool(valid))
        use_machine(run)
        if forecast:
            run.once("forecast", forecast)
        base = load_tuned(config, template_variables(config))
        llama = replace(base, tokenizer=tokenizer, stop_ids=list(dict.fromkeys([*base.stop_ids, *tokenizer.stop_ids])))
        if config.rehearse:
            own = partial(rehearsal, llama, config.rehearse, config.seq_len, config.seed)
            train = train.joined(Rows.of([Encoded(*row) for row in run.once("rehearsal", own)]))
        shape = {"seq_len": config.seq_len, "batch_size": config.batch_size, "packed": config.packed}
        packed = partial(PackedLoader, **shape, pad_id=tokenizer.eos_id)
        batches = packed(train, seed=config.seed, passes=passes(config.data))
        what = f"{len(train)} conversations in {len(batches.packs)} rows of {config.seq_len} ids"
        log.info("%s, %d held out", what, len(valid))
        steps = config.steps
        if config.epochs:
            steps = run.once("steps", partial(steps_of, config.epochs, batches, config.train.accumulate))
        named = {"valid_loss": valid, "watched_loss": watched}
        held_out = {name: packed(rows, seed=0) for name, rows in named.items() if rows}
        parents, asked = [parent(config.model, base.path)], config.model_dump(mode="json")
        minimised = objective or next_token
        if config.distill:
            teacher = load_teacher(config.distill, config.dtype, config.device)
            parents.append(parent(config.distill.teacher, teacher.path))
            minimised = distillation(teacher, config.distill)
        told = {"objective": named_as(objective)} if objective else {}
        made_from = lineage("sft", parents, config=asked, data=batches.fingerprint, **trained_for(config), **told)
        save = saver(config, llama)
        evaluate = partial(_evaluate, run=run, llama=llama, config=config, held_out=held_out)
        before = run.once("judged", partial(_judge, base if has_template(base.tokenizer) else llama, config.judge))
        if not from_first(lambda: bool(run.metrics.read())):
            run.samples.rewind(-1)  # of a start that was cut short
            run.metrics.write(step=0, **evaluate(llama.model, 0))
        if config.compile:
            compile_blocks(llama.model, packed_layers(llama.model).values())
        checkpoint_blocks(llama.model, config.train.checkpoint_activations, config.train.offload_activations)
        shard(llama.model)
        # Of dropout: what was drawn until here differs between a start and a resume.
        torch.manual_seed(config.seed + rank())
        saved = partial(save, lineage=made_from)
        state = fit(run, llama.model, batches, minimised, config.train, steps, evaluate, saved)
        result = _result(config, run, state, list(held_out))
        if config.judge.tasks:
            after = _judge(llama, config.judge.model_copy(update={"shots": 0}))
            result["tasks"] = compare(before, after, config.judge)
        stop_together(run, f"all steps are saved in {run.folder}, final/ is not written yet")
        from_first(write_json, run.folder / "result.json", result)
        with on_first(atomic_folder(run.final)) as folder:
            save(folder, lineage={**made_from, "metrics": result})
    log.info("tuned in %s: %s", clock(state.seconds), run.final)
    return config.output


def _check(config: Config, objective: Objective | None) -> None:
    """Refuse what cannot go together, before anything is read."""
    # The steps of a resolved.yaml are the default.
    if config.epochs and config.steps != Config.model_fields["steps"].default:
        raise UsageError("steps and epochs are both given", fix="epochs=null, or leave steps out")
    if config.qat and config.compile:
        raise UsageError("qat with compile", cause="its products are native calls already", fix="compile=false")
    if config.distill and objective:
        raise UsageError("distill is an objective, and another one is given", fix="distill=null")
    check_training(config.train, config.device)
    check_tuned(config)


def _evaluate(
    model: Any, step: int, *, run: Run, llama: Llama, config: Config, held_out: dict[str, PackedLoader]
) -> dict[str, float]:
    """Mean loss over the trained tokens of each held-out set; answers to the fixed prompts go to samples.jsonl."""
    for prompt, answer in replies(llama, config.samples.prompts, config.samples.max_tokens):
        log.info("  %s -> %s", prompt, shorten(harmless(answer).replace("\n", " / "), 100, placeholder=" ..."))
        run.samples.write(step=step, prompt=prompt, text=answer)
    return {name: mean_loss(model, conversations) for name, conversations in held_out.items()}


def _result(config: Config, run: Run, state: TrainState, losses: list[str]) -> dict[str, Any]:
    """How long it took, and each held-out loss of the weights that are kept."""
    result: dict[str, Any] = {"steps": state.step, "tokens": state.tokens, "seconds": state.seconds}
    if config.train.keep_best:
        result["kept_step"] = state.kept
    logged = from_first(lambda: [row for row in run.metrics.read() if row["step"] <= state.kept])
    return result | {k: row[k] for row in logged for k in losses if k in row}  # of each loss the last one stays


def _judge(llama: Llama, config: TaskConfig) -> dict[str, str]:
    return {score.task: score.marks for score in evaluate_tasks(llama, config)}
