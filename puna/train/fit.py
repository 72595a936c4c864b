"""The only training loop. Recipes differ in the four things they hand to it, never in the loop."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import fmean
from typing import Any, Literal, Protocol

import torch
from pydantic import PositiveInt
from torch import nn

from puna.checkpoint.train_state import TrainState, load_train_state, newest_checkpoint, prune, save_train_state
from puna.config import Config
from puna.data.loader import Batch
from puna.dist.collectives import from_first, largest, total
from puna.dist.fsdp import reshard, whole
from puna.errors import DataError
from puna.log import Progress, log
from puna.ranks import ranks
from puna.run_folder import Run
from puna.train.guard import Guard
from puna.train.objectives import Loss
from puna.train.optim import OptimizerConfig, build_optimizer, learning_rate


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
    evaluate_every: int | None = None
    """Steps between validations; null: five times in the run."""
    save_every: int | None = None
    """Steps between checkpoints; null: five times in the run. At most this many steps are lost in a crash."""
    keep: int = 2
    """Checkpoints kept."""
    skip_budget: int = 3
    """Steps in a row that may be skipped for a non-finite loss or gradient before the run stops."""
    optimizer: OptimizerConfig = OptimizerConfig()


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

    A row of a validation has `train_loss`, the mean of the last ten steps, and `gap`, valid_loss - train_loss: what
    grows when a model learns its text by heart. Under a mixture the two are losses on different text, and the gap has
    an offset of its own: its change tells, not its value.

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
    optimizer = build_optimizer(model, config.optimizer)
    state = TrainState()
    if checkpoint := from_first(newest_checkpoint, run):
        state = load_train_state(checkpoint, model, optimizer, batches)
    run.metrics.rewind(state.step)
    evaluated, losses = from_first(_history, run)
    recent = deque(losses, maxlen=_RECENT)
    # A validation that a crash cut short is made again, and writes its samples again.
    run.samples.rewind(state.step if state.step in evaluated else state.step - 1)
    guard = Guard(config.skip_budget)
    evaluate_every, save_every = (
        every or max(1, -(-steps // 5)) for every in (config.evaluate_every, config.save_every)
    )
    with Progress("training", steps, state.step) as progress:
        while True:
            stop = largest(run.stop.signal)  # whichever rank it came to, all stop at the same step
            last = state.step == steps
            due = last or (state.step and state.step % evaluate_every == 0)
            if due and state.step not in evaluated and not stop:
                started = time.perf_counter()
                metrics = dict(evaluate(model, state.step))
                reshard(model)
                metrics |= {f"epochs.{name}": passes for name, passes in batches.epochs().items()}
                if recent:
                    metrics["train_loss"] = fmean(recent)
                if "valid_loss" in metrics and "train_loss" in metrics:
                    metrics["gap"] = metrics["valid_loss"] - metrics["train_loss"]
                state.seconds += time.perf_counter() - started
                run.metrics.write(step=state.step, **metrics)
                told = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items())
                log.info("step %d  %s", state.step, told or "nothing is held out to validate on")
                stop = largest(run.stop.signal)
            if stop:
                run.stop.signal = stop
                save_train_state(run, state, model, optimizer, batches, save_model)
                run.stop.check(f"step {state.step} of {steps} is saved in {run.folder}")
            if last:
                return state
            started = time.perf_counter()
            lr = learning_rate(state.step, steps, config.optimizer)
            admit = partial(guard.admits, state.step + 1, batches.state_dict())
            micro = [next(batches).to(device) for _ in range(config.accumulate)]
            row = train_step(model, optimizer, micro, objective, lr, config.optimizer.clip, admit)
            state.step += 1
            state.tokens += row["n"]
            if math.isfinite(row["loss"]):  # that of a skipped step may not be
                recent.append(row["loss"])
            state.seconds += (took := time.perf_counter() - started)
            tok_s = ranks() * sum(batch.size for batch in micro) / took
            run.metrics.write(step=state.step, **row, tokens=state.tokens, tok_s=tok_s, seconds=state.seconds)
            progress.update(state.step, f"loss {row['loss']:.3f}  {tok_s:,.0f} tok/s")
            # Saved before it is validated: a crash in between loses a number, which the resumed run makes up for.
            if state.step % save_every == 0 or state.step == steps:
                save_train_state(run, state, model, optimizer, batches, save_model)
                from_first(prune, run, config.keep)


def _history(run: Run) -> tuple[set[int], list[float]]:
    """Of the rows that are kept: the steps that were validated, and the last losses."""
    rows = run.metrics.read()
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    return {row["step"] for row in rows if "loss" not in row}, losses[-_RECENT:]


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro: Sequence[Batch],
    objective: Objective,
    lr: float,
    clip: float,
    admit: Callable[[float, float], bool],
) -> dict[str, Any]:
    """One optimizer step over the micro-batches of all ranks: the gradient of their summed loss by their summed n.

    The weights change only if `admit(loss, gradient norm)`; the gradient is clipped to norm `clip` (0: not).
    """
    n = int(*total(sum(batch.n for batch in micro)))
    if n == 0:
        raise DataError("a step has nothing to train", cause="every label of its batches is masked")
    model.train()
    sums: dict[str, torch.Tensor] = {}
    for batch in micro:
        loss = objective(model, batch)
        (loss.sum / n).backward()
        for name, value in {"loss": loss.sum, **loss.metrics}.items():
            sums[name] = sums.get(name, 0.0) + value.detach()
    row = {name: value / n for name, value in zip(sums, total(*map(float, sums.values())), strict=True)}
    trained = [p for p in model.parameters() if p.grad is not None]
    grad_norm = float(whole(nn.utils.clip_grad_norm_(trained, clip or float("inf"))))
    for group in optimizer.param_groups:
        group["lr"] = lr * group["rate"]
    if admit(row["loss"], grad_norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {**row, "lr": lr, "grad_norm": grad_norm, "n": n}
