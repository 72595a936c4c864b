"""Trackers show a run elsewhere; whatever one does, the run trains, ends and resumes as if it were not there."""

import contextlib
import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from puna import run_folder
from puna.config import RecipeConfig
from puna.errors import NumericError, UsageError
from puna.files import write_json
from puna.log import Metrics, log
from puna.recipes import run
from puna.run_folder import open_run
from puna.train.fit import TrainConfig

SMALL = {
    "model.preset": "llama3.2-1b", "model.dim": 16, "model.n_layers": 1, "model.n_heads": 1, "model.n_kv_heads": 1,
    "model.head_dim": 16, "model.ffn_dim": 16, "model.rope_scaling": None, "seq_len": 16, "batch_size": 2,
    "train.evaluate_every": 2, "samples.prompts": [],
}  # fmt: skip
FAKE = """
import json, os, signal, sys, time
from pathlib import Path
class Settings:
    def __init__(self, **given): pass
class Run:
    url, dir, tags = "https://fake", ".", ()
    def log(self, values, step):
        with open(os.environ["FAKE_LOG"], "a") as file: print(json.dumps([step, values]), file=file)
        {in_log}
    def finish(self, exit_code=0):
        with open(os.environ["FAKE_LOG"], "a") as file: print(json.dumps(["finish", exit_code, self.tags]), file=file)
        {in_finish}
def init(**given):
    print("noise"); print("noise", file=sys.stderr)
    with open(os.environ["FAKE_LOG"], "a") as file: print(json.dumps(["init", given["id"], given["name"]]), file=file)
    {in_init}
    return Run()
"""


class Tracked(RecipeConfig):
    """The least that `open_run` needs."""

    recipe: Literal["tracked"] = "tracked"  # type: ignore[assignment]
    train: TrainConfig = TrainConfig()


class Fake:
    """A module `wandb` that notes its calls and does in one of them what it is told."""

    def __init__(self, place: Path):
        self.place, self.notes = place, place / "notes.jsonl"

    def do(self, **code: str) -> None:
        calls = {"in_log": "pass", "in_finish": "pass", "in_init": "pass", **code}
        source = FAKE
        for name, action in calls.items():
            source = source.replace("{" + name + "}", action)
        (self.place / "wandb.py").write_text(source)

    @property
    def rows(self) -> list[Any]:
        return [json.loads(line) for line in self.notes.read_text().splitlines()] if self.notes.exists() else []

    @property
    def steps(self) -> list[int]:
        return [row[0] for row in self.rows if isinstance(row[0], int)]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    place = tmp_path / "modules"
    place.mkdir()
    monkeypatch.syspath_prepend(str(place))
    found = Fake(place)
    monkeypatch.setenv("FAKE_LOG", str(found.notes))
    return found


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch):
    """What was logged, as (level, text)."""
    found: list[tuple[int, str]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append((record.levelno, record.getMessage()))

    handler = Keep()
    log.addHandler(handler)
    before = log.level
    log.setLevel(logging.INFO)
    yield found
    log.removeHandler(handler)
    log.setLevel(before)


def warnings(told: list[tuple[int, str]]) -> list[str]:
    return [text for level, text in told if level >= logging.WARNING]


def until(true: Callable[[], Any], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def config(folder: Path, *trackers: str) -> Tracked:
    return Tracked.model_validate({"output": folder, "train": {"track": list(trackers)}})


def train(folder: Path, *trackers: str, steps: range = range(1, 4), finish: bool = True) -> None:
    """A run that writes rows as `fit` does."""
    with open_run(config(folder, *trackers)) as opened:
        for step in steps:
            opened.metrics.write(step=step, loss=1 / step, lr=0.1, grad_norm=float("nan"))
            if step % 2 == 0:
                opened.metrics.write(step=step, valid_loss=2 / step, bits_per_byte=1.0)
        if finish:
            opened.final.mkdir()
            write_json(opened.final / "puna.json", {"data": "sha256:abcdef"})


def test_rows_reach_a_tracker_under_the_usual_names(fake: Fake, told, tmp_path: Path) -> None:
    """Ungrouped names lie in one heap; a tracker's prints tear the progress bar; a lost tag loses the lineage."""
    fake.do()
    train(tmp_path / "run", "wandb")
    (first, *rows, last) = fake.rows
    assert first[0] == "init"
    assert first[2] == "run"
    assert [row[0] for row in rows] == [1, 2, 2, 3]
    assert rows[2][1] == {"valid/loss": 1.0, "valid/bits_per_byte": 1.0}
    assert rows[0][1].keys() == {"train/loss", "train/lr", "train/grad_norm"}
    assert last[:2] == ["finish", 0]
    assert "data:abcdef" in last[2]
    assert [text for _, text in told] == ["wandb: https://fake"]
    assert (tmp_path / "run" / "track" / "wandb.log").read_text() == "noise\nnoise\n"


def test_a_resumed_run_shows_no_step_twice(fake: Fake, tmp_path: Path) -> None:
    """A crash repeats the steps since the last checkpoint: shown again they fold the curve back."""
    fake.do()
    folder = tmp_path / "run"
    with contextlib.suppress(NumericError), open_run(config(folder, "wandb")) as opened:
        for step in (1, 2, 3):
            opened.metrics.write(step=step, loss=1.0)
        until(lambda: fake.steps == [1, 2, 3])
        raise NumericError("too many steps are not finite")
    assert fake.rows[-1][:2] == ["finish", 1]
    with open_run(config(folder, "wandb")) as opened:
        opened.metrics.rewind(1)
        for step in (2, 3, 4, 5):
            opened.metrics.write(step=step, loss=1.0)
    assert fake.steps == [1, 2, 3, 4, 5]
    started = [row[1] for row in fake.rows if row[0] == "init"]
    assert started[0] == started[1], "a resumed run is another run to the tracker"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"in_init": "raise RuntimeError('no api key')"}, "wandb gave up: RuntimeError: no api key"),
        ({"in_init": "sys.exit(3)"}, "wandb gave up: SystemExit: 3"),
        ({"in_init": "os._exit(7)"}, "wandb died: 7"),
        ({"in_log": "os.kill(os.getpid(), signal.SIGSEGV)"}, "wandb died: -11"),
        ({"in_log": "raise ConnectionError('the network is down')"}, "wandb gave up: ConnectionError"),
        ({"in_finish": "raise ConnectionError('the network is down')"}, "wandb gave up: ConnectionError"),
        (
            {"in_log": "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(99)"},
            "wandb was killed, not done after 3 s",
        ),
        ({"in_finish": "time.sleep(99)"}, "wandb was killed, not done after 3 s"),
        ({"in_init": "time.sleep(99)"}, "wandb was killed, not done after 3 s"),
    ],
)
def test_a_faulty_tracker_is_one_warning(
    fault: dict[str, str], said: str, fake: Fake, told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A night's training must not end with the network of a tracker."""
    monkeypatch.setattr(run_folder, "TRACKERS_FINISH_IN", 3.0)
    fake.do(**fault)
    before = threading.active_count()
    train(tmp_path / "run", "wandb")
    assert len(warnings(told)) == 1
    assert warnings(told)[0].startswith(said)
    assert len(Metrics(tmp_path / "run" / "metrics.jsonl").read()) == 4
    assert threading.active_count() == before
    assert not children()


def test_a_missing_tracker_is_one_warning(fake: Fake, told, tmp_path: Path) -> None:
    """A config from another machine trains where its trackers are not installed, and says what to install."""
    (fake.place / "wandb.py").write_text("raise ModuleNotFoundError(name='wandb')")
    train(tmp_path / "run", "wandb")
    assert warnings(told) == ["wandb needs wandb, not installed here: pip install 'puna[track]'"]


def test_a_tracker_that_ends_long_before_its_run_is_one_warning(fake: Fake, told, tmp_path: Path) -> None:
    """Python aborts a process that exits while its thread holds the lock of sys.stdin: a second, false warning."""
    (fake.place / "wandb.py").write_text("raise ModuleNotFoundError(name='wandb')")
    with open_run(config(tmp_path / "run", "wandb")):
        until(lambda: warnings(told) and not children())
    assert warnings(told) == ["wandb needs wandb, not installed here: pip install 'puna[track]'"]


def test_another_config_is_shown_from_its_first_row(fake: Fake, tmp_path: Path) -> None:
    """Rows of a config that trained nothing would count as those of the one that took its folder."""
    fake.do()
    train(tmp_path / "run", "wandb", steps=range(0), finish=False)
    with open_run(config(tmp_path / "run", "wandb")) as opened:
        opened.metrics.write(step=0, valid_loss=2.0)
    other = Tracked.model_validate({"output": tmp_path / "run", "train": {"track": ["wandb"], "keep": 5}})
    with open_run(other) as opened:
        opened.metrics.write(step=0, valid_loss=3.0)
    assert [row[1] for row in fake.rows if row[0] == 0] == [{"valid/loss": 2.0}, {"valid/loss": 3.0}]


def test_a_process_that_cannot_be_started_is_one_warning(told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine out of processes still trains."""

    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(run_folder.subprocess, "Popen", refuse)
    train(tmp_path / "run", "wandb")
    assert len(warnings(told)) == 1
    assert "cannot be started" in warnings(told)[0]


def test_a_run_that_is_refused_starts_no_tracker(fake: Fake, tmp_path: Path) -> None:
    """A tracker of a refused run would leave an empty run behind, elsewhere."""
    fake.do()
    (tmp_path / "a file").touch()
    with pytest.raises(UsageError, match="not empty"), open_run(config(tmp_path, "wandb")):
        pass
    assert fake.rows == []


def test_other_trackers_are_no_other_run(fake: Fake, tmp_path: Path) -> None:
    """Whoever wants to see a run that is under way elsewhere must not have to start it anew."""
    fake.do()
    train(tmp_path / "run", finish=False)
    train(tmp_path / "run", "wandb", steps=range(4, 6), finish=False)
    assert fake.steps == [1, 2, 2, 3, 4, 4, 5], "rows of before belong to the run, too"


def test_a_killed_run_ends_its_trackers(fake: Fake, tmp_path: Path) -> None:
    """Left over, a tracker's process would hold memory on a shared machine for ever; its last rows count."""
    fake.do()
    code = f"""
import os, signal, sys, time
sys.path[:0] = {[str(fake.place), str(Path(__file__).parent)]!r}
from pathlib import Path
from test_track import config
from puna.run_folder import open_run
with open_run(config(Path({str(tmp_path / "run")!r}), "wandb")) as opened:
    while not Path({str(fake.notes)!r}).exists(): time.sleep(0.05)
    opened.metrics.write(step=1, loss=1.0)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], env={**os.environ}, check=False)
    assert killed.returncode == -signal.SIGKILL
    until(lambda: fake.rows and fake.rows[-1][0] == "finish")
    assert fake.steps == [1]


def test_training_does_not_wait_for_a_tracker(
    fake: Fake, shards: Path, told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way, from a config's line: a tracker that hangs changes no number and is waited for at the end."""
    monkeypatch.setattr(run_folder, "TRACKERS_FINISH_IN", 1.0)
    fake.do(in_init="time.sleep(99)")
    words = {"data": shards, "steps": 3, **SMALL}
    plain = run("pretrain", output=tmp_path / "plain", **words)
    shown = run("pretrain", output=tmp_path / "shown", **words, **{"train.track": ["wandb"]})
    losses = [[r["loss"] for r in Metrics(f / "metrics.jsonl").read() if "loss" in r] for f in (plain, shown)]
    assert losses[0] == losses[1]
    assert sum("wandb was killed" in text for text in warnings(told)) == 1


def test_tensorboard_reads_it_back(tmp_path: Path) -> None:
    """Event files that TensorBoard cannot read are found out when the run is over."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tmp_path / "run", "tensorboard", finish=False)
    train(tmp_path / "run", "tensorboard", steps=range(4, 6))
    read = accumulator.EventAccumulator(str(tmp_path / "run" / "track" / "tensorboard"))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("train/loss")] == [
        (s, pytest.approx(1 / s)) for s in (1, 2, 3, 4, 5)
    ]
    assert [(e.step, e.value) for e in read.Scalars("valid/loss")] == [(2, 1.0), (4, 0.5)]
    assert b"train.accumulate" in read.Tensors("config")[0].tensor_proto.string_val[0]
    assert b"abcdef" in read.Tensors("lineage")[0].tensor_proto.string_val[0]


def test_wandb_offline(told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real package: its rows, name, config and tags lie in the run folder, to be sent when there is a network."""
    records = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(tmp_path / "mine", "wandb")
    assert warnings(told) == []
    (file,) = (tmp_path / "mine" / "track" / "wandb").glob("offline-run-*/*.wandb")
    found = [records.Record.FromString(data) for data in leveldb_log(file.read_bytes()[7:])]
    runs = [r.run for r in found if r.WhichOneof("record_type") == "run"]
    assert runs[0].display_name == "mine"
    assert any("train.accumulate" in (item.key, *item.nested_key) for item in runs[0].config.update)
    assert "data:abcdef" in runs[-1].tags
    rows = [r.history.item for r in found if r.WhichOneof("record_type") == "history"]
    read = [{i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items} for items in rows]
    losses = [(r["_step"], r["train/loss"], r.get("valid/loss")) for r in read]
    assert losses == [(1, 1.0, None), (2, 0.5, 1.0), (3, pytest.approx(1 / 3), None)]


def leveldb_log(data: bytes) -> list[bytes]:
    """Records of a log of one block: checksum (4), length (2), kind (1), content."""
    found = []
    while len(data) > 7:
        size = int.from_bytes(data[4:6], "little")
        found.append(data[7 : 7 + size])
        data = data[7 + size :]
    return found


def test_trackio_on_this_machine(told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real package, and a resume that goes on in the same run."""
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    train(tmp_path / "mine", "trackio", finish=False)
    train(tmp_path / "mine", "trackio", steps=range(4, 6))
    assert warnings(told) == []
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "puna.db")) as store:
        rows = store.execute("select run_name, step, metrics from metrics order by id").fetchall()
        (config,) = store.execute("select config from configs").fetchone()
    known = json.loads((tmp_path / "mine" / "track" / "trackio.json").read_text())
    assert {row[0] for row in rows} == {f"mine-{known['id']}"}
    assert [row[1] for row in rows] == [1, 2, 2, 3, 4, 4, 5]
    assert json.loads(rows[1][2])["train/loss"] == 0.5
    assert json.loads(config)["train.accumulate"] == 1


def children() -> list[int]:
    """Processes of ours that live."""
    return [int(p.name) for p in Path("/proc").glob("[0-9]*") if _status(p).get("PPid") == str(os.getpid())]


def _status(process: Path) -> dict[str, str]:
    try:
        return dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines() if ":\t" in line)
    except OSError:
        return {}
