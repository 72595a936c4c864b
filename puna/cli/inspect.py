"""`puna inspect`: what a model, adapter or tokenizer is, without loading its weights."""

import textwrap
from typing import Annotated, Any

import typer

from puna.cli.output import Json, print_json
from puna.log import harmless

_WIDTH = 80


def register(app: typer.Typer) -> None:
    app.command("inspect")(inspect)


def inspect(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A model, adapter, tokenizer or run folder, a file, or smollm2-135m.")
    ],
    as_json: bool = Json,
) -> None:
    """Architecture, weights, tokenizer, chat template, stop ids and lineage, without loading weights."""
    from puna.checkpoint.inspect import as_data, in_words
    from puna.checkpoint.inspect import inspect as look

    found = look(path)
    if as_json:
        print_json(as_data(found))
        return
    found = in_words(found)
    width = max(map(len, found))
    for name, value in found.items():
        print("\n".join(_lines(f"{name:{width}}  ", value)))


def _lines(head: str, value: Any) -> list[str]:
    """A value under its name, wrapped; of a list one item a line."""
    items = value if isinstance(value, list) else [f"{value:,}" if isinstance(value, int) else value]
    room, lines = max(20, _WIDTH - len(head)), []
    for item in items or [""]:
        text = harmless(str(item))
        hanging = len(text) - len(text.lstrip()) + 3 * (len(items) > 1)
        lines += textwrap.wrap(text, room, subsequent_indent=" " * hanging) or [""]
    return [(head if number == 0 else " " * len(head)) + line for number, line in enumerate(lines)]
