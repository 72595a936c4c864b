"""report.html of a run, from the files in its folder alone."""

import shlex
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from puna.chart import Curves, Series
from puna.config import read_yaml
from puna.lineage import parents_of
from puna.log import Metrics, clock
from puna.report import Facts, Report, Samples, Section, Table, write_report
from puna.runs import RunView, flat, read_json, read_run

_LOSSES = {"valid_loss": "held-out conversations", "watched_loss": "conversations of another kind"}
_VALIDATION = {
    "train_loss": "training loss, mean of ten steps",
    "valid_loss": "validation loss",
    "gap": "gap: validation less training",
}
_OF_A_STEP = {"step", "loss", "lr", "grad_norm", "n", "tokens", "tok_s", "seconds", "memory"}


def write_run_report(folder: Path, target: Path | None = None) -> Path:
    """Curves, samples, before and after, what it was made from, what it ran on; of a run as it stands."""
    target = target or folder / "report.html"
    ran_on = read_json(folder / "env.json")
    ran_on["command"] = shlex.join(ran_on.get("command", []))
    sections = [*run_sections(folder), Facts("Ran on", facts(ran_on))]
    write_report(target, Report(f"{read_run(folder).recipe}: {folder}", summary(folder), sections))
    return target


def summary(folder: Path) -> str:
    """`75 steps, 10,000 trained tokens, 2:30`, and how a run that is not finished ended."""
    run = read_run(folder)
    ended = {**run.last, "steps": run.steps, **run.result}
    done = f"{ended['steps']:,} steps, {ended.get('tokens', 0):,} trained tokens, {clock(ended.get('seconds', 0))}"
    state, why = run.state
    planned = f" of {run.planned:,} steps" * bool(run.planned)
    return done if run.result else f"{state} after {run.steps:,}{planned}{f': {why}' * bool(why)}; {done}"


def run_sections(folder: Path) -> list[Section]:
    """What a run's own files tell, as sections of a report; one that has nothing to tell is left out."""
    run = read_run(folder)
    result, given, rows, trained = run.result, facts(run.given), run.rows, run.trained
    sections: list[Section] = []
    if tasks := result.get("tasks"):
        sections.append(_tasks(tasks, read_yaml(folder / "resolved.yaml")["judge"]))
    if (folder / "selection.json").exists():
        sections.append(_selection(read_json(folder / "selection.json")))
    if read_yaml(folder / "resolved.yaml")["recipe"] == "pretrain":
        sections += _pretraining(rows, trained)
    else:
        sections += [*_losses(rows), *_training(trained)]
    if any("bits_per_byte" in row for row in rows):
        held_out = [_series("validation", rows, "bits_per_byte", dots=True)]
        sections.append(Curves("Held-out text", "step", "bits per byte", held_out))
    sections += _machinery(trained)
    if written := Metrics(folder / "samples.jsonl").read():
        # A continuation repeats its prompt; an answer does not, and gets a line of its own.
        texts = [(row, row["text"].removeprefix(row["prompt"])) for row in written]
        items = [(row["step"], row["prompt"], t if t != row["text"] else f"\n{t}") for row, t in texts]
        sections.append(Samples("What it wrote while learning", items))
    if result:
        measured: dict[str, Any] = {k: v for k, v in result.items() if isinstance(v, int | float)}
        measured["seconds"] = (_predicted(run), round(result["seconds"], 1))
        sections.append(Facts("Predicted and measured", measured | _forecast(run)))
    if run.made_from:
        sections.append(Facts("Made from", _lineage(run.made_from)))
    sections.append(Facts("Given", given))
    return sections


def facts(values: Any) -> dict[str, Any]:
    """Nested mappings as the facts of a report."""
    return {k: v if isinstance(v, int | float | None) else str(v) for k, v in flat(values).items()}


def _forecast(run: RunView) -> dict[str, Any]:
    """What the plan said before the first step, beside what the steps took."""
    told = read_json(run.folder / "measured.json").get("forecast")
    memory = [row["memory"] for row in run.trained if row.get("memory")]
    times = [b["seconds"] - a["seconds"] for a, b in pairwise(run.trained)]
    if not told or not memory or not times:
        return {}
    return {
        "memory in GB": (round(told["memory"] / 1e9, 2), round(max(memory) / 1e9, 2)),
        "seconds a step": (float(f"{told['seconds_per_step']:.3g}"), float(f"{median(times):.3g}")),
    }


def _tasks(rows: list[dict[str, Any]], judge: Any) -> Table:
    def percent(interval: list[float]) -> Any:
        return tuple(100 * end for end in interval)

    shots = f"before ({judge['shots']} examples)"
    cells = [
        [r["task"], percent(r["before"]), 100 * r["majority"], percent(r["after"]), percent(r["gain"])] for r in rows
    ]
    note = (
        f"{judge['limit']} unseen problems each, in percent; right is an answer that holds the right number or word. "
        "The gain is over the better of the model before and always giving the most frequent answer; 95 % intervals."
    )
    return Table("Accuracy before and after", ["task", shots, "most frequent answer", "after", "gain"], cells, note)


def _selection(report: dict[str, Any]) -> Table:
    cells = [
        [rule, count, round(100 * count / report["read"], 1), "; ".join(f"{e['where']}: {e['why']}" for e in examples)]
        for rule, count in report["dropped"].items()
        for examples in [report["examples"][rule][:3]]
    ]
    note = f"{report['kept']:,} of {report['read']:,} conversations kept; all examples in selection.json."
    return Table("Conversations dropped", ["rule", "dropped", "percent", "for example"], cells, note)


def _pretraining(rows: list[dict[str, Any]], trained: list[dict[str, Any]]) -> list[Section]:
    """Training and validation loss on one scale, and how far apart they and how often the text was read in the end."""
    validated = [row for row in rows if "valid_loss" in row]
    if not validated:
        return _training(trained)
    series = [_series("training", trained, "loss"), _series("validation", validated, "valid_loss", dots=True)]
    last = validated[-1]
    facts = {name: last[key] for key, name in _VALIDATION.items() if key in last}
    facts |= {f"passes over {k.removeprefix('epochs.')}": v for k, v in last.items() if k.startswith("epochs.")}
    curves = Curves("Training and validation loss", "step", "nats a token", series)
    return [curves, Facts("At the last validation", facts)]


def _training(trained: list[dict[str, Any]]) -> list[Section]:
    """The training loss, with the parts that an objective tells of it."""
    parts = dict.fromkeys(key for row in trained[:1] for key in row if key not in _OF_A_STEP)
    series = [_series("training", trained, "loss"), *(_series(k.replace("_", " "), trained, k) for k in parts)]
    return [Curves("Training loss", "step", "nats a token", series)] if trained else []


def _machinery(trained: list[dict[str, Any]]) -> list[Section]:
    """How the steps went, whatever they taught."""
    sections: list[Section] = []
    for title, key, unit, scale, log in (
        ("Speed", "tok_s", "tokens a second", 1, False),
        ("Gradient norm before clipping", "grad_norm", "norm", 1, True),
        ("Learning rate", "lr", "rate", 1, False),
        ("Memory at most", "memory", "GB", 1e-9, False),
    ):
        points = [(row["step"], row[key] and scale * row[key]) for row in trained if key in row]
        if any(value for _, value in points):
            sections.append(Curves(title, "step", unit, [Series("training", points)], log))
    return sections


def _losses(rows: list[dict[str, Any]]) -> list[Section]:
    series, cells = [], []
    for key, name in _LOSSES.items():
        if found := [row for row in rows if key in row]:
            series.append(_series(name, found, key, dots=True))
            first, last = found[0][key], found[-1][key]  # None: not finite
            change = f"{100 * (last / first - 1):+.1f}\u00a0%" if first and last else "not finite"
            cells.append([name, first, last, change])
    if not series:
        return []
    table = Table("Loss before and after", ["on", "before", "after", "change"], cells, "Nats a trained token.")
    return [table, Curves("Held-out conversations", "step", "nats a token", series)]


def _predicted(run: RunView) -> float | None:
    """What was promised where time was given, else what the first steps foretold."""
    step = run.step_seconds()
    return run.config.get("seconds") or (round(step * run.result["steps"], 1) if step else None)


def _lineage(made: dict[str, Any]) -> dict[str, Any]:
    parents = ", ".join(p["path"] for p in parents_of(made)) or "nothing"
    return {"parents": parents, "data": made.get("data"), "tokenizer": made.get("tokenizer"), "puna": made.get("puna")}


def _series(name: str, rows: list[dict[str, Any]], key: str, dots: bool = False) -> Series:
    return Series(name, [(row["step"], row[key]) for row in rows if key in row], dots)
