"""A run's metrics.jsonl shown elsewhere as it grows: TensorBoard, trackio, Weights & Biases.

`open_run` starts this file as a process of its own for each tracker. Trackers load a web stack, start threads, take
over signals and wait for networks: in another process one can fail, hang or die, and the run neither stops nor slows
down. The queue between the two is metrics.jsonl itself, so nothing is dropped and nothing has to be bounded.

track/NAME.json   how far the rows were shown, and under which id: a resumed run shows no step twice
track/NAME.log    what the tracker printed             track/tensorboard/  track/wandb/   its files
"""

import json
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from puna.files import write_json
from puna.lineage import code_version, fingerprint, read_lineage
from puna.log import parse_row
from puna.runs import read_run

PROJECT = "puna"
_EVERY = 1.0  # seconds between looks at the file
_ALONE = 60  # seconds to finish in when the run is gone: it was killed, so nobody ends this process


class Shown(NamedTuple):
    """A run as trackers are told of it."""

    name: str
    id: str
    folder: Path  # for the tracker's own files
    config: dict[str, Any]


class Tracker(NamedTuple):
    where: str
    """Where to look, told in the log."""
    log: Callable[[dict[str, float], int], Any]
    flush: Callable[[], Any]
    finish: Callable[[bool, dict[str, str]], Any]
    """(whether the run is finished, what its model was made from)"""


def tensorboard(shown: Shown) -> Tracker:
    """Event files written by the `tensorboard` package alone: neither tensorflow nor torch is loaded."""
    from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportMissingImports]
    from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportMissingImports]
    from tensorboard.plugins.text.metadata import create_summary_metadata  # pyright: ignore[reportMissingImports]
    from tensorboard.summary.writer.event_file_writer import EventFileWriter  # pyright: ignore[reportMissingImports]
    from tensorboard.util.tensor_util import make_tensor_proto  # pyright: ignore[reportMissingImports]

    folder = shown.folder / "tensorboard"
    writer = EventFileWriter(str(folder))

    def log(values: dict[str, float], step: int) -> None:
        rows = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=rows)))

    def text(tag: str, facts: dict[str, Any]) -> None:
        table = "\n".join(["| key | value |", "|---|---|", *(f"| {k} | {v} |" for k, v in facts.items())])
        metadata = create_summary_metadata(display_name=tag, description="")
        value = Summary.Value(tag=tag, metadata=metadata, tensor=make_tensor_proto([table.encode()]))
        writer.add_event(Event(wall_time=time.time(), step=0, summary=Summary(value=[value])))

    def finish(_: bool, made_from: dict[str, str]) -> None:
        if made_from:
            text("lineage", made_from)
        writer.close()

    text("config", {"name": shown.name, **shown.config})
    return Tracker(f"tensorboard --logdir {folder}", log, writer.flush, finish)


def trackio(shown: Shown) -> Tracker:
    """On this machine, or in the Space that TRACKIO_SPACE_ID names. It has no tags: lineage stays in the run folder."""
    import trackio  # pyright: ignore[reportMissingImports]

    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    # trackio knows a run by its name
    name = f"{shown.name}-{shown.id}"
    trackio.init(project=project, name=name, config=shown.config, resume="allow", embed=False)

    def log(values: dict[str, float], step: int) -> None:
        trackio.log(values, step=step)

    return Tracker(f"trackio show --project {project}", log, lambda: None, lambda *_: trackio.finish())


def wandb(shown: Shown) -> Tracker:
    """By the user's own settings: `wandb login`, WANDB_MODE=offline, WANDB_PROJECT, WANDB_ENTITY."""
    import wandb  # pyright: ignore[reportMissingImports]

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT), id=shown.id, name=shown.name, config=shown.config,
        dir=str(shown.folder), resume="allow", settings=wandb.Settings(console="off", disable_code=True),
    )  # fmt: skip

    def finish(finished: bool, made_from: dict[str, str]) -> None:
        if made_from:
            run.tags = (*(run.tags or ()), *(f"{name}:{value}"[:64] for name, value in made_from.items()))
        run.finish(exit_code=0 if finished else 1)

    where = run.url or f"wandb sync {Path(run.dir).parent}"
    return Tracker(where, lambda values, step: run.log(values, step=step), lambda: None, finish)


TRACKERS = {"tensorboard": tensorboard, "trackio": trackio, "wandb": wandb}


def mirror(folder: Path, name: str, ended: threading.Event, say: Callable[[int, str], None]) -> None:
    """Show the rows of the run in `folder` to tracker `name` until the run has `ended`."""
    file = folder / "track" / f"{name}.json"
    known = json.loads(file.read_bytes()) if file.exists() else {"id": secrets.token_hex(4), "last": [-1, 0]}
    config = {**read_run(folder).config, "puna_code": code_version() or ""}
    tracker = TRACKERS[name](Shown(folder.resolve().name, known["id"], folder / "track", config))
    write_json(file, known)
    say(logging.INFO, f"{name}: {tracker.where}")
    for rows in follow(folder / "metrics.jsonl", ended):
        fresh = [row for row in rows if place(row) > known["last"]]
        for row in fresh:
            tracker.log(metrics(row), row["step"])
        if fresh:
            tracker.flush()
            known["last"] = place(fresh[-1])
            write_json(file, known)
    tracker.finish((folder / "final").exists(), made_from(folder))


def follow(path: Path, ended: threading.Event) -> Iterator[list[dict[str, Any]]]:
    """New rows of a file that grows, and that a resume may replace by a shorter one; the last ones after the end."""
    offset, inode = 0, 0
    while True:
        last = ended.wait(_EVERY)
        if path.exists():
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != inode or status.st_size < offset:
                    offset, inode = 0, status.st_ino
                file.seek(offset)
                lines = file.read().rpartition(b"\n")[0]  # a line that is being written waits for the next look
            if lines:
                offset += len(lines) + 1
                yield [row for line in lines.split(b"\n") if (row := parse_row(line))]
        if last:
            return


def place(row: dict[str, Any]) -> list[int]:
    """Where a row stands in a run: a step is trained, then validated. A resume repeats steps with the same values."""
    return [row["step"], int("loss" not in row)]


def metrics(row: dict[str, Any]) -> dict[str, float]:
    """A row under the names that trackers group by: train/loss, train/lr, valid/loss, valid/bits_per_byte."""
    group = "train" if "loss" in row else "valid"
    # None: what was not finite; a tracker shows NaN as such
    values = {k: float("nan") if v is None else v for k, v in row.items() if k != "step"}
    return {f"{group}/{k.removeprefix('valid_')}": float(v) for k, v in values.items() if isinstance(v, int | float)}


def made_from(folder: Path) -> dict[str, str]:
    """What identifies the finished model and what it was made from; nothing of a run that is not finished."""
    final = folder / "final"
    known = {"final": fingerprint(final), "data": read_lineage(final).get("data")} if final.exists() else {}
    return {name: str(value).rpartition(":")[2][:16] for name, value in known.items() if value}


def main(folder: Path, name: str) -> int:
    """Mirror until standard input ends; one line `LEVEL text` on standard output for each thing the run shall tell."""
    (folder / "track").mkdir(exist_ok=True)
    os.nice(10)  # the run goes first
    ended = threading.Event()
    threading.Thread(target=_wait, args=[ended], daemon=True).start()
    with os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8") as pipe:
        printed = os.open(folder / "track" / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(printed, 1)
        os.dup2(printed, 2)

        def say(level: int, text: str) -> None:
            print(level, " ".join(text.split())[:300], file=pipe)

        try:
            mirror(folder, name, ended, say)
        except ModuleNotFoundError as error:
            say(logging.WARNING, f"{name} needs {error.name}, not installed here: pip install 'puna[track]'")
        except BaseException as error:  # also what leaves by sys.exit: it is told, once
            logging.exception("%s", name)
            say(logging.WARNING, f"{name} gave up: {type(error).__name__}: {error}")
    return 0


def _wait(ended: threading.Event) -> None:
    while os.read(0, 4096):  # empty when the run closes its end, or is gone; sys.stdin has a lock that aborts the exit
        pass
    ended.set()
    signal.alarm(_ALONE)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
