"""`puna convert`."""

from typing import Annotated

import typer

from puna.cli.models import MODEL


def register(app: typer.Typer) -> None:
    app.command("convert")(convert)


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help=MODEL)],
    target: Annotated[str, typer.Argument(metavar="DST", help="The folder or file to write.")],
    to: Annotated[
        str | None,
        typer.Option(help="hf, meta, gguf or llama2.c. Default: gguf of *.gguf, llama2.c of *.bin, else hf."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of hf and meta: bf16, fp16, fp32, fp64. Default: as stored; bf16 if quantized.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="Of gguf: F16 (default), BF16, F32, Q8_0, Q4_0, Q4_K_M; of llama2.c: v0 (default; fp32, what run.c "
            "reads), v1 (fp32 with a header), v2 (int8, for runq.c)."
        ),
    ] = None,
    shards: Annotated[int | None, typer.Option(help="Of meta: how many files. Default: 1.", min=1)] = None,
) -> None:
    """Write a model in another format: puna convert Llama-3.2-1B model.gguf --kind Q8_0"""
    from puna.checkpoint.convert import convert

    print(convert(source, target, to, dtype=dtype, kind=kind, shards=shards))
