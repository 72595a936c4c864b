"""The verb that fetches a model of the Hugging Face hub."""

from typing import Annotated

import typer

from puna.cli.output import Json, print_json
from puna.errors import UsageError


def register(app: typer.Typer) -> None:
    app.command("download")(download)


def download(
    name: Annotated[str, typer.Argument(metavar="ORG/NAME[@REV]", help="A model of the hub; a branch, tag or commit.")],
    files: Annotated[
        list[str] | None, typer.Option(help="Fetch these instead; names with * and ?, may be repeated.")
    ] = None,
    as_json: bool = Json,
) -> None:
    """Fetch a model into the Hugging Face cache: weights as safetensors, configs, tokenizer; never a pickle."""
    from puna.checkpoint.hub import download as fetch
    from puna.checkpoint.hub import hub_name
    from puna.checkpoint.registered import REGISTERED

    found = hub_name(name)
    if found is None:
        fix = f"puna chat {name} fetches it" if name in REGISTERED else "org/name, or org/name@revision"
        raise UsageError(f"`{name[:100]}` is not a name of the hub", fix=fix)
    folder = fetch(found, files or [])
    if as_json:
        print_json({"name": str(found), "commit": folder.name, "path": str(folder)})
    else:
        print(folder)
