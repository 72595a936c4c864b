"""Checkpoints a run can go on from: a model directory plus the exact train state.

step-N/                 model directory in save_dtype: any checkpoint can be chatted with
step-N/optimizer/       fp32 parameters and optimizer moments, as torch's distributed checkpoint reads safetensors
step-N/state.json       step, tokens, seconds, data position, generator states (CPU, device) by rank, threads

Every rank writes and reads its parts; any number of ranks goes on from what any number has saved.
"""

import base64
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from puna.checkpoint.model_directory import checkpoints
from puna.checkpoint.safetensors_file import Weight, write_safetensors
from puna.checkpoint.weight_files import read_json
from puna.device import generators, set_generators
from puna.dist.collectives import from_each, from_first, on_first
from puna.errors import CheckpointError
from puna.files import atomic_folder, disk_errors, require_space, temporary_name, verify, write_json
from puna.log import log
from puna.ranks import rank, ranks
from puna.run_folder import Run


@dataclass
class TrainState:
    """What the loop counts."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    halvings: int = 0
    """How often micro-batches were halved because memory ran out."""
    kept: int = field(default=0, compare=False)
    """Once training is over: the step whose weights the model has, the last or the best."""


class _Positioned(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def save_train_state(
    run: Run,
    state: TrainState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: _Positioned,
    save_model: Callable[[Any], None],
) -> Path:
    """Write checkpoints/step-N, whole or not at all.

    Raises:
        ResourceError: the disk is full; older checkpoints are untouched.
    """
    tensors = _tensors(model, optimizer)
    from_first(require_space, run.folder, sum(t.nbytes for t in tensors.values()) * 3 // 2)
    target = run.checkpoints / f"step-{state.step}"
    if from_first(target.exists):  # saved by the run before this one was interrupted
        return target
    if rank() == 0:
        run.metrics.sync()
        run.samples.sync()
    # disk_errors for the other ranks too: theirs is the same full disk, and torch raises what one met on all.
    with disk_errors(target), on_first(atomic_folder(target)) as folder:
        save_model(folder)
        _write(folder / "optimizer", tensors)
        drawn_from = {kind: _text(state) for kind, state in generators(next(model.parameters()).device).items()}
        values = {
            **{key: value for key, value in asdict(state).items() if key != "kept"},
            "data": batches.state_dict(),
            "generators": from_each(drawn_from.pop("cpu")),
            "device_generators": from_each(drawn_from),
            "threads": torch.get_num_threads(),
            "moments": any(optimizer.state.values()),
        }
        if rank() == 0:
            write_json(folder / "state.json", values)
    log.debug("saved %s", target)
    return target


def load_train_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, batches: _Positioned
) -> TrainState:
    """Put everything back exactly: parameters, moments, data position, generators, thread count."""
    values = read_json(folder / "state.json")
    if values.get("moments", True):  # none before the first step, or when every step so far was skipped
        _make_moments(optimizer)
    _read(folder / "optimizer", _tensors(model, optimizer))
    batches.load_state_dict(values["data"])
    cpu = values.get("generators") or [values["generator"]]  # until 2026-11 there was one
    if len(cpu) == ranks():
        own = {"cpu": cpu[rank()], **(values.get("device_generators") or [{}] * ranks())[rank()]}
        set_generators(next(model.parameters()).device, {kind: _state(text) for kind, text in own.items()})
        torch.set_num_threads(values["threads"])
    else:  # dropout of other rows: no stream can be gone on with
        torch.manual_seed(values["step"] * ranks() + rank())
    log.info("resumed from %s", folder)
    return TrainState(values["step"], values["tokens"], values["seconds"], values.get("halvings", 0))


def load_weights(run: Run, step: int, model: nn.Module) -> None:
    """Put the trained parameters of an earlier step into the model, exactly as they were.

    Raises:
        CheckpointError: its checkpoint is gone or damaged.
    """
    folder = run.checkpoints / f"step-{step}"
    from_first(verify, folder)
    _read(folder / "optimizer", {f"parameter.{n}": p.detach() for n, p in model.named_parameters() if p.requires_grad})


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _state(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _make_moments(optimizer: torch.optim.Optimizer) -> None:
    """A step with a zero gradient makes the tensors that loading then overwrites.

    One parameter at a time: a run that steps in the backward may have no memory for all gradients.
    """
    groups = optimizer.param_groups
    for group in groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            optimizer.param_groups = [{**group, "params": [parameter]}]
            parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            parameter.grad = None
    optimizer.param_groups = groups


def newest_checkpoint(run: Run) -> Path | None:
    """The newest checkpoint whose files match their manifest; damaged ones are named and passed over."""
    for folder in reversed(checkpoints(run.folder)):
        try:
            verify(folder)
        except CheckpointError as error:
            log.warning("passed over: %s", error)
            damaged = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(damaged, ignore_errors=True)
            folder.rename(damaged)
        else:
            return folder
    return None


def prune(run: Run, keep: int, spared: int | None = None) -> None:
    """Remove all but the newest `keep` checkpoints and that of the step `spared`; renamed first, so a crash leaves no
    half of one.
    """
    superfluous = [f for f in checkpoints(run.folder)[: -max(1, keep)] if f.name != f"step-{spared}"]
    for folder in superfluous:
        doomed = temporary_name(folder)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Trainable parameters and their optimizer state under flat names; they share memory with the live ones."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[f"parameter.{name}"] = parameter.detach()
            tensors |= {f"{key}.{name}": value for key, value in optimizer.state[parameter].items()}
    return tensors


def _write(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Of one rank a tensor at a time: torch's writer holds all of them twice more, more than training takes."""
    if ranks() == 1:
        folder.mkdir()
        weights = {name: Weight(tuple(t.shape), t.dtype, t.cpu) for name, t in tensors.items()}
        write_safetensors(folder / "model-00001-of-00001.safetensors", weights, lambda name: None)
        return
    # Imported here: a second of start-up that only saving and resuming need.
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    with warnings.catch_warnings():  # "torch.distributed is disabled": one process is what we mean
        warnings.simplefilter("ignore")
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        save(dict(tensors), storage_writer=writer)


def _read(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=ranks() == 1)
    except BaseException as error:  # CheckpointException is not an Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise CheckpointError(f"the train state does not fit the model: {error}", where=folder) from None
