"""`puna runs compare`: what differs between runs, and what came of it."""

from collections.abc import Sequence
from pathlib import Path
from shutil import get_terminal_size
from string import ascii_uppercase
from typing import Annotated, Any

import typer

from puna.cli.output import Json, number, print_json, print_table
from puna.errors import UsageError
from puna.log import clock
from puna.runs import RunView, changed, read_run

_WIDEST = 14  # characters of a config's value


def compare_runs(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Two or more run folders.")],
    as_json: bool = Json,
) -> None:
    """Runs side by side, best validation loss first: what differs in their configs, losses, results, tasks."""
    if len(folders) < 2:
        raise UsageError("one run has nothing to be compared with", fix=f"puna runs show {folders[0]}")
    runs = sorted((read_run(folder) for folder in folders), key=_rank)
    if as_json:
        print_json(comparison(runs))
        return
    names = [ascii_uppercase[i] if i < 26 else f"R{i}" for i in range(len(runs))]
    cells = []
    for name, run in zip(names, runs, strict=True):
        best, last = run.best(), run.last
        valid = [number(_final(run, "valid_loss")), f"{best[1]:.4g} @{best[0]}" if best else "–"]
        cells.append(
            [name, str(run.folder), run.state[0], f"{run.steps}/{run.planned or '?'}", number(last.get("loss")), *valid]
        )
    print_table(["", "run", "state", "steps", "loss", "valid", "best"], cells, left=(1, 2))
    for warning in cautions(runs, names):
        print(f"  careful: {warning}")
    _print_by_run("config", names, [[k, *map(_short, v)] for k, v in changed(runs).items()])
    for key in ("valid_loss", "loss"):
        _print_by_run(f"{key.replace('_', ' ')} at step", names, _losses(runs, key))
        if len(_losses(runs, key)) > 1:
            break
    _print_by_run("at the end", names, _ends(runs))
    _print_by_run("task, in percent", names, _tasks(runs))


def comparison(runs: Sequence[RunView]) -> dict[str, Any]:
    """All of it for a program."""
    listed = [
        {"name": str(r.folder), "state": r.state[0], "steps": r.steps, "loss": r.last.get("loss"), "best": r.best(),
         "valid_loss": _final(r, "valid_loss"), "result": r.result, "validations": r.validations}
        for r in runs
    ]  # fmt: skip
    return {"runs": listed, "config": changed(runs), "cautions": cautions(runs, [str(r.folder) for r in runs])}


def cautions(runs: Sequence[RunView], names: Sequence[str]) -> list[str]:
    """Why losses may not be comparable: other tokens, other text, a run that is not over."""
    found = []
    for key, what in {
        "tokenizer": "tokenizers differ: a loss in nats a token is on other tokens; bits per byte compare",
        "template": "chat templates differ: the losses are on other tokens",
        "data": "training data differ, and so may the text that is held out",
    }.items():
        known = {run.made_from.get(key) for run in runs} - {None}
        if len(known) > 1:
            found.append(what)
    if held := [key for key in changed(runs) if key in ("valid_fraction", "seq_len", "train_on")]:
        found.append(f"{', '.join(held)} differ: the validation loss is on other tokens")
    if unknown := [name for name, run in zip(names, runs, strict=True) if not run.made_from]:
        found.append(f"nothing saved in {', '.join(unknown)} yet: whether data and tokenizer are the same is not known")
    if len({run.steps for run in runs}) > 1:
        found.append("they were not trained for the same number of steps")
    return found


def told(key: str) -> bool:
    """Whether a column of the validations is one of their results: not where they are, or what they took."""
    return key not in ("step", "memory") and not key.startswith("epochs.")


def _rank(run: RunView) -> tuple[bool, float]:
    value = _final(run, "valid_loss")
    return (value is None, value or 0.0)


def _final(run: RunView, key: str) -> float | None:
    """The last value among the validations."""
    return next((row[key] for row in reversed(run.validations) if row.get(key) is not None), None)


def _losses(runs: Sequence[RunView], key: str) -> list[list[str]]:
    """A row for each of at most ten steps that all runs have."""
    values = [dict(run.values(key)) for run in runs]
    steps = sorted(set.intersection(*map(set, values)))
    chosen = steps if len(steps) <= 10 else [steps[round(i * (len(steps) - 1) / 9)] for i in range(10)]
    return [[f"{step:,}", *(number(run[step]) for run in values)] for step in chosen]


def _ends(runs: Sequence[RunView]) -> list[list[str]]:
    """Final numbers, each with its difference to the first run."""
    rows = []
    keys = dict.fromkeys(k for run in runs for row in run.validations for k in row if told(k))
    for key in keys:
        values = [_final(run, key) for run in runs]
        rows.append([key.replace("_", " "), number(values[0]), *(_against(values[0], v) for v in values[1:])])
    rows.append(["tokens", *(f"{run.last.get('tokens', 0):,}" for run in runs)])
    rows.append(["time", *(clock(run.last.get("seconds") or 0) for run in runs)])
    rows.append(["tokens a second", *(f"{run.speed() or 0:,.0f}" for run in runs)])
    if any(run.last.get("memory") for run in runs):
        rows.append(["memory, GB", *(number((run.last.get("memory") or 0) / 1e9, ".2f") for run in runs)])
    return rows


def _against(first: float | None, value: float | None) -> str:
    return number(value) + (f" ({value - first:+.2g})" if first is not None and value is not None else "")


def _tasks(runs: Sequence[RunView]) -> list[list[str]]:
    """Accuracy after training with its 95 % interval."""
    scores = [{task["task"]: task["after"] for task in run.result.get("tasks", [])} for run in runs]
    names = dict.fromkeys(name for run in scores for name in run)
    return [[name, *(_interval(run.get(name)) for run in scores)] for name in names]


def _interval(ends: list[float] | None) -> str:
    if not ends:
        return "–"
    low, value, high = (100 * end for end in ends)
    return f"{value:.1f} ({low:.1f}-{high:.1f})"


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)  # what one would type
    return text if len(text) <= _WIDEST else "…" + text[1 - _WIDEST :]


def _print_by_run(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table with a column for each run; as many beside each other as the terminal has room for."""
    if not rows:
        return
    widths = [max(len(row[i]) for row in ([title, *names], *rows)) + 2 for i in range(len(names) + 1)]
    start, columns = 1, get_terminal_size().columns
    while start <= len(names):
        stop, used = start, widths[0]
        while stop <= len(names) and (stop == start or used + widths[stop] <= columns + 2):
            used, stop = used + widths[stop], stop + 1
        print()
        print_table([title, *names[start - 1 : stop - 1]], [[row[0], *row[start:stop]] for row in rows])
        start = stop
