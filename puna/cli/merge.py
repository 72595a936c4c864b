"""`puna merge`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from puna.errors import UsageError


def register(app: typer.Typer) -> None:
    app.command("merge")(merge)


def merge(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", help="Adapter folders of one base, or runs that made them.")
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The model folder to write.")],
    save_dtype: Annotated[str, typer.Option(help="bf16, fp32 or fp16.")] = "bf16",
    weights: Annotated[
        str | None, typer.Option(help="What of each adapter is taken: 0.7,0.3; all of it by default.")
    ] = None,
    onto: Annotated[
        Literal["trained", "original"],
        typer.Option(help="Of QLoRA: the rounded base it was trained on, or the one that was rounded."),
    ] = "trained",
) -> None:
    """Add adapters into their base model and write a model directory: puna merge runs/sft merged"""
    from puna.checkpoint.adapter import base_of
    from puna.checkpoint.model_directory import check_folder_name
    from puna.checkpoint.names import DTYPES
    from puna.checkpoint.registry import find_model
    from puna.files import as_path
    from puna.infer.merge import merge
    from puna.lineage import lineage, parent

    target = as_path(target)
    if save_dtype not in DTYPES:
        raise UsageError(f"`{save_dtype}` is not a dtype", fix=", ".join(DTYPES))
    check_folder_name(target)
    llama = merge(adapters, None if weights is None else _numbers(weights), onto)
    base = base_of(llama.path)
    parents = [*(find_model(adapter) for adapter in adapters), parent(base, find_model(base))]
    told = {} if weights is None else {"weights": _numbers(weights)}
    llama.save(target, dtype=save_dtype, made_from=lineage("merge", parents, onto=onto, **told))
    print(target)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"`{text}` are no numbers", where="--weights", fix="--weights 0.7,0.3") from None
