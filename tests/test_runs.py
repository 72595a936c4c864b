"""What `puna runs` tells of a run is what happened, fits a terminal, and takes no time."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import xml.etree.ElementTree as xml
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from puna.chart import Curves, Series
from puna.cli import app
from puna.cli.plot_runs import mean_of
from puna.cli.runs import words
from puna.cli.terminal import chart
from puna.config import RecipeConfig, load_config, parse_words
from puna.errors import DataError, Interrupted, NumericError, PunaError, UsageError
from puna.eval.tasks import TaskConfig
from puna.files import is_locked, lock, write_json
from puna.lora import LoraConfig
from puna.run_folder import open_run
from puna.runs import read_run
from puna.train.fit import TrainConfig
from puna.train.run_report import write_run_report

HEAVY = {"torch", "numpy", "puna.config", "rich", "asyncio"}
TASKS: list[dict[str, Any]] = [
    {"task": "chain_sum", "before": [0.1, 0.2, 0.3], "majority": 0.1, "after": [0.4, 0.5, 0.6], "gain": [0.2, 0.3, 0.4]}
]


class Trained(RecipeConfig):
    """A recipe's config with something of every kind in it."""

    recipe: Literal["sft"] = "sft"  # type: ignore[assignment]
    steps: int = 6
    model: str = "smollm2-135m"
    prompts: list[str] = []
    variables: dict[str, Any] = {}
    note: str | None = None
    lora: LoraConfig | None = LoraConfig()
    judge: TaskConfig = TaskConfig()
    train: TrainConfig = TrainConfig()


def make(
    folder: Path, steps: int = 6, ends: Callable[[], Any] = lambda: None, slope: float = 1.0, **given: Any
) -> Path:
    """A run that writes rows as `fit` does, and ends as `ends` does; without an error it is finished."""
    config = load_config(Trained, None, {"output": folder, **given})
    try:
        with open_run(config) as opened:
            for step in range(1, steps + 1):
                row = {"loss": 3 - slope * step / 10, "lr": 0.1, "grad_norm": 1.0, "n": 7, "tokens": 7 * step}
                opened.metrics.write(step=step, **row, tok_s=100.0 + step, seconds=float(step))
                if step % 2 == 0:
                    opened.metrics.write(step=step, valid_loss=4 - slope * step / 10, gap=1.0, memory=10**9)
            ends()
            write_json(folder / "result.json", {"steps": steps, "tokens": 7 * steps, "seconds": 6.0, "tasks": TASKS})
            opened.final.mkdir()
            write_json(opened.final / "puna.json", {"data": "sha256:da7a", "tokenizer": "sha256:70ce", "parents": []})
    except PunaError:
        pass
    return folder


def fail(error: PunaError) -> Callable[[], Any]:
    def ends() -> None:
        raise error

    return ends


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What a command prints on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def typed(*given: object) -> str:
        capsys.readouterr()
        app([str(word) for word in given], prog_name="puna", standalone_mode=False)
        return capsys.readouterr().out

    return typed


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Path]:
    """A run of another process that is still writing."""
    folder = make(tmp_path / "held", 4, fail(NumericError("x")))
    code = f"""
from pathlib import Path
from puna.files import lock
with lock(Path({str(folder)!r})):
    print("held", flush=True)
    input()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    yield folder
    process.communicate(b"\n")


def test_states(say: Callable[..., str], held: Path, tmp_path: Path) -> None:
    """A run that died in the night looked like one that is still training."""
    make(tmp_path / "finished")
    make(tmp_path / "stopped", 4, fail(Interrupted("stopped: step 4 of 6 is saved", signal.SIGTERM)))
    make(tmp_path / "failed", 4, fail(NumericError("3 steps in a row are not finite")))
    make(tmp_path / "crashed", 4, fail(NumericError("x")))
    (tmp_path / "crashed" / "ended.json").unlink()  # as a kill leaves it
    make(tmp_path / "damaged")
    (tmp_path / "damaged" / "resolved.yaml").write_text("a: [", encoding="utf-8")
    rows = {Path(row["name"]).name: row for row in json.loads(say("runs", "ls", tmp_path, "--json"))}
    assert {name: row["state"] for name, row in rows.items()} == {
        "held": "running", **{name: name for name in ("finished", "stopped", "failed", "crashed", "damaged")},
    }  # fmt: skip
    assert rows["failed"]["why"] == "3 steps in a row are not finite"
    assert rows["stopped"]["why"] == "step 4 of 6 is saved"
    assert all(row["summary"] for row in rows.values())
    assert "failed: 3 steps in a row" in say("runs", "show", tmp_path / "failed")
    with pytest.raises(UsageError, match="damaged"):
        say("runs", "show", tmp_path / "damaged")


def test_a_run_that_goes_on_has_not_ended(tmp_path: Path) -> None:
    """The reason of the last stop, told of a run that was killed after it went on, is a lie."""
    folder = make(tmp_path / "run", 4, fail(NumericError("x")))
    config = load_config(Trained, None, {"output": folder})
    child = os.fork()
    if not child:
        with open_run(config):
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert read_run(folder).state[0] == "crashed"
    assert (folder / "log.txt").read_text().count("--- ") == 2, "which line of log.txt is of which start?"


def test_looking_does_not_lock(tmp_path: Path) -> None:
    """A run that was refused because somebody listed runs at that moment."""
    with lock(tmp_path):
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)
    assert not is_locked(tmp_path / "none")
    code = f"""
import fcntl, time
file = open({str(tmp_path / ".lock")!r})
fcntl.flock(file, fcntl.LOCK_SH)
print(flush=True)
time.sleep(0.03)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as looking:
        assert looking.stdout is not None
        looking.stdout.readline()
        with lock(tmp_path):
            pass


def test_order(say: Callable[..., str], tmp_path: Path) -> None:
    """The best of forty runs of a sweep, found by eye."""
    for name, slope in (("b", 1.0), ("c", 3.0), ("a", 2.0)):
        make(tmp_path / name, slope=slope)
    make(tmp_path / "new", 0, fail(NumericError("x")))
    lines = say("runs", "ls", tmp_path, "--sort", "valid_loss").splitlines()
    assert [Path(line.split()[0]).name for line in lines[1:]] == ["c", "a", "b", "new"]
    with pytest.raises(UsageError, match="did you mean `valid_loss`"):
        say("runs", "ls", tmp_path, "--sort", "validloss")


def test_everything_fits_80_columns(say: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that wraps is no table."""
    one = make(tmp_path / "one", model="runs/" + "long/" * 30)
    two = make(tmp_path / "two", note="words " * 40, **{"train.optimizer.lr": 0.1})
    monkeypatch.chdir(tmp_path)
    one, two = Path("one"), Path("two")
    for call in (["ls"], ["show", one], ["show", two], ["compare", one, two, two, two, two], ["plot", one, two]):
        text = say("runs", *call)
        assert max(map(len, text.splitlines())) <= 80, text
    assert "one " in say("runs", "ls")
    far = make(tmp_path / ("far" * 60), 4)
    assert max(map(len, say("runs", "plot", far, one).splitlines())) <= 80


def test_the_command_can_be_typed(say: Callable[..., str], tmp_path: Path) -> None:
    """A mapping of what was given cannot be typed again; quotes and lists have to survive the shell."""
    given = {
        "steps": 4, "note": "null", "train.optimizer.lr": 1e-5, "prompts": ["Don't", 'say "it"', "a: b"],
        "variables": {"a.b": {"c": [1, 2]}, "d": True}, "lora": None, "model": "[odd] name", "train.track": ["wandb"],
    }  # fmt: skip
    config = load_config(Trained, None, {"output": tmp_path / "run", **given})
    typed = shlex.split(" ".join(words(config.model_dump(mode="json", exclude_unset=True))))
    assert load_config(Trained, None, parse_words(typed)) == config
    folder = make(tmp_path / "run", **{"train.optimizer.lr": 1e-5})
    assert "puna run sft output=" in " ".join(say("runs", "show", folder).split())
    assert json.loads(say("runs", "show", folder, "--json"))["given"]["train"] == {"optimizer": {"lr": 1e-5}}


def test_what_differs(say: Callable[..., str], tmp_path: Path) -> None:
    """Two losses side by side say nothing without what was changed, and mislead where data or tokenizer differ."""
    one = make(tmp_path / "one", **{"train.optimizer.lr": 1e-3})
    two = make(tmp_path / "two", slope=2.0, lora=None)
    found = json.loads(say("runs", "compare", one, two, "--json"))
    assert [run["name"] for run in found["runs"]] == [str(two), str(one)]
    assert found["config"] == {"train.optimizer.lr": [TrainConfig().optimizer.lr, 1e-3], "lora": [None, "set"]}
    assert found["cautions"] == []
    text = say("runs", "compare", one, two)
    assert "careful" not in text
    assert not re.search("^memory ", text, re.MULTILINE), "bytes, and the peak is told in GB"
    assert re.search(r"^6 +2\.800 +3\.400$", text, re.MULTILINE)
    assert re.search(r"^valid loss +2\.800 +3\.400 \(\+0\.6\)$", text, re.MULTILINE)
    assert re.search(r"^chain_sum +50\.0 \(40\.0-60\.0\)", text, re.MULTILINE)
    write_json(two / "final" / "puna.json", {"data": "sha256:0", "tokenizer": "sha256:1"})
    assert re.findall("careful: (.*?):? ", say("runs", "compare", one, two)) == ["tokenizers", "training"]
    with pytest.raises(UsageError, match="nothing to be compared"):
        say("runs", "compare", one)


def test_curves(say: Callable[..., str], tmp_path: Path) -> None:
    """A picture that no program opens; a key that is misspelled and draws nothing."""
    one, two = make(tmp_path / "one"), make(tmp_path / "two", slope=2.0)
    lines = say("runs", "plot", one, "--key", "loss,lr").splitlines()
    assert lines[0] == "nats a token"
    assert any(line.strip() == "learning rate" for line in lines)
    say("runs", "plot", one, two, "-o", tmp_path / "x.svg")
    root = xml.parse(tmp_path / "x.svg").getroot()
    paths = [e for e in root.iter() if e.get("vector-effect")]
    assert len(paths) == 2
    assert "".join(root.itertext()).count("two") >= 1
    say("runs", "plot", one, two, "--key", "loss,lr", "-o", tmp_path / "x.html")
    assert (tmp_path / "x.html").read_text().count("vector-effect") == 4
    with pytest.raises(UsageError, match="did you mean `loss`"):
        say("runs", "plot", one, "--key", "los")
    with pytest.raises(UsageError, match=r"\.html"):
        say("runs", "plot", one, "-o", tmp_path / "x.png")
    with pytest.raises(UsageError, match="several scales"):
        say("runs", "plot", one, "--key", "loss,lr", "-o", tmp_path / "x.svg")


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("colour", "braille"), [(True, True), (False, True), (False, False)])
def test_curves_in_characters(count: int, colour: bool, braille: bool) -> None:
    """Lines that cannot be told apart on paper, and squares in a terminal without Unicode."""
    series = [Series(f"s{i}", [(x, (1 + i) / x if x != 5 else None) for x in range(1, 40)]) for i in range(count)]
    lines = chart(Curves("t", "step", "nats", series), 60, 10, colour, braille)
    shown = [re.sub(r"\x1b\[\d+m", "", line) for line in lines]
    assert max(map(len, shown)) <= 60
    assert ("\x1b" in "".join(lines)) == colour
    if not braille:
        assert "".join(lines).isascii()
    if count > 1 and not colour:
        assert all(any(letter in line for line in shown[2:-2]) for letter in "abc")
    top, bottom = shown[2], shown[-3]
    assert top.lstrip(" 0123456789.│|")[:1].strip(), "the highest value stands at the upper left"
    assert bottom.rstrip()[-1:].strip(), "the lowest at the lower right"


@pytest.mark.parametrize("points", [[], [(1, None)], [(1, 2.0)], [(1, 5.0), (2, 5.0)], [(1, 1e308), (2, -1e308)]])
def test_any_numbers_in_characters(points: list[tuple[float, float | None]]) -> None:
    """A run of one step, or one that diverged, took the terminal's chart down."""
    assert chart(Curves("t", "step", "nats", [Series("s", points)]), 60)


def test_mean_of_steps() -> None:
    """A smoothed curve that is shifted, or hides a gap, is another curve."""
    values = [(1, 1.0), (2, 3.0), (3, None), (4, 5.0), (5, 7.0)]
    assert mean_of(values, 2) == [(1, 1.0), (2, 2.0), (3, None), (4, 4.0), (5, 6.0)]
    assert mean_of(values, 1) == values


def test_report_of_a_run_that_stopped(say: Callable[..., str], tmp_path: Path) -> None:
    """Curves were drawn of finished runs alone: who wants to know why one failed has to read JSON."""
    folder = make(tmp_path / "run", 4, fail(NumericError("3 steps in a row are not finite")))
    page = Path(say("runs", "show", folder, "-o", tmp_path / "page.html").strip()).read_text()
    assert "failed after 4 of 6 steps: 3 steps in a row are not finite" in page
    titles = re.findall("<h2[^>]*>(.*?)</h2>", page)
    assert "Gradient norm before clipping" in titles
    assert "Learning rate" in titles
    assert not {"Memory at most", "Predicted and measured", "Made from"} & set(titles), "nothing is known of it"
    early = make(tmp_path / "early", 0, fail(NumericError("x")))
    assert "failed after 0 of 6 steps" in write_run_report(early).read_text()


def test_report_tells_where_the_run_ran(say: Callable[..., str], tmp_path: Path) -> None:
    """A report drawn later, elsewhere, told of the command that drew it and of that machine's versions."""
    folder = make(tmp_path / "run", **{"lora.dora": True})
    write_json(folder / "env.json", {"command": ["puna", "run", "a b"], "versions": {"torch": "0.1"}})
    page = write_run_report(folder, tmp_path / "page.html").read_text()
    assert "puna run &#x27;a b&#x27;" in page
    assert "<td>0.1</td>" in page
    assert re.search("lora.dora</th><td[^>]*>true<", page)


def test_a_slip_in_a_folders_name(say: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`no runs in nope` and exit 0 of a folder that is not there; a run's name without its folder."""
    monkeypatch.chdir(tmp_path)
    make(Path("runs/mine"))
    for typed in ("mine", "runs/mien"):
        with pytest.raises(UsageError, match="not a run folder; did you mean `runs/mine`"):
            say("runs", "show", typed)
    with pytest.raises(UsageError, match="no such folder; did you mean `runs`"):
        say("runs", "ls", "rusn")


def test_a_failure_is_told_with_its_place(say: Callable[..., str], tmp_path: Path) -> None:
    """`nothing to train in this conversation`: in which of ten thousand?"""
    folder = make(tmp_path / "run", 0, fail(DataError("nothing to train", where="rows.jsonl:7")))
    assert "failed: rows.jsonl:7: nothing to train" in say("runs", "show", folder)


def test_names_do_not_command_the_terminal(say: Callable[..., str], tmp_path: Path) -> None:
    """A model or a folder with an escape sequence in its name wrote over what stands above it."""
    one = make(tmp_path / "\x1b[2Jone", model="\x1b[31mm", note="two\nlines\x1b")
    two = make(tmp_path / "two", 4, fail(NumericError("\x1b[2J")))
    for call in (["ls", tmp_path], ["show", one], ["show", two], ["compare", one, two], ["plot", one, two]):
        assert "\x1b" not in say("runs", *call), call


def test_every_command_of_the_page(say: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page whose commands have gone stale."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "a", "b", "c"):
        make(Path("runs") / name)
    text = (Path(__file__).parent.parent / "docs" / "runs.md").read_text(encoding="utf-8")
    calls = [shlex.split(line, comments=True) for line in re.findall("^puna (runs .*)$", text, re.MULTILINE)]
    assert len(calls) == 6
    assert all(say(*call) for call in calls)


def test_runs_are_read_without_torch(tmp_path: Path) -> None:
    """Half a second of imports before a line, and every row of every run parsed for a list of the last ones."""
    make(tmp_path / "run")
    calls = [["ls", "."], ["show", "run"], ["compare", "run", "run"], ["plot", "run"]]
    code = f"""
import json, sys
from puna.cli import app
for call in {calls}: app(["runs", *call], prog_name="puna", standalone_mode=False)
print(json.dumps(list(sys.modules)))
"""
    paths = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert not HEAVY & set(json.loads(done.stdout.splitlines()[-1]))
    run = read_run(tmp_path / "run")
    assert [row["step"] for row in run.ends] == [2, 4, 6, 6]
    assert run.ends != run.rows
    assert (run.steps, run.best()) == (6, (6, pytest.approx(3.4)))
