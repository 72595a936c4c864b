"""The run folder: what was asked (config), what was measured once, what happened (metrics, log), how to stop.

config.yaml      what the user gave (file and words)    measured.json   choices measured once: threads, steps
resolved.yaml    every value                            metrics.jsonl   one row a step
env.json         versions, machine, command             samples.jsonl   text the model wrote while learning
log.txt          what the terminal showed               ended.json      why it stopped, if it did not finish
track/           what trackers keep (puna/track.py)     checkpoints/step-N/  final/
"""

import contextlib
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from puna.config import RecipeConfig, differences, load_config, read_yaml, to_yaml
from puna.errors import CheckpointError, Interrupted, UsageError
from puna.files import lock, make_folder, sweep, write_json, write_text
from puna.log import Metrics, harmless, log
from puna.ranks import rank, ranks

T = TypeVar("T")
TRACKERS_FINISH_IN = 20.0
"""Seconds a run waits at its end for trackers that are not done yet."""
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
        with _logged(folder / "log.txt"), _mirrored(folder, _trackers(config)), _ending_told(folder / "ended.json"):
            with run.stop.listening():
                yield run
            # Whoever asked for a stop must not see a success: a script would go on with its next command.
            run.stop.check(f"the run had just been finished in {folder}", fix="")


@contextlib.contextmanager
def _logged(file: Path) -> Iterator[None]:
    """What the log tells goes to `file`, too; each start of a run has a heading there."""
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.handleError = lambda record: None  # a full disk is told once, by what fails for it
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    handler.emit(logging.makeLogRecord({"msg": f"--- {' '.join(_command())}"}))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


@contextlib.contextmanager
def _ending_told(file: Path) -> Iterator[None]:
    """A run that ends unfinished says why in `file`; none there tells of a kill or a power cut."""
    file.unlink(missing_ok=True)
    try:
        yield
    except BaseException as error:
        how = "stopped" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
        what = getattr(error, "what", "") or f"{type(error).__name__}: {error}".rstrip(": ")
        if how == "failed" and (where := getattr(error, "where", "")):
            what = f"{where}: {what}"
        with contextlib.suppress(Exception):  # on a full disk the error that filled it has to come through
            write_json(file, {"state": how, "why": what.removeprefix("stopped: ")[:1000]})
        raise


def _trackers(config: RecipeConfig) -> Sequence[str]:
    return list(dict.fromkeys(getattr(getattr(config, "train", None), "track", ())))


@contextlib.contextmanager
def _mirrored(folder: Path, trackers: Sequence[str]) -> Iterator[None]:
    """A process for each tracker follows metrics.jsonl (puna/track.py): whatever happens in it, the run goes on."""
    started = [found for name in trackers if (found := _mirror(folder, name))]
    try:
        yield
    finally:
        deadline = time.monotonic() + TRACKERS_FINISH_IN
        for process, _ in started:
            with contextlib.suppress(OSError):
                process.stdin.close()  # type: ignore[union-attr]
        for process, listener in started:
            try:
                listener.join(max(0.0, deadline - time.monotonic()))
            finally:
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                        os.killpg(process.pid, signal.SIGKILL)
                listener.join(1.0)


def _mirror(folder: Path, name: str) -> tuple[subprocess.Popen[str], threading.Thread] | None:
    """The process of a tracker, out of reach of the terminal's Ctrl-C, and the thread that tells what it has to say."""
    pipe, paths = subprocess.PIPE, os.pathsep.join(filter(None, sys.path))
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "puna.track", str(folder), name], env={**os.environ, "PYTHONPATH": paths},
            stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, encoding="utf-8", errors="replace",
            start_new_session=True,
        )  # fmt: skip
        listener = threading.Thread(target=_tell, args=[process, name], daemon=True)
        listener.start()
    except (OSError, RuntimeError) as error:  # no more processes, or threads
        log.warning("%s cannot be started (%s); metrics.jsonl has every row", name, error)
        return None
    return process, listener


def _tell(process: subprocess.Popen[str], name: str) -> None:
    with process.stdout as lines:  # type: ignore[union-attr]
        for line in lines:
            level, _, text = line.partition(" ")
            log.log(int(level) if level.isdigit() else logging.INFO, "%s", harmless(text.rstrip()))
    if code := process.wait():
        how = f"was killed, not done after {TRACKERS_FINISH_IN:.0f} s" if code == -signal.SIGKILL else f"died: {code}"
        log.warning("%s %s; metrics.jsonl has every row", name, how)


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
        "command": _command(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "ranks": ranks(),
        "versions": {name: installed.get(name) for name in wanted},
    }


def _command() -> list[str]:
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


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
    for tree in (old, new):
        tree.get("train", {}).pop("track", None)  # and shown elsewhere
    changed = list(differences(old, new))
    trained = any("loss" in row for row in Metrics(folder / "metrics.jsonl").read())
    if changed and not any((folder / "checkpoints").glob("step-*")) and not trained:
        log.info("nothing was trained in %s yet: taking the new config", folder)
        # The new config last: a crash in between must not leave it beside what was measured for the old one.
        names = ("measured.json", "metrics.jsonl", "samples.jsonl")
        for file in (*(folder / name for name in names), *folder.glob("track/*.json")):
            file.unlink(missing_ok=True)
        write_text(folder / "resolved.yaml", to_yaml(config))
        return
    if changed:
        raise UsageError(
            "an unfinished run with another config is here: " + "; ".join(changed),
            where=folder,
            fix="use the old values to go on, or choose another output=...",
        )
    log.info("going on with the run in %s", folder)
