"""Killed at any moment, a run is readable and goes on; a stop asked for at any moment is exact.

PUNA_TEST_KILLS=5 kills five times at every event, and twenty times at random: the whole matrix (default: once, five).
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_verify import flip

from puna.checkpoint.model_directory import checkpoints
from puna.errors import Interrupted
from puna.files import MANIFEST, verify
from puna.log import Metrics
from puna.recipes import pretrain
from puna.recipes import run as run_recipe

ROUNDS = int(os.environ.get("PUNA_TEST_KILLS", "1"))
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="events are named by /proc/self/fd")
STEPS = 36
TRAINING = [
    f"steps={STEPS}", "train.save_every=1", "train.evaluate_every=3", "seq_len=32", "batch_size=2", "dtype=fp32",
    "save_dtype=fp32",
]  # fmt: skip
SMALL = {"dim": 16, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "head_dim": 16, "ffn_dim": 16}


class Killer:
    """`tests/killed.py`, asked to run the command line in a child below `root`."""

    def __init__(self, process: "subprocess.Popen[str]"):
        self.process = process

    def run(
        self,
        root: Path,
        *words: object,
        at: str | None = None,
        number: int = 9,
        after: float = 0,
        crowded: bool = False,
    ) -> Any:
        request = {"words": [*map(str, words)], "root": str(root), "at": at, "signal": number}
        request |= {"after": after, "crowded": crowded}
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def killer() -> Iterator[Killer]:
    command = [sys.executable, str(Path(__file__).with_name("killed.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Killer(process)
        assert process.stdin
        process.stdin.close()


@pytest.fixture(scope="module")
def words(shards: Path) -> list[str]:
    """A command that trains a tiny model, saves at every step and writes samples."""
    model = [f"model={json.dumps(SMALL)}", "samples.max_tokens=2", 'samples.prompts=["The llama"]']
    return ["run", "pretrain", f"data={shards}", *model, *TRAINING]


@pytest.fixture(scope="module")
def straight(killer: Killer, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """An undisturbed run, and the names of all events of a run and of one that goes on."""
    root = tmp_path_factory.mktemp("straight")
    fresh = killer.run(root, *words, f"output={root / 'run'}")
    assert fresh["code"] == 0, fresh["said"]
    copy = root / "copy"
    shutil.copytree(root / "run", copy / "run")
    for gone in ("final", f"checkpoints/step-{STEPS}"):
        shutil.rmtree(copy / "run" / gone)
    (copy / "run/report.html").unlink()
    resumed = killer.run(copy, *words, f"output={copy / 'run'}")
    assert resumed["code"] == 0, resumed["said"]
    return root / "run", [*dict.fromkeys(fresh["events"] + resumed["events"])]


@pytest.fixture(scope="module")
def short(killer: Killer, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of eight steps."""
    root = tmp_path_factory.mktemp("short")
    assert killer.run(root, *words, "steps=8", f"output={root / 'run'}")["code"] == 0
    return root / "run"


def assert_readable(run: Path) -> None:
    """Everything with a name that readers list is whole."""
    for folder in [*checkpoints(run), *run.glob("final")]:
        verify(folder)
    for file in run.glob("*.json"):
        json.loads(file.read_text())
    assert not [*run.glob("checkpoints/damaged-*")]


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*") if path.name != ".lock"]


def assert_same(run: Path, straight: Path) -> None:
    """The same weights, losses and samples, bit for bit."""

    def rows(folder: Path, name: str) -> list[dict[str, Any]]:
        timed = ("seconds", "tok_s", "memory")
        return [{k: v for k, v in row.items() if k not in timed} for row in Metrics(folder / name).read()]

    for name in ("metrics.jsonl", "samples.jsonl"):
        assert rows(run, name) == rows(straight, name)
    (weights,) = straight.glob("final/*.safetensors")
    ours, theirs = load_file(run / "final" / weights.name), load_file(weights)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {p.name for p in run.iterdir()} == {p.name for p in straight.iterdir()}


def unfinish(run: Path) -> None:
    """What is written at the end can be killed again once it is gone."""
    shutil.rmtree(run / "final", ignore_errors=True)
    (run / "report.html").unlink(missing_ok=True)


def run_ahead(run: Path) -> None:
    """Rows past the newest checkpoint, as a kill between a validation and a save leaves them: files to rewind."""
    for name in ("metrics.jsonl", "samples.jsonl") if (run / "resolved.yaml").exists() else ():
        with (run / name).open("a") as rows:
            rows.write(json.dumps({"step": 10 * STEPS}) + "\n")


def test_the_events_of_a_checkpoint(straight: tuple[Path, list[str]]) -> None:
    """A file that is not on the disk before the folder has its name is lost in a power cut; a point must not vanish."""
    run, names = straight
    (checkpoint, _) = checkpoints(run)
    files = [str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file() and p.name != MANIFEST]
    assert len(files) == 9
    half, place = "run/checkpoints/~step-N", "run/checkpoints"
    written = [f"fsynced {half}/{file}" for file in [*files, "optimizer", f"~{MANIFEST}"]]
    written.append("fsynced run/metrics.jsonl")
    renamed = names.index(f"rename {half} {place}/step-N")
    assert all(names.index(name) < renamed for name in written)
    assert all(name.replace("fsynced", "fsync") in names for name in written)
    last = [f"rename {half}/~{MANIFEST} {half}/{MANIFEST}", f"rename {half} {place}/step-N", f"fsynced {place}"]
    pruned = [f"rename {place}/step-N {half}", f"remove in {half}", f"rmdir {half}"]
    where = [names.index(name) for name in [*last, *pruned]]
    assert where == sorted(where)
    assert "fsynced run" in names


@pytest.mark.parametrize("chance", range(ROUNDS))
def test_killed_at_every_event(
    chance: int, killer: Killer, words: list[str], straight: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """One run, killed at each of its events in turn, always goes on and ends as if nothing had been."""
    reference, names = straight
    run = tmp_path / "run"
    opened, ending = names.index("open run/metrics.jsonl"), names.index("open run/~result.json")
    middle = [n for n in names[opened:] if "final" not in n and "result" not in n and "report" not in n]
    random.Random(chance).shuffle(middle)  # each round meets an event at other checkpoints
    order = [*names[:opened], *middle, *(n for n in names[ending:] if n not in middle)]
    assert sorted(order) == sorted(names)
    for name in order:
        unfinish(run)
        run_ahead(run)
        if name.endswith(" ."):  # of the folder around it, when the run's folder is new
            shutil.rmtree(run, ignore_errors=True)
        done = killer.run(tmp_path, *words, f"output={run}", at=name)
        assert done["code"] == -signal.SIGKILL, f"{name}: {done['said']}"
        assert_readable(run)
        if name in middle and not name.startswith(("remove", "rmdir")):  # past the start of the run, which sweeps
            assert all(left.endswith(f"-{done['pid']}") for left in leftovers(run)), name
    unfinish(run)
    done = killer.run(tmp_path, *words, f"output={run}")
    assert done["code"] == 0, done["said"]
    assert_same(run, reference)
    assert leftovers(run) == []


def test_killed_at_random_times(
    killer: Killer, words: list[str], straight: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """Between two events as well, with files half written: nothing is unreadable, and the end is the same."""
    draw, run = random.Random(ROUNDS), tmp_path / "run"
    for _ in range(5 if ROUNDS == 1 else 20):
        done = killer.run(tmp_path, *words, f"output={run}", after=draw.uniform(0.05, 0.5))
        unfinish(run)  # a fast machine may have come to the end
        assert done["code"] in (0, -signal.SIGKILL), done["said"]
        assert_readable(run)
    assert killer.run(tmp_path, *words, f"output={run}")["code"] == 0
    assert_same(run, straight[0])
    assert leftovers(run) == []


def test_adapters_and_data_are_whole_or_absent(
    killer: Killer, straight: tuple[Path, list[str]], texts: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Every recipe's output: killed at any moment it is not there, and the same command makes it."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "How many llamas?", "completion": "Two."}\n' * 12)
    tuning = [f"model={straight[0]}", f"data.path={rows}", "template=llama3", "steps=4", "dtype=fp32", "seq_len=64"]
    commands = {
        "tokenizer": ["run", "tokenizer", f"sources.path={texts}", "vocab_size=540"],
        "data": ["run", "data", f"sources.path={texts}", f"tokenizer={tokenizer_folder}"],
        "sft": ["run", "sft", *tuning, "train.save_every=1", "valid_fraction=0"],
    }
    for name, command in commands.items():
        reference, output = tmp_path / f"{name}-straight", tmp_path / name
        ended = killer.run(tmp_path, *command, f"output={reference}")
        assert ended["code"] == 0, ended["said"]
        points = [n.replace(reference.name, name) for n in dict.fromkeys(ended["events"])]
        points = [n for n in points if n.startswith(("open", "rename", "fsynced")) and not n.endswith("report.html")]
        made = output / "final" if name == "sft" else output
        for point in random.Random(ROUNDS).sample(points, 3 * ROUNDS):
            shutil.rmtree(output, ignore_errors=True)
            done = killer.run(tmp_path, *command, f"output={output}", at=point)
            assert done["code"] == -signal.SIGKILL, f"{point}: {done['said']}"
            if not made.exists():
                done = killer.run(tmp_path, *command, f"output={output}")
                assert done["code"] == 0, f"{point}: {done['said']}"
            verify(made)
            assert leftovers(tmp_path) == [], point
            for file in reference.rglob("*.safetensors"):  # not their bytes: metadata has no order in a header
                ours, theirs = (load_file(path) for path in (output / file.relative_to(reference), file))
                assert ours.keys() == theirs.keys(), point
                assert all(torch.equal(ours[name], theirs[name]) for name in theirs), point


STOPS = {
    "a training step": "open run/metrics.jsonl",
    "a validation": "open run/samples.jsonl",
    "the writing of a checkpoint": "open run/checkpoints/~step-N/~state.json",
    "the rename of a checkpoint": "rename run/checkpoints/~step-N run/checkpoints/step-N",
    "the removal of an old one": "rename run/checkpoints/step-N run/checkpoints/~step-N",
    "the start": "open run/~measured.json",
}


@pytest.mark.parametrize("what", STOPS)
def test_a_stop_is_exact(what: str, killer: Killer, words: list[str], short: Path, tmp_path: Path) -> None:
    """Asked to stop while it does anything at all, a run saves, says so by its exit code, and loses nothing."""
    run = tmp_path / "run"
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        done = killer.run(tmp_path, *words, "steps=8", f"output={run}", at=STOPS[what], number=number)
        if what != "the start" or number == signal.SIGTERM:  # the start is measured once
            assert done["code"] == code, done["said"]
            assert "is saved" in done["said"]
    assert_readable(run)
    if not (run / "final").exists():
        done = killer.run(tmp_path, *words, "steps=8", f"output={run}")
        assert done["code"] == 0, done["said"]
    assert_same(run, short)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_at_the_end_is_no_success(number: int, killer: Killer, words: list[str], tmp_path: Path) -> None:
    """Ctrl-C while the last files are written: a script that reads 0 goes on with its next command."""
    for at in ("rename run/~result.json run/result.json", "open run/~final/~puna.json"):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        command = [*words, "steps=2", f"output={tmp_path / 'run'}"]
        done = killer.run(tmp_path, *command, at=at, number=number)
        assert done["code"] == 128 + number, done["said"]
        assert "finished" in done["said"]
        verify(tmp_path / "run/final")
        assert (tmp_path / "run/report.html").exists()
        assert killer.run(tmp_path, *command)["code"] == 2


def test_a_stop_in_the_last_evaluation(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may outlast a scheduler's grace: the run ends before final/, and is finished by the next start."""
    whole = pretrain.bits_per_byte

    def stopped(*given: Any, **options: Any) -> float:
        if "max_windows" not in options:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(*given, **options)

    words: dict[str, Any] = {"output": tmp_path / "run", "data": shards, "model": SMALL, "seq_len": 32, "steps": 2}
    words |= {"batch_size": 2, "dtype": "fp32", "samples.prompts": []}
    monkeypatch.setattr(pretrain, "bits_per_byte", stopped)
    with pytest.raises(Interrupted) as caught:
        run_recipe("pretrain", **words)
    assert caught.value.exit_code == 143
    assert not (tmp_path / "run/final").exists()
    monkeypatch.undo()
    run_recipe("pretrain", **words)
    verify(tmp_path / "run/final")


def test_a_report_that_a_kill_prevented_is_made_up_for(killer: Killer, words: list[str], tmp_path: Path) -> None:
    """Killed after final/ and before its report: a finished run is refused, so nothing else would write the page."""
    run = tmp_path / "run"
    done = killer.run(tmp_path, *words, "steps=2", f"output={run}", at="open run/~report.html")
    assert done["code"] == -signal.SIGKILL
    assert killer.run(tmp_path, *words, "steps=2", f"output={run}")["code"] == 2
    assert (run / "report.html").exists()


def test_rows_cut_short_are_no_obstacle(killer: Killer, words: list[str], tmp_path: Path) -> None:
    """Cut within a letter of two bytes, or joined to the next row, a metrics file ended every later start."""
    run = tmp_path / "run"
    killer.run(tmp_path, *words, "steps=4", f"output={run}", at="rename run/~result.json run/result.json")
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (run / name).open("ab") as file:
            file.write('{"step": 99, "text": "é'.encode()[:-1])
    done = killer.run(tmp_path, *words, "steps=4", f"output={run}")
    assert done["code"] == 0, done["said"]
    assert [row["step"] for row in Metrics(run / "metrics.jsonl").read() if "loss" in row] == [1, 2, 3, 4]


def test_a_new_config_never_meets_old_measurements(killer: Killer, words: list[str], tmp_path: Path) -> None:
    """Killed while an untrained folder takes another config: the old steps, or threads, went on under the new one."""
    run, other = tmp_path / "run", [*words, "seed=5"]
    for at in (f"remove run/{name}" for name in ("measured.json", "metrics.jsonl", "samples.jsonl")):
        shutil.rmtree(run, ignore_errors=True)
        killer.run(tmp_path, *words, f"output={run}", at="open run/metrics.jsonl")
        for name in ("metrics.jsonl", "samples.jsonl"):
            (run / name).touch()
        assert killer.run(tmp_path, *other, f"output={run}", at=at)["code"] == -signal.SIGKILL
        assert "seed: 0" in (run / "resolved.yaml").read_text()
    killer.run(tmp_path, *other, f"output={run}", at="open run/~measured.json")
    assert "seed: 5" in (run / "resolved.yaml").read_text()
    assert not (run / "measured.json").exists()


def test_a_second_run_is_refused(killer: Killer, words: list[str], tmp_path: Path) -> None:
    """Two runs on one folder mix their checkpoints; the second says whose it is, the first notices nothing."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "puna", *words, "steps=9", f"output={run}"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as first:
        while not checkpoints(run):
            assert first.poll() is None
            time.sleep(0.01)
        os.kill(first.pid, signal.SIGSTOP)
        second = killer.run(tmp_path, *words, "steps=9", f"output={run}")
        os.kill(first.pid, signal.SIGCONT)
        assert second["code"] == 6
        assert f"process {first.pid}" in second["said"]
        assert second["events"] in (["open run/.lock"], ["mkdir run", "open run/.lock"])
        assert first.wait() == 0
    assert_readable(run)
    steps = [row["step"] for row in Metrics(run / "metrics.jsonl").read() if "loss" in row]
    assert steps == list(range(1, 10))


def test_a_flipped_bit_is_named_by_the_next_start(killer: Killer, words: list[str], tmp_path: Path) -> None:
    """Whatever file of the newest checkpoint is hit, resume says which, and goes on from the one before."""
    run, draw = tmp_path / "run", random.Random(3)
    killer.run(tmp_path, *words, "steps=3", f"output={run}", at="rename run/~result.json run/result.json")
    whole = tmp_path / "whole"
    run.rename(whole)
    names = [p.relative_to(whole) for p in checkpoints(whole)[-1].rglob("*") if p.is_file()]
    for name in names if ROUNDS > 1 else draw.sample(names, 3):
        shutil.copytree(whole, run)
        flip(run / name, draw.randrange((run / name).stat().st_size * 8))
        done = killer.run(tmp_path, *words, "steps=3", f"output={run}", at="rename run/~result.json run/result.json")
        assert "passed over" in done["said"]
        assert name.name in done["said"] or name.name == MANIFEST
        assert "step-2" in done["said"]
        assert (run / "checkpoints/damaged-step-3").exists()
        shutil.rmtree(run)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs may be mounted here: a whole run on a full disk is not tested")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_run_on_a_full_disk(killer: Killer, words: list[str], straight: tuple[Path, list[str]], disk: Path) -> None:
    """Free space is checked before a checkpoint, but others fill a disk too: whatever write fails, the run is whole."""
    size = sum(-(-p.stat().st_size // 4096) * 4096 for p in checkpoints(straight[0])[-1].rglob("*"))
    stopped = []
    for room in (0.2, 1.3, 1.9, 2.2) if ROUNDS == 1 else (0.2, 0.6, 0.9, 1.1, 1.3, 1.5, 1.7, 1.9, 2.2, 2.6, 3):
        run, filler = disk / "run", disk / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(disk).free - int(room * size)))
        done = killer.run(disk, *words, "steps=3", "train.keep=9", f"output={run}", crowded=True)
        assert done["code"] == 6, done["said"]
        assert "disk is full" in done["said"]
        assert_readable(run)
        assert leftovers(run) == []
        stopped.append(len(checkpoints(run)))
        filler.unlink()
        done = killer.run(disk, *words, "steps=3", "train.keep=9", f"output={run}")
        assert done["code"] == 0, done["said"]
        assert_readable(run)
        assert [row["step"] for row in Metrics(run / "metrics.jsonl").read() if "loss" in row] == [1, 2, 3]
        shutil.rmtree(run)
    assert set(stopped) == {0, 1, 2}
