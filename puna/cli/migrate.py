"""`puna migrate`."""

from pathlib import Path
from typing import Annotated

import typer

from puna.errors import UsageError
from puna.files import write_text
from puna.log import log


def register(app: typer.Typer) -> None:
    app.command("migrate")(migrate)


def migrate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A torchtune config, as `tune cp` writes them.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where to write puna's; default: print it.")
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, help="Devices it ran on. Default: as the `tune run` in its comments says, or 1."),
    ] = None,
) -> None:
    """Turn a torchtune config into one of puna's, naming what is lost: puna migrate mine.yaml -o puna.yaml"""
    from puna.migrate.page import written
    from puna.migrate.torchtune import migrated
    from puna.recipes import load

    if output is not None and output.exists():
        raise UsageError("exists already", where=output, fix="another file name")
    page = migrated(file, nproc)
    load("sft", None, page.given())  # what cannot be is told before a file is written
    for key, why in page.lost.items():
        log.warning("not carried over: %s: %s", key, why)
    text = written(page, file.name, str(output or "FILE"))
    if output is None:
        print(text, end="")
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, text)
    print(output)
