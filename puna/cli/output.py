"""Results on stdout: aligned columns for people, JSON for programs."""

import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

import typer

Json = typer.Option(False, "--json", help="Print JSON.")


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
