"""`puna runs`: look at what was trained."""

from pathlib import Path
from typing import Annotated, Any

import typer

from puna.cli.mistakes import Verbs
from puna.cli.output import Json, print_fields, print_rows
from puna.errors import UsageError
from puna.log import Metrics, clock


def register(app: typer.Typer) -> None:
    runs = typer.Typer(help="Look at runs: ls, show.", no_args_is_help=True, cls=Verbs)
    runs.command("ls")(ls_runs)
    runs.command("show")(show_run)
    app.add_typer(runs, name="runs")


def find_runs(where: Path) -> list[dict[str, Any]]:
    """Run folders up to three levels below `where`."""
    found = [p.parent for depth in range(4) for p in where.glob("*/" * depth + "resolved.yaml")]
    return [{"name": str(folder), "summary": _state(folder)} for folder in sorted(set(found))]


def ls_runs(where: Annotated[Path, typer.Argument(help="Where to look.")] = Path("."), as_json: bool = Json) -> None:
    """Runs below a folder and how far they are."""
    print_rows(find_runs(where), as_json)


def show_run(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")], as_json: bool = Json
) -> None:
    """A run's state, what it was given, and its last numbers."""
    from puna.config import read_yaml

    if not (folder / "resolved.yaml").exists():
        raise UsageError("not a run folder", where=folder, fix="puna runs ls")
    rows = Metrics(folder / "metrics.jsonl").read()
    trained = [r for r in rows if "loss" in r]
    validated = [r for r in rows if "bits_per_byte" in r]
    fields: dict[str, Any] = {"state": _state(folder), "given": dict(read_yaml(folder / "config.yaml"))}
    if trained:
        last = trained[-1]
        fields |= {k: f"{last[k]:.4g}" for k in ("loss", "lr", "grad_norm") if last[k] is not None}
        fields |= {"tokens": last["tokens"], "time": clock(last["seconds"])}
        recent = sorted(r["tok_s"] for r in trained[-50:])
        fields["tokens a second"] = round(recent[len(recent) // 2])
    if validated:
        fields["bits per byte"] = "  ".join(f"{r['step']}: {r['bits_per_byte']:.3f}" for r in validated)
    print_fields(fields, as_json)


def _state(folder: Path) -> str:
    from puna.config import read_yaml

    rows = Metrics(folder / "metrics.jsonl").read()
    steps = max((r.get("step", 0) for r in rows), default=0)
    recipe = read_yaml(folder / "resolved.yaml").get("recipe")
    return f"{recipe}, {'finished' if (folder / 'final').exists() else 'unfinished'}, {steps} steps"
