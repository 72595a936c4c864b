"""docs/objectives.md is a program: its code is run as a user would run it."""
# ruff: noqa: F811 (a fixture that is imported)

import importlib.util
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from command_line import environment
from method_ranks import prepare
from test_methods import conversations, models, words_of  # noqa: F401 (a fixture)

from puna.data.loader import Batch
from puna.errors import UsageError
from puna.log import Metrics
from puna.recipes import run
from puna.train.objectives import Loss, next_token
from puna.tune.objective import named_as

PAGE = Path(__file__).parent.parent / "docs/objectives.md"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code.count("\n") < 100
    path = tmp_path_factory.mktemp("user") / "focal.py"
    path.write_text(code, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("focal", file)
    assert spec
    assert spec.loader
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_it_trains_by_the_recipe(file: Path, models: Path) -> None:
    """A worked example that no longer works is worse than none."""
    words = words_of("lora", models, conversations(file.parent / "rows.jsonl"), Path("run"), dtype="fp32", steps=2)
    lines = [f"{key}: {json.dumps(value)}" for key, value in words.items() if "." not in key]
    lines += [f"data: {{path: {words['data.path']}}}", "recipe: sft", "lora: {rank: 3}", ""]
    (file.parent / "tune.yaml").write_text("\n".join(lines), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, file], cwd=file.parent, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    rows = [row for row in Metrics(file.parent / "run/metrics.jsonl").read() if "lr" in row]
    assert len(rows) == 2
    assert all(0 < row["loss"] < row["cross_entropy"] for row in rows)
    assert json.loads((file.parent / "run/final/puna.json").read_text())["objective"] == "__main__.focal"
    assert (file.parent / "run/report.html").exists()


@pytest.mark.parametrize("method", ["full", "qat"])
def test_without_gamma_it_is_the_plain_loss(
    method: str, module: ModuleType, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page says that this is how one knows; a mask or a sum that is off shows here."""
    words = words_of(method, models, conversations(tmp_path / "rows.jsonl"), tmp_path / "run", dtype="fp32")
    model, batches, objective = prepare(words)
    assert objective is next_token
    batch = next(batches)
    monkeypatch.setattr(module, "GAMMA", 0.0)
    found = []
    for each in (module.focal, next_token):
        loss = each(model, batch).sum
        loss.backward()
        found.append((float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters()}))
        model.zero_grad()
    (ours, gradients), (expected, theirs) = found
    assert ours == pytest.approx(expected, rel=1e-6)
    assert all((gradients[n] - g).norm() <= 1e-5 * g.norm() for n, g in theirs.items())
    assert torch.stack([g.norm() for g in theirs.values()]).min() > 0


def test_an_objective_that_cannot_be_is_refused(models: Path, tmp_path: Path) -> None:
    """Left out without a word: the run trains something else than was handed to it."""
    with pytest.raises(UsageError, match="takes no objective"):
        run("data", output=tmp_path / "run", objective=next_token, tokenizer="x")
    words = words_of("kd", models, conversations(tmp_path / "rows.jsonl"), tmp_path / "run")
    with pytest.raises(UsageError, match="another one is given"):
        run("sft", objective=next_token, **words)


def test_what_an_objective_is_called(models: Path, tmp_path: Path) -> None:
    """A partial, which docs/objectives.md recommends, has no name of its own: the run ended after loading the model."""
    words = words_of("lora", models, conversations(tmp_path / "rows.jsonl"), tmp_path / "run", dtype="fp32", steps=2)
    run("sft", objective=partial(weighted, by=2.0), **words)
    told = json.loads((tmp_path / "run/final/puna.json").read_text())["objective"]
    assert told == f"{__name__}.weighted(by=2.0)"
    assert named_as(Weighted()) == f"{__name__}.Weighted"
    assert named_as(partial(weighted, by=object())).endswith(".weighted(by=object)")  # no place in memory
    first, *_ = [row for row in Metrics(tmp_path / "run/metrics.jsonl").read() if "lr" in row]
    assert first["loss"] == pytest.approx(2 * first["cross_entropy"])


def test_a_run_goes_on_with_its_own_objective(models: Path, tmp_path: Path) -> None:
    """The config does not name it: half of the steps would be of one loss, half of another, and no word of it."""
    words = words_of("lora", models, conversations(tmp_path / "rows.jsonl"), tmp_path / "run", dtype="fp32", steps=2)

    def stops(model: Any, batch: Batch) -> Loss:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        run("sft", objective=stops, **words)
    for other in (None, weighted):
        with pytest.raises(UsageError, match=r"another objective is here: .*stops"):
            run("sft", objective=other, **words)


def weighted(model: Any, batch: Batch, by: float = 1.0) -> Loss:
    loss = next_token(model, batch)
    return Loss(by * loss.sum, {"cross_entropy": loss.sum.detach()})


class Weighted:
    def __call__(self, model: Any, batch: Batch) -> Loss:
        return weighted(model, batch)
