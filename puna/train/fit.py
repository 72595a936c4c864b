"""The only training loop. Recipes differ in the four things they hand to it, never in the loop."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import fmean
from typing import Any, Literal, Protocol

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import nn

from puna.checkpoint.train_state import (
    TrainState,
    load_train_state,
    load_weights,
    newest_checkpoint,
    prune,
    save_train_state,
)
from puna.config import Config
from puna.data.loader import Batch
from puna.device import choose_device, generators, peak_memory, release_freed_memory, set_generators
from puna.dist.collectives import from_first, largest, total
from puna.dist.fsdp import reshard, whole
from puna.errors import DataError, UsageError
from puna.log import Progress, log
from puna.ranks import ranks, started_as
from puna.run_folder import Run
from puna.train.blocks import Checkpointed
from puna.train.guard import Guard, Halving, best_step, worn_out
from puna.train.objectives import Loss
from puna.train.optim import OptimizerConfig, build_optimizer, learning_rate, stepping_in_backward


class BatchSource(Protocol):
    """Endless batches with a position that can be saved and restored."""

    def __next__(self) -> Batch: ...
    def __iter__(self) -> Iterator[Batch]: ...
    def epochs(self) -> dict[str, float]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


Objective = Callable[[Any, Any], Loss]
Evaluate = Callable[[Any, int], dict[str, float]]
SaveModel = Callable[[Any], None]

_RECENT = 10  # steps of the training loss beside a validation: few, or it lags behind while the loss falls


class TrainConfig(Config):
    """How long and how often; the optimizer has its own config."""

    accumulate: PositiveInt = 1
    """Micro-batches a step; the gradient is that of one batch of all of them."""
    track: list[Literal["tensorboard", "trackio", "wandb"]] = []
    """Where else to show metrics.jsonl while it grows: each adds a process, none can stop the run (puna[track])."""
    evaluate_every: PositiveInt | None = None
    """Steps between validations; null: five times in the run."""
    save_every: PositiveInt | None = None
    """Steps between checkpoints; null: five times in the run. At most this many steps are lost in a crash."""
    keep: PositiveInt = 2
    """Checkpoints kept; more go back further, and take disk."""
    keep_best: bool = False
    """Also keep the checkpoint of the lowest valid_loss, and make `final/` from it instead of from the last step."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after this many validations in a row without a lower valid_loss; lower stops sooner, maybe too soon."""
    skip_budget: NonNegativeInt = 3
    """Steps in a row that may be skipped for a non-finite loss or gradient before the run stops."""
    checkpoint_activations: Checkpointed = "none"
    """Blocks that are computed again in the backward instead of kept: selective (every second one) saves about half of
    the activations for a seventh more time, full nearly all for a third."""
    offload_activations: bool = False
    """What `checkpoint_activations: full` keeps of a block waits in CPU memory; for CUDA devices and long rows."""
    optimizer: OptimizerConfig = OptimizerConfig()


def check_training(config: TrainConfig, device: str) -> None:
    """Refuse what does not go together, before anything is read.

    Raises:
        UsageError: what, why, and what to set instead.
    """
    ranks_here, optimizer = started_as().ranks, config.optimizer
    if optimizer.in_backward:
        wrong = {
            "train.accumulate=1": config.accumulate > 1, "train.optimizer.clip=0": optimizer.clip > 0,
            "train.skip_budget=0": config.skip_budget > 0, "one process, without --nproc": ranks_here > 1,
        }  # fmt: skip
        if any(wrong.values()):
            raise UsageError(
                "train.optimizer.in_backward: a weight is stepped before the other gradients are there",
                cause="accumulation, clipping, the skipping of bad steps and several ranks need all of them",
                fix=" ".join(name for name, is_so in wrong.items() if is_so),
            )
    if optimizer.kind == "adamw8bit" and ranks_here > 1:
        raise UsageError(
            f"train.optimizer.kind=adamw8bit with {ranks_here} ranks", fix="adamw: the ranks divide its moments",
            cause="blocks of 256 numbers would be cut where a rank's part of a weight ends",
        )  # fmt: skip
    if config.offload_activations and config.checkpoint_activations != "full":
        raise UsageError(
            "train.offload_activations moves what a checkpointed block keeps", fix="train.checkpoint_activations=full"
        )
    if config.offload_activations and (kind := choose_device(device).type) != "cuda":
        raise UsageError(
            f"train.offload_activations on {kind}: activations are in the machine's own memory already",
            fix="train.offload_activations=false",
        )


def check_held_out(config: TrainConfig, held_out: bool) -> None:
    """Refuse what goes by a validation loss where there is no text to validate on, before a model is loaded.

    Raises:
        UsageError: see above.
    """
    if (config.patience or config.keep_best) and not held_out:
        raise UsageError(
            "train.patience and train.keep_best go by valid_loss, and nothing is held out",
            fix="hold some text out (valid_fraction), or train.patience=null train.keep_best=false",
        )


def fit(
    run: Run,
    model: nn.Module,
    batches: BatchSource,
    objective: Objective,
    config: TrainConfig,
    steps: int,
    evaluate: Evaluate,
    save_model: SaveModel,
) -> TrainState:
    """Train `model` in place for `steps` optimizer steps, from the newest checkpoint of `run` if it has one.

    A row of a validation has `train_loss`, the mean of the last ten steps (of `cross_entropy`, where an objective tells
    it beside another loss), and `gap`, valid_loss - train_loss: what grows when a model learns its text by heart. Under
    a mixture the two are losses on different text, and the gap has an offset of its own: its change tells, not its
    value.

    Args:
        model: what transforms made of it; its trainable parameters are optimized.
        batches: this rank's parts of micro-batches; a batch knows `n`, its number of trained units.
        objective: the sum of the loss over a batch's units; the division is made here, by the step's n.
        evaluate: (model, step) -> metrics of the model as it stands, logged with the step.
        save_model: writes the model into a checkpoint's folder.

    Raises:
        Interrupted: a signal came; the step was finished and saved.
        NumericError: too many non-finite steps.
    """
    device = next(model.parameters()).device
    release_freed_memory()
    most = peak_memory(device)
    optimizer = build_optimizer(model, config.optimizer)
    state = TrainState()
    if checkpoint := from_first(newest_checkpoint, run):
        state = load_train_state(checkpoint, model, optimizer, batches)
    run.metrics.rewind(state.step)
    evaluated, losses, validated = from_first(_history, run)
    recent = deque(losses, maxlen=_RECENT)
    # A validation that a crash cut short is made again, and writes its samples again.
    run.samples.rewind(state.step if state.step in evaluated else state.step - 1)
    guard = Guard(config.skip_budget)
    alone = config.optimizer.in_backward or ranks() > 1
    halving = Halving(state.halvings, "weights were stepped, or other ranks wait for this one" if alone else "")
    evaluate_every, save_every = (
        every or max(1, -(-steps // 5)) for every in (config.evaluate_every, config.save_every)
    )
    with Progress("training", steps, state.step) as progress:
        while True:
            stop = largest(run.stop.signal)  # whichever rank it came to, all stop at the same step
            last = state.step == steps or worn_out(validated, config.patience)
            due = last or (state.step and state.step % evaluate_every == 0)
            if due and state.step not in evaluated and not stop:
                started = time.perf_counter()
                release_freed_memory()  # a step leaves pieces free that the blocks of a validation do not fit into
                metrics = dict(evaluate(model, state.step))
                release_freed_memory()
                reshard(model)
                metrics |= {f"epochs.{name}": passes for name, passes in batches.epochs().items()}
                if recent:
                    metrics["train_loss"] = fmean(recent)
                if "valid_loss" in metrics and "train_loss" in metrics:
                    metrics["gap"] = metrics["valid_loss"] - metrics["train_loss"]
                state.seconds += time.perf_counter() - started
                run.metrics.write(step=state.step, **metrics, memory=peak_memory(device))
                told = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items())
                log.info("step %d  %s", state.step, told or "nothing is held out to validate on")
                if "valid_loss" in metrics and state.step:
                    validated[state.step] = from_first(_comparable, metrics["valid_loss"])
                if config.keep_best and best_step(validated) == state.step:
                    save_train_state(run, state, model, optimizer, batches, save_model)
                    from_first(prune, run, config.keep, state.step)
                if not last and worn_out(validated, config.patience):
                    last = True
                    log.info("stopping early: valid_loss was lowest at step %d of %d", best_step(validated), steps)
                    save_train_state(run, state, model, optimizer, batches, save_model)
                stop = largest(run.stop.signal)
            if stop:
                run.stop.signal = stop
                save_train_state(run, state, model, optimizer, batches, save_model)
                run.stop.check(f"step {state.step} of {steps} is saved in {run.folder}")
            if last:
                state.kept = state.step
                if config.keep_best and (best := best_step(validated)) not in (None, state.step):
                    state.kept = best
                    load_weights(run, best, model)
                    log.info("the model is that of step %d, where valid_loss was lowest, not of step %d",
                             best, state.step)  # fmt: skip
                return state
            started = time.perf_counter()
            lr = learning_rate(state.step, steps, config.optimizer)
            admit = partial(guard.admits, state.step + 1, batches.state_dict())
            micro = [next(batches).to(device) for _ in range(config.accumulate)]
            clip, in_backward = config.optimizer.clip, config.optimizer.in_backward
            row = train_step(model, optimizer, micro, objective, lr, clip, admit, in_backward, halving)
            state.step, state.halvings = state.step + 1, halving.times
            state.tokens += row["n"]
            if math.isfinite(row["loss"]):  # that of a skipped step may not be
                recent.append(row.get("cross_entropy", row["loss"]))
            state.seconds += (took := time.perf_counter() - started)
            tok_s = ranks() * sum(batch.size for batch in micro) / took
            row |= {"tokens": state.tokens, "tok_s": tok_s, "seconds": state.seconds, "memory": peak_memory(device)}
            if row["memory"] > most:  # freed blocks lie between others: unused, and more of them with every step
                most = row["memory"]
                release_freed_memory()
            run.metrics.write(step=state.step, **row)
            if state.step == 1:
                run.tell_forecast(row["memory"], took)
            progress.update(state.step, f"loss {row['loss']:.3f}  {tok_s:,.0f} tok/s")
            # Saved before it is validated: a crash in between loses a number, which the resumed run makes up for.
            if state.step % save_every == 0 or state.step == steps:
                save_train_state(run, state, model, optimizer, batches, save_model)
                from_first(prune, run, config.keep, best_step(validated) if config.keep_best else None)


def _history(run: Run) -> tuple[set[int], list[float], dict[int, float]]:
    """Of the rows that are kept: the steps that were validated, the last losses, and the validation losses by step.

    That of step 0 is of a model that was not trained, and that no checkpoint holds.
    """
    rows = run.metrics.read()
    losses = [row.get("cross_entropy", row["loss"]) for row in rows if row.get("loss") is not None]
    validated = {row["step"]: _comparable(row["valid_loss"]) for row in rows if "valid_loss" in row and row["step"]}
    return {row["step"] for row in rows if "loss" not in row}, losses[-_RECENT:], validated


def _comparable(loss: float | None) -> float:
    """A loss that was not finite is worse than any other; metrics.jsonl has it as null."""
    return loss if loss is not None and math.isfinite(loss) else math.inf


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro: Sequence[Batch],
    objective: Objective,
    lr: float,
    clip: float,
    admit: Callable[[float, float], bool],
    in_backward: bool = False,
    halving: Halving | None = None,
) -> dict[str, Any]:
    """One optimizer step over the micro-batches of all ranks: the gradient of their summed loss by their summed n.

    The weights change only if `admit(loss, gradient norm)`; the gradient is clipped to norm `clip` (0: not).

    Args:
        in_backward: step each weight during the backward, unclipped; `admit` is asked when they have changed, and can
            only end the run.
        halving: what to do when memory runs out; by default the error is raised.
    """
    n = int(*total(sum(batch.n for batch in micro)))
    if n == 0:
        raise DataError("a step has nothing to train", cause="every label of its batches is masked")
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = lr * group["rate"]
    norms: dict[torch.Tensor, torch.Tensor] = {}
    if in_backward:
        with stepping_in_backward(optimizer) as norms:
            sums = _backward(model, micro, objective, n, halving)
    else:
        sums = _backward(model, micro, objective, n, halving)
    row = {name: value / n for name, value in zip(sums, total(*map(float, sums.values())), strict=True)}
    trained = [p for p in model.parameters() if p.grad is not None]
    if norms:
        grad_norm = float(torch.stack([norms[p] for p in model.parameters() if p in norms]).norm())
    else:
        grad_norm = float(whole(nn.utils.clip_grad_norm_(trained, clip or float("inf"))))
    if admit(row["loss"], grad_norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {**row, "lr": lr, "grad_norm": grad_norm, "n": n}


def _backward(
    model: nn.Module, micro: Sequence[Batch], objective: Objective, n: int, halving: Halving | None
) -> dict[str, torch.Tensor]:
    """The gradients of the step, added up in the parameters; the sums of the loss and of all metrics.

    When memory runs out all of them are made over again, from the generators' states at the start: what the failed one
    had added up to then cannot be told from what it should have.
    """
    device = next(model.parameters()).device
    before = generators(device) if halving else {}
    while True:
        try:
            sums: dict[str, torch.Tensor] = {}
            for batch in halving.parts(micro) if halving else micro:
                loss = objective(model, batch)
                (loss.sum / n).backward()
                for name, value in {"loss": loss.sum, **loss.metrics}.items():
                    sums[name] = sums.get(name, 0.0) + value.detach()
            return sums
        except (RuntimeError, MemoryError) as error:
            if halving is None or not halving.helps(error, micro):
                raise
        # Out here the error is gone, and with its traceback what the failed backward still held.
        model.zero_grad(set_to_none=True)
        set_generators(device, before)
        if device.type == "cuda":
            torch.cuda.empty_cache()
