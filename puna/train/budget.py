"""How many steps fit into a number of seconds: ten are measured, the number is fixed, nothing is measured again."""

import time
from statistics import median
from typing import Any

import torch
from torch import nn

from puna.dist.fsdp import reshard
from puna.log import log
from puna.train.fit import BatchSource, Evaluate, Objective, TrainConfig, train_step
from puna.train.optim import build_optimizer

_PROBE = 10
_MARGIN = 0.92  # a machine drifts by 5-10 % between minutes


def steps_within(
    seconds: float,
    model: nn.Module,
    batches: BatchSource,
    objective: Objective,
    config: TrainConfig,
    evaluate: Evaluate,
) -> dict[str, Any]:
    """Steps that train in `seconds` of wall clock, with this probe, compilation and the run's validations in it.

    The model's weights and the data position are put back: the run starts as if nothing had been tried.
    """
    started = time.perf_counter()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    position = batches.state_dict()
    optimizer = build_optimizer(model, config.optimizer)
    device = next(model.parameters()).device
    times = []
    for _ in range(_PROBE):
        before = time.perf_counter()
        micro = [next(batches).to(device) for _ in range(config.accumulate)]
        clip, in_backward = config.optimizer.clip, config.optimizer.in_backward
        train_step(model, optimizer, micro, objective, 1e-8, clip, lambda loss, norm: True, in_backward)
        times.append(time.perf_counter() - before)
    before = time.perf_counter()
    evaluate(model, 0)
    reshard(model)
    per_evaluation = time.perf_counter() - before
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    batches.load_state_dict(position)
    per_step = median(times[3:])
    spent = time.perf_counter() - started
    left = _MARGIN * seconds - spent
    if config.evaluate_every:
        steps = int(left / (per_step + per_evaluation / config.evaluate_every))
    else:
        steps = int((left - 5 * per_evaluation) / per_step)
    if steps < 1:
        log.warning("%g s are too few: %.1f s went into measuring; training one step", seconds, spent)
    log.info("steps: %d (%.0f ms each, to fit %g s)", max(1, steps), 1000 * per_step, seconds)
    return {
        "steps": max(1, steps),
        "seconds_per_step": per_step,
        "seconds_compiling": max(0.0, times[0] - per_step),
        "seconds_probing": spent,
    }
