"""`puna runs plot`: curves of one or several runs, in the terminal or as a page or a picture."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from shutil import get_terminal_size
from typing import Annotated

import typer

from puna.chart import Curves, Series, picture
from puna.cli.terminal import can_braille, can_colour, chart
from puna.errors import UsageError
from puna.files import write_text
from puna.runs import RunView, read_run

_NATS = ("loss", "valid_loss", "train_loss", "watched_loss")
_NOISY = ("loss", "grad_norm", "tok_s", "cross_entropy", "divergence")
_MANY = 200  # steps; fewer are seen as they are
_UNITS = {"lr": "learning rate", "tok_s": "tokens a second", "bits_per_byte": "bits per byte", "gap": "nats a token",
          "grad_norm": "gradient norm", "memory": "bytes",
          "cross_entropy": "nats a token", "divergence": "nats a token"}  # fmt: skip


def plot_runs(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    key: Annotated[
        str, typer.Option("--key", help="Columns of metrics.jsonl: loss,valid_loss or lr or grad_norm ...")
    ] = "",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="A .html page or .svg picture instead.")] = None,
    smooth: Annotated[int, typer.Option(min=0, help="Mean of so many steps; 0: a fiftieth of the run, 1: none.")] = 0,
    log: Annotated[bool, typer.Option("--log", help="Logarithmic scale.")] = False,
) -> None:
    """Draw curves of runs: puna runs plot runs/a runs/b --key loss,valid_loss"""
    runs = [read_run(folder) for folder in folders]
    keys = [name.strip() for name in key.split(",") if name.strip()] or ["loss", "valid_loss"][: 3 - len(runs) or 1]
    _check_keys(runs, keys if key else [])
    charts = curves_of(runs, keys, smooth, log)
    if output is None:
        size = get_terminal_size()
        for number, curves in enumerate(charts):
            print("\n" * bool(number) + "\n".join(chart(curves, size.columns, 16, can_colour(), can_braille())))
        return
    write_curves(output, charts, [str(folder) for folder in folders])
    print(output)


def curves_of(runs: Sequence[RunView], keys: Sequence[str], smooth: int = 0, log: bool = False) -> list[Curves]:
    """A chart for each unit among `keys`, with a line for each run and key."""
    charts = []
    for unit, named in _by_unit(keys).items():
        series, windows = [], set()
        for run in runs:
            for key in named:
                values = run.values(key)
                dots = key != "loss" and any(key in row for row in run.validations)
                window = smooth or (len(values) // 50 if key in _NOISY and len(values) >= _MANY else 1)
                window = 1 if dots else window
                windows.add(window)
                label = [str(run.folder)] * (len(runs) > 1) + [key.replace("_", " ")] * (
                    len(named) > 1 or len(runs) == 1
                )
                if values:
                    series.append(Series(" ".join(label), mean_of(values, window), dots))
        widest = max(windows, default=1)
        label = f"{unit}, mean of {'up to ' * (len(windows) > 1)}{widest:,} steps" if widest > 1 else unit
        charts.append(Curves(", ".join(k.replace("_", " ") for k in named), "step", label, series, log))
    return charts


def mean_of(values: Sequence[tuple[int, float | None]], window: int) -> list[tuple[float, float | None]]:
    """Each value as the mean of the last `window` finite ones; what is not finite stays a gap."""
    if window <= 1:
        return list(values)
    known = [(step, value) for step, value in values if value is not None]
    sums = [0.0, *accumulate(value for _, value in known)]
    smooth = {
        step: (sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window) for i, (step, _) in enumerate(known)
    }
    return [(step, smooth.get(step)) for step, _ in values]


def write_curves(output: Path, charts: Sequence[Curves], names: Sequence[str]) -> None:
    """A page with all charts, or a picture of the first.

    Raises:
        UsageError: another kind of file, or several charts for one picture.
    """
    if output.suffix == ".html":
        from puna.report import Report, write_report

        write_report(output, Report("Curves", ", ".join(names), charts))
    elif output.suffix == ".svg" and len(charts) == 1:
        write_text(output, picture(charts[0]))
    elif output.suffix == ".svg":
        raise UsageError("one picture cannot hold several scales", where=output, fix="one --key, or a .html page")
    else:
        raise UsageError("a page is .html, a picture is .svg", where=output, fix=f"-o {output.stem}.html")


def _by_unit(keys: Sequence[str]) -> dict[str, list[str]]:
    units: dict[str, list[str]] = {}
    for key in keys:
        unit = "nats a token" if key in _NATS else _UNITS.get(key, key.replace("_", " "))
        units.setdefault(unit, []).append(key)
    return units


def _check_keys(runs: Sequence[RunView], keys: Sequence[str]) -> None:
    known = sorted({key for run in runs for row in run.rows for key in row} - {"step"})
    for key in keys:
        if key not in known:
            from puna.config import nearest

            raise UsageError(f"no run has `{key}`" + nearest(key, known), fix=", ".join(known) or "a run with metrics")
