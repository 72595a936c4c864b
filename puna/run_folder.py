"""The run folder: what was asked (config), what was measured once, what happened (metrics, log), how to stop.

config.yaml      what the user gave (file and words)    measured.json   choices measured once: threads, steps
resolved.yaml    every value                            metrics.jsonl   one row a step
env.json         versions, machine, command             samples.jsonl   text the model wrote while learning
log.txt          what the terminal showed               checkpoints/step-N/  final/
"""

import contextlib
import json
import logging
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from puna.config import RecipeConfig, differences, load_config, read_yaml, to_yaml
from puna.errors import CheckpointError, Interrupted, UsageError
from puna.files import lock, make_folder, sweep, write_json, write_text
from puna.log import Metrics, log
from puna.ranks import rank, ranks

T = TypeVar("T")
Forecast = Callable[[], dict[str, float] | None]
"""Bytes and seconds a step, foretold; None where that cannot be."""


class Run:
    """An open run folder. `open_run` makes it; recipes and `fit` write through it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.checkpoints, self.final = folder / "checkpoints", folder / "final"
        self.metrics, self.samples = Metrics(folder / "metrics.jsonl"), Metrics(folder / "samples.jsonl")
        self.stop = Stop()
        self.from_first: Callable[[Callable[[], Any]], Any] = _call
        """What a function gives on rank 0; several ranks exchange it (dist/collectives.py)."""

    def once(self, name: str, measure: Callable[[], T]) -> T:
        """The stored value of `name`, or `measure()` now, stored. A resumed run never measures again.

        All ranks measure, since that may need all of them; what rank 0 found is what holds.
        """
        path = self.folder / "measured.json"
        stored = self.from_first(lambda: _stored(path))
        if name not in stored:
            value = measure()
            stored[name] = self.from_first(lambda: value)
            if rank() == 0:
                write_json(path, stored)
        return stored[name]

    def tell_forecast(self, memory: int, seconds: float) -> None:
        """Log what was foretold of a step beside what the first one took."""
        told = _stored(self.folder / "measured.json").get("forecast") if rank() == 0 else None
        if told:
            foretold = f"{told['memory'] / 1e9:.2f} GB, {told['seconds_per_step']:.2g} s a step"
            log.info("predicted %s; measured %.2f GB, %.2g s in the first", foretold, memory / 1e9, seconds)


@contextlib.contextmanager
def open_run(config: RecipeConfig) -> Iterator[Run]:
    """Create or continue the run in `config.output`.

    The same config on an unfinished folder goes on where it stopped. Anything else is refused.

    Raises:
        UsageError: the run is finished, was started with another config, or the folder holds something else.
        ResourceError: another process is writing there.
    """
    folder = config.output
    resolved = folder / "resolved.yaml"
    make_folder(folder)
    if not resolved.exists() and any(not p.name.startswith(".") for p in folder.iterdir()):
        raise UsageError("the folder is not empty and holds no run", where=folder, fix="choose another output=...")
    with lock(folder):
        if resolved.exists():
            _check_continues(config, folder)
        else:  # the file that makes it a run comes first: a crash right here can be continued
            write_text(resolved, to_yaml(config))
        write_text(folder / "config.yaml", to_yaml(config, given_only=True))
        write_json(folder / "env.json", environment())
        run = Run(folder)
        for place in (folder, run.checkpoints):
            sweep(place, held=True)
        for rows in (run.metrics, run.samples):
            rows.rewind()  # a row cut short by a crash would swallow the next one that is written
        handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
        handler.handleError = lambda record: None  # a full disk is told once, by what fails for it
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(handler)
        try:
            with run.stop.listening():
                yield run
            # Whoever asked for a stop must not see a success: a script would go on with its next command.
            run.stop.check(f"the run had just been finished in {folder}", fix="")
        finally:
            log.removeHandler(handler)
            handler.close()


def _call(function: Callable[[], T]) -> T:
    return function()


class Stop:
    """SIGINT and SIGTERM ask for a stop at the next step boundary; a second one stops at once."""

    def __init__(self) -> None:
        self.signal = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # signals reach the main thread only: a notebook's worker keeps its own handlers
            return
        before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, _frame: object) -> None:
        if self.signal:
            raise Interrupted("stopped at once", number)
        self.signal = number
        log.warning("stopping after this step (again: stop now)")

    def check(self, what: str, fix: str = "run the same command again to go on") -> None:
        """Raise Interrupted if a stop was asked for; `what` says what is safe by now."""
        if self.signal:
            raise Interrupted(f"stopped: {what}", self.signal, fix=fix)


def environment() -> dict[str, Any]:
    """Versions and machine: enough to reproduce an issue, no secrets."""
    wanted = ("puna", "torch", "numpy", "tokenizers", "sentencepiece", "safetensors")
    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "ranks": ranks(),
        "versions": {name: installed.get(name) for name in wanted},
    }


def _stored(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError as error:
        raise CheckpointError(f"damaged: {error}", where=path, fix="start again with another output=...") from None


def _asked(kind: type[RecipeConfig], resolved: Path) -> dict[str, Any]:
    """Every value a run was started with; a key that is younger than the run has its default."""
    try:
        return load_config(kind, resolved).model_dump(mode="json")
    except UsageError:  # a key that is no more: told as a difference
        return dict(read_yaml(resolved))


def _check_continues(config: RecipeConfig, folder: Path) -> None:
    if (folder / "final").exists():
        raise UsageError(
            "this run is finished", where=folder, fix="choose another output=..., or remove that folder first"
        )
    old, new = _asked(type(config), folder / "resolved.yaml"), config.model_dump(mode="json")
    old["output"] = new["output"]  # a run may be moved
    changed = list(differences(old, new))
    trained = any("loss" in row for row in Metrics(folder / "metrics.jsonl").read())
    if changed and not any((folder / "checkpoints").glob("step-*")) and not trained:
        log.info("nothing was trained in %s yet: taking the new config", folder)
        # The new config last: a crash in between must not leave it beside what was measured for the old one.
        for name in ("measured.json", "metrics.jsonl", "samples.jsonl"):
            (folder / name).unlink(missing_ok=True)
        write_text(folder / "resolved.yaml", to_yaml(config))
        return
    if changed:
        raise UsageError(
            "an unfinished run with another config is here: " + "; ".join(changed),
            where=folder,
            fix="use the old values to go on, or choose another output=...",
        )
    log.info("going on with the run in %s", folder)
