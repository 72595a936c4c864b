"""Results on stdout: aligned columns for people, JSON for programs."""

import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

import typer

from puna.log import harmless

Json = typer.Option(False, "--json", help="Print JSON.")


def wrapped(head: str, text: str, width: int = 80) -> list[str]:
    """Lines of a text behind a head, and under itself."""
    indent = " " * min(len(head), width - len(head))
    return textwrap.wrap(harmless(text), width, initial_indent=head, subsequent_indent=indent)


def print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False, default=str)
    print()


def print_rows(rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    """Objects with `name` and `summary` (and more for --json)."""
    if as_json:
        print_json(rows)
        return
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        print(f"{row['name']:{width}}  {row['summary']}")


def print_fields(fields: dict[str, Any], as_json: bool) -> None:
    """One `name  value` a line; long values are wrapped under themselves."""
    if as_json:
        print_json(fields)
        return
    width = max(map(len, fields), default=0)
    room = max(40, shutil.get_terminal_size().columns - width - 2)
    for name, value in fields.items():
        if isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        lines = textwrap.wrap(str(value), room, break_on_hyphens=False) or [""]
        print(f"{name:{width}}  " + f"\n{'':{width}}  ".join(lines))


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> None:
    """Aligned columns under a heading: those of `left` are text; digits of the others stand under digits."""
    table = [[harmless(cell.replace("\n", " ")) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = [f"{c:{w}}" if i in left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells).rstrip())


def number(value: Any, form: str = "") -> str:
    """A cell: four digits, or as `form` says; `–` for what is not there or not finite."""
    if isinstance(value, float):
        return format(value, form or ("#.4g" if 1e-3 <= abs(value) < 1e4 else ".4g"))
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
