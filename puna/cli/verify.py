"""`puna verify`: is everything as it was written? With --against: do two models say the same?"""

from pathlib import Path
from typing import Annotated, Any

import typer

from puna.cli.output import Json, print_json
from puna.errors import UsageError
from puna.files import as_path
from puna.integrity import check, refuse_damage

_DTYPES = ("fp32", "fp64", "bf16")


def register(app: typer.Typer) -> None:
    app.command("verify")(verify)


def verify(
    name: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="A run, model, adapter, shard or tokenizer folder, one of several of them, or a file."
        ),
    ],
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Compare what PATH and MODEL say, of any formats.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="With --against: what to ask, one a line.")] = None,
    text: Annotated[Path | None, typer.Option(help="With --against: a UTF-8 text for the perplexities.")] = None,
    budget: Annotated[
        float | None, typer.Option(help="Largest difference of a logit; by default it depends on what is compared.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most ids in an answer.", min=1)] = 32,
    dtype: Annotated[str, typer.Option(help="What both compute in: fp32, fp64 or bf16.")] = "fp32",
    as_json: bool = Json,
) -> None:
    """Compare every file with the hash it was written with; with --against, what two models say.

    Exit code 4 for a damaged model, 3 for damaged data, 5 for models that differ by more than the budget.
    """
    if against is not None:
        if dtype not in _DTYPES:
            raise UsageError(f"`{dtype}` is not a dtype", fix=f"--dtype {', '.join(_DTYPES)}")
        from puna.cli.compare import compare

        options = {"budget": budget, "max_tokens": max_tokens, "dtype": dtype}
        if not compare(name, against, as_json, prompts, text, **options):
            raise typer.Exit(5)
        return
    if prompts or text or budget is not None:
        raise UsageError("nothing to compare it with", fix=f"puna verify {name} --against MODEL")
    path = _found(name)
    found = check(path, _open_file)
    if as_json:
        print_json([checked._asdict() for checked in found])
    else:
        for checked in found:
            print("\n".join([checked.line(), *(f"     {wrong}" for wrong in checked.wrong)]))
    refuse_damage(path, found)


def _found(name: str) -> Path:
    """Where it lies. Only a name that is no path needs torch, and with it a second."""
    if (path := as_path(name)).exists():
        return path
    from puna.checkpoint.registry import find_written

    return find_written(name)


def _open_file(path: Path) -> Any:
    from puna.checkpoint.registry import open_file

    return open_file(path)
