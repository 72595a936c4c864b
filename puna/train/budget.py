"""How many steps fit into a number of seconds: ten are measured, the number is fixed, nothing is measured again."""

import time
from statistics import median
from typing import Any

import torch
from torch import nn

from puna.log import log
from puna.train.fit import BatchSource, Evaluate, Objective, TrainConfig, build_optimizer, train_step
from puna.train.guard import Guard

_PROBE = 10
_MARGIN = 0.92  # a machine drifts by 5-10 % between minutes


def steps_within(
    seconds: float,
    model: nn.Module,
    batches: BatchSource,
    objective: Objective,
    config: TrainConfig,
    evaluate: Evaluate,
    evaluations: int = 5,
) -> dict[str, Any]:
    """Steps that train in `seconds` of wall clock, the probe, compilation and `evaluations` validations included.

    The model's weights and the data position are put back: the run starts as if nothing had been tried.
    """
    started = time.perf_counter()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    position = batches.state_dict()
    optimizer = build_optimizer(model, config.optimizer)
    device = next(model.parameters()).device
    times = []
    for step in range(_PROBE):
        before = time.perf_counter()
        micro = [next(batches) for _ in range(config.accumulate)]
        train_step(model, optimizer, micro, objective, 1e-8, config, device, Guard(_PROBE), step)
        times.append(time.perf_counter() - before)
    before = time.perf_counter()
    evaluate(model, 0)
    per_evaluation = time.perf_counter() - before
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    batches.load_state_dict(position)
    per_step = median(times[3:])
    spent = time.perf_counter() - started
    steps = max(_PROBE, int((_MARGIN * seconds - spent - evaluations * per_evaluation) / per_step))
    log.info("steps: %d (%.0f ms each, to fit %d s)", steps, 1000 * per_step, seconds)
    return {
        "steps": steps,
        "seconds_per_step": per_step,
        "seconds_compiling": max(0.0, times[0] - per_step),
        "seconds_probing": spent,
    }
