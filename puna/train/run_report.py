"""report.html of a finished run, from the files in its folder alone."""

import json
from pathlib import Path
from typing import Any

from puna.config import read_yaml
from puna.log import Metrics, clock
from puna.report import Curves, Facts, Report, Samples, Series, Table, write_report
from puna.run_folder import environment


def write_run_report(folder: Path) -> Path:
    """Curves, samples, what was given, what it ran on; predicted beside measured where there was a prediction."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    given = read_yaml(folder / "config.yaml")
    rows = Metrics(folder / "metrics.jsonl").read()
    trained = [row for row in rows if "loss" in row]
    sections: list[Curves | Table | Samples | Facts] = [
        Curves("Training loss", "step", "nats a token", [_series("training", trained, "loss")])
    ]
    for key, unit in (("bits_per_byte", "bits per byte"), ("valid_loss", "nats a token")):
        if found := [row for row in rows if key in row]:
            sections.append(Curves("Held-out text", "step", unit, [_series("validation", found, key, dots=True)]))
    sections.append(Curves("Speed", "step", "tokens a second", [_series("training", trained, "tok_s")]))
    if written := Metrics(folder / "samples.jsonl").read():
        items = [(row["step"], row["prompt"], row["text"].removeprefix(row["prompt"])) for row in written]
        sections.append(Samples("What it wrote while learning", items))
    measured: dict[str, Any] = {k: v for k, v in result.items() if k not in ("seconds", "seconds_compiling")}
    if given.get("seconds"):
        measured["seconds (predicted, measured)"] = (given["seconds"], round(result["seconds"], 1))
    sections.append(Facts("Result", measured))
    sections.append(Facts("Given", _flat(given)))
    sections.append(Facts("Ran on", _flat(environment())))
    recipe = read_yaml(folder / "resolved.yaml")["recipe"]
    line = f"{result['steps']:,} steps, {result['tokens']:,} trained tokens, {clock(result['seconds'])}"
    target = folder / "report.html"
    write_report(target, Report(f"{recipe}: {folder}", line, sections))
    return target


def _series(name: str, rows: list[dict[str, Any]], key: str, dots: bool = False) -> Series:
    return Series(name, [(row["step"], row[key]) for row in rows], dots)


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, int | float | None) else str(value)
    return flat
