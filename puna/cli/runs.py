"""`puna runs`: look at what was trained."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from shutil import get_terminal_size
from typing import Annotated, Any

import typer

from puna.cli.compare_runs import compare_runs, told
from puna.cli.mistakes import Verbs
from puna.cli.output import Json, number, print_fields, print_json, print_table
from puna.cli.plot_runs import plot_runs
from puna.errors import UsageError
from puna.lineage import parents_of
from puna.log import clock, harmless
from puna.runs import RunView, find_runs, read_run

_ORDERS = ("name", "state", "model", "steps", "loss", "valid_loss", "seconds")


def register(app: typer.Typer) -> None:
    runs = typer.Typer(help="Look at runs: ls, show, compare, plot.", no_args_is_help=True, cls=Verbs)
    runs.command("ls")(ls_runs)
    runs.command("show")(show_run)
    runs.command("compare")(compare_runs)
    runs.command("plot")(plot_runs)
    app.add_typer(runs, name="runs")


def ls_runs(
    where: Annotated[Path, typer.Argument(help="Where to look, three levels deep.")] = Path("."),
    sort: Annotated[str, typer.Option("--sort", metavar="KEY", help=f"One of {', '.join(_ORDERS)}.")] = "name",
    as_json: bool = Json,
) -> None:
    """Runs below a folder: how far they are and what they have reached."""
    if sort not in _ORDERS:
        from puna.config import nearest

        raise UsageError(f"no order `{sort}`" + nearest(sort, _ORDERS), fix=", ".join(_ORDERS))
    if not where.is_dir():
        from puna.config import nearest_path

        raise UsageError("no such folder" + nearest_path(where), where=where, fix="puna runs ls")
    print_runs(list_runs(where, sort), as_json, where)


def list_runs(where: Path, sort: str = "name") -> list[dict[str, Any]]:
    """A row for each run; one whose files are damaged is listed as such."""
    return sorted((_row(run) for run in find_runs(where)), key=lambda row: (row[sort] is None, row[sort]))


def print_runs(rows: list[dict[str, Any]], as_json: bool, where: Path = Path(".")) -> None:
    if as_json:
        print_json(rows)
        return
    if not rows:
        print(f"no runs in {where}")
        return
    table = [["run", "state", "steps", "loss", "best valid", "time", "trained"]]
    for row in rows:
        steps = "–" if row["steps"] is None else f"{row['steps']}/{row['planned'] or '?'}"
        numbers = [steps, number(row["loss"]), number(row["valid_loss"]), clock(row["seconds"] or 0)]
        table.append([row["name"], row["state"], *numbers, f"{row['recipe']} {row['model']}"])
    # A name is there to be typed, so it is whole; what was trained gets the room that is left.
    used = sum(max(map(len, column)) + 2 for column in list(zip(*table, strict=True))[:-1])
    room = get_terminal_size().columns - used
    table = [[*line[:-1], *([_cut(line[-1], room)] * (room > 8))] for line in table]
    print_table(table[0], table[1:], left=(0, 1, 6))


def show_run(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    as_json: bool = Json,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write its report, a .html page.")] = None,
) -> None:
    """A run's state, what it was given, its numbers, what it was made from."""
    run = read_run(folder)
    if output:
        from puna.train.run_report import write_run_report

        print(write_run_report(folder, output))
        return
    if as_json:
        print_json(_everything(run))
        return
    print_fields(_fields(run), False)
    if validations := run.validations:
        keys = [k for k in dict.fromkeys(k for row in validations for k in row) if told(k)]
        print()
        kept = validations if len(validations) <= 12 else [*validations[:2], *validations[-10:]]
        names = [k.replace("_", " ") for k in keys]
        print_table(["step", *names], [[f"{row['step']:,}", *(number(row.get(k)) for k in keys)] for row in kept], ())
    if tasks := run.result.get("tasks"):
        print()
        cells = [[t["task"], *(_interval(t[k]) for k in ("before", "after", "gain"))] for t in tasks]
        print_table(["task, in percent", "before", "after", "gain, 95 %"], cells)


def _fields(run: RunView) -> dict[str, Any]:
    trained = run.trained
    (state, why), last, result = run.state, run.last, run.result
    fields: dict[str, Any] = {"state": f"{state}: {harmless(why)}" if why else state}
    fields["command"] = harmless(f"puna run {run.recipe} {' '.join(words(run.given))}")
    if planned := run.planned:
        fields["steps"] = f"{run.steps:,} of {planned:,}"
    if last:
        fields |= {k.replace("_", " "): number(last.get(k)) for k in ("loss", "lr", "grad_norm") if k in last}
        if best := run.best():
            fields["best valid loss"] = f"{best[1]:.4g} at step {best[0]:,}"
        fields |= {"tokens": last.get("tokens"), "time": clock(last.get("seconds", 0))}
        if speed := run.speed():
            fields["speed"] = f"{speed:,.0f} tokens a second"
        if memory := max((row.get("memory") or 0 for row in trained), default=0):
            fields["memory"] = f"{memory / 1e9:.2f} GB at most"
    fields |= {k.replace("_", " "): number(v) for k, v in result.items() if k == "bits_per_byte"}
    made = run.made_from
    if made:
        fields["made from"] = ", ".join(p["path"] for p in parents_of(made)) or "nothing"
        fields |= {name: str(made[name]).rpartition(":")[2][:16] for name in ("data", "tokenizer") if made.get(name)}
    if tracked := run.config.get("train.track"):
        fields["shown in"] = ", ".join(tracked)
    return fields


def _everything(run: RunView) -> dict[str, Any]:
    state, why = run.state
    return {
        **_row(run), "state": state, "why": why, "command": ["puna", "run", run.recipe, *words(run.given)],
        "given": run.given, "last": run.last, "speed": run.speed(), "validations": run.validations,
        "result": run.result, "made_from": {k: v for k, v in run.made_from.items() if k != "config"},
    }  # fmt: skip


def _row(run: RunView) -> dict[str, Any]:
    row: dict[str, Any] = {"name": str(run.folder)}
    try:
        best, last, (state, why) = run.best(), run.last, run.state
        row |= {"state": state, "why": why, "recipe": run.recipe, "model": run.model, "steps": run.steps}
        row |= {"planned": run.planned, "loss": last.get("loss"), "valid_loss": best and best[1]}
        row |= {"best_step": best and best[0], "seconds": last.get("seconds")}
    except UsageError as error:
        row |= {"state": "damaged", "why": error.what, "recipe": "", "model": "", "steps": None, "planned": None}
        row |= {"loss": None, "valid_loss": None, "best_step": None, "seconds": None}
    return {**row, "summary": f"{row['recipe']}, {row['state']}, {row['steps'] or 0} steps"}


def words(given: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What a user gave as words to type behind `puna run RECIPE`, quoted for a shell."""
    found = []
    for key, value in given.items():
        if isinstance(value, dict) and value and all("." not in name for name in value):
            found += words(value, f"{prefix}{key}.")
        elif prefix or key != "recipe":
            found.append(shlex.quote(f"{prefix}{key}={_typed(value)}"))
    return found


def _typed(value: Any) -> str:
    """Text that is read back as text stands as it is, all else as JSON, which is YAML."""
    if isinstance(value, str) and value[:1] not in ("", "[", "{", '"', "'") and value not in ("null", "~"):
        return value
    return json.dumps(value, ensure_ascii=False)


def _interval(ends: list[float]) -> str:
    low, value, high = (100 * end for end in ends)
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def _cut(trained: str, room: int) -> str:
    """`recipe model` in `room` characters: of a model's path the end tells most."""
    recipe, _, model = trained.partition(" ")
    over = len(trained) - room
    return trained if over <= 0 else f"{recipe} …{model[over + 1 :]}"[:room]
