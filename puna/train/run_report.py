"""report.html of a finished run, from the files in its folder alone."""

import json
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from puna.config import read_yaml
from puna.lineage import parents_of
from puna.log import Metrics, clock
from puna.report import Curves, Facts, Report, Samples, Section, Series, Table, write_report
from puna.run_folder import environment

_LOSSES = {"valid_loss": "held-out conversations", "watched_loss": "conversations of another kind"}
_VALIDATION = {
    "train_loss": "training loss, mean of ten steps",
    "valid_loss": "validation loss",
    "gap": "gap: validation less training",
}


def write_run_report(folder: Path) -> Path:
    """Curves, samples, before and after, what it was made from, what it ran on."""
    recipe = read_yaml(folder / "resolved.yaml")["recipe"]
    target = folder / "report.html"
    sections = [*run_sections(folder), Facts("Ran on", flat(environment()))]
    write_report(target, Report(f"{recipe}: {folder}", summary(folder), sections))
    return target


def summary(folder: Path) -> str:
    """`75 steps, 10,000 trained tokens, 2:30`."""
    result = _json(folder / "result.json")
    return f"{result['steps']:,} steps, {result['tokens']:,} trained tokens, {clock(result['seconds'])}"


def run_sections(folder: Path) -> list[Section]:
    """What a run's own files tell, as sections of a report."""
    result, given = _json(folder / "result.json"), flat(read_yaml(folder / "config.yaml"))
    rows = Metrics(folder / "metrics.jsonl").read()
    trained = [row for row in rows if "loss" in row]
    sections: list[Section] = []
    if tasks := result.get("tasks"):
        sections.append(_tasks(tasks, read_yaml(folder / "resolved.yaml")["judge"]))
    if read_yaml(folder / "resolved.yaml")["recipe"] == "pretrain":
        sections += _pretraining(rows, trained)
    else:
        sections += [*_losses(rows), _training(trained)]
    if any("bits_per_byte" in row for row in rows):
        held_out = [_series("validation", rows, "bits_per_byte", dots=True)]
        sections.append(Curves("Held-out text", "step", "bits per byte", held_out))
    sections.append(Curves("Speed", "step", "tokens a second", [_series("training", trained, "tok_s")]))
    if written := Metrics(folder / "samples.jsonl").read():
        # A continuation repeats its prompt; an answer does not, and gets a line of its own.
        texts = [(row, row["text"].removeprefix(row["prompt"])) for row in written]
        items = [(row["step"], row["prompt"], t if t != row["text"] else f"\n{t}") for row, t in texts]
        sections.append(Samples("What it wrote while learning", items))
    measured: dict[str, Any] = {k: v for k, v in result.items() if isinstance(v, int | float)}
    measured["seconds"] = (_predicted(given, trained, result), round(result["seconds"], 1))
    sections.append(Facts("Predicted and measured", measured | _forecast(folder, trained)))
    sections.append(Facts("Made from", _lineage(folder)))
    sections.append(Facts("Given", given))
    return sections


def _forecast(folder: Path, trained: list[dict[str, Any]]) -> dict[str, Any]:
    """What the plan said before the first step, beside what the steps took."""
    file = folder / "measured.json"
    told = _json(file).get("forecast") if file.exists() else None
    memory = [row["memory"] for row in trained if row.get("memory")]
    times = [b["seconds"] - a["seconds"] for a, b in pairwise(trained)]
    if not told or not memory or not times:
        return {}
    return {
        "memory in GB": (round(told["memory"] / 1e9, 2), round(max(memory) / 1e9, 2)),
        "seconds a step": (float(f"{told['seconds_per_step']:.3g}"), float(f"{median(times):.3g}")),
    }


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, int | float | None) else str(value)
    return found


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


def _pretraining(rows: list[dict[str, Any]], trained: list[dict[str, Any]]) -> list[Section]:
    """Training and validation loss on one scale, and how far apart they and how often the text was read in the end."""
    validated = [row for row in rows if "valid_loss" in row]
    if not validated:
        return [_training(trained)]
    series = [_series("training", trained, "loss"), _series("validation", validated, "valid_loss", dots=True)]
    last = validated[-1]
    facts = {name: last[key] for key, name in _VALIDATION.items() if key in last}
    facts |= {f"passes over {k.removeprefix('epochs.')}": v for k, v in last.items() if k.startswith("epochs.")}
    curves = Curves("Training and validation loss", "step", "nats a token", series)
    return [curves, Facts("At the last validation", facts)]


def _training(trained: list[dict[str, Any]]) -> Section:
    return Curves("Training loss", "step", "nats a token", [_series("training", trained, "loss")])


def _losses(rows: list[dict[str, Any]]) -> list[Section]:
    series, cells = [], []
    for key, name in _LOSSES.items():
        if found := [row for row in rows if key in row]:
            series.append(_series(name, found, key, dots=True))
            first, last = found[0][key], found[-1][key]  # None: not finite
            change = f"{100 * (last / first - 1):+.1f} %" if first and last else "not finite"
            cells.append([name, first, last, change])
    if not series:
        return []
    table = Table("Loss before and after", ["on", "before", "after", "change"], cells, "Nats a trained token.")
    return [table, Curves("Held-out conversations", "step", "nats a token", series)]


def _predicted(given: dict[str, Any], trained: list[dict[str, Any]], result: dict[str, Any]) -> float | None:
    """What was promised where time was given, else what the first steps foretold."""
    if given.get("seconds"):
        return given["seconds"]
    times = [b["seconds"] - a["seconds"] for a, b in pairwise(trained[:5])]
    return round(median(times) * result["steps"], 1) if times else None


def _lineage(folder: Path) -> dict[str, Any]:
    """From the puna.json of what the run wrote."""
    made = _json(folder / "final" / "puna.json")
    parents = ", ".join(p["path"] for p in parents_of(made)) or "nothing"
    return {"parents": parents, "data": made.get("data"), "tokenizer": made.get("tokenizer"), "puna": made.get("puna")}


def _series(name: str, rows: list[dict[str, Any]], key: str, dots: bool = False) -> Series:
    return Series(name, [(row["step"], row[key]) for row in rows if key in row], dots)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
