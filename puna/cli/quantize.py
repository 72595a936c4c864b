"""`puna quantize`."""

from pathlib import Path
from typing import Annotated

import typer

from puna.cli.models import MODEL
from puna.cli.output import Json, print_fields, print_json


def register(app: typer.Typer) -> None:
    app.command("quantize")(quantize)


def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help=MODEL)],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write.")],
    scheme: Annotated[str, typer.Option(help="int8, int4, int8-int4 (Llama 3.2's), nf4 or nf4-double (QLoRA's).")],
    group: Annotated[int | None, typer.Option(help="Weights that share a scale; 0 (of int8): a row.")] = None,
    compact: Annotated[
        bool, typer.Option("--compact", help="The embedding in 8 bits, too: smaller, but puna alone opens it.")
    ] = False,
    calibrate: Annotated[
        Path | None, typer.Option(help="A UTF-8 text to round by (GPTQ): slower, nearer to the model.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A UTF-8 text for the perplexities; default: a short one of puna's.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Characters of the text that are read.", min=1)] = 40_000,
    as_json: bool = Json,
) -> None:
    """Write a model in 8 or 4 bits, with a certificate of what that changed: puna quantize my-model small --scheme int4

    A model directory: transformers opens it with compressed-tensors (int8, int4, int8-int4) or bitsandbytes (nf4).
    """
    from puna.cli.compare import read_text
    from puna.eval.certificate import quantize, table
    from puna.eval.parity.material import TEXT

    measured = TEXT if text is None else read_text(text)[:limit]
    calibration = "" if calibrate is None else read_text(calibrate)
    certificate = quantize(
        source, target, scheme, group=group, compact=compact, text=measured, calibration=calibration
    )  # fmt: skip
    if as_json:
        print_json(certificate)
        return
    print_fields(table(certificate), as_json=False)
    print(target)
