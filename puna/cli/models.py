"""`puna generate`."""

import sys
from typing import Annotated

import typer

from puna.cli.output import Json, print_json
from puna.errors import UsageError

MODEL = "A folder of a model (also Meta's), a run or an adapter, a .gguf, a llama2.c .bin, org/name, or smollm2-135m."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)]


def register(app: typer.Typer) -> None:
    app.command("generate")(generate)


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue; - reads standard input.")],
    max_tokens: Annotated[int, typer.Option(help="Most ids to add.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0: always the most likely id.", min=0)] = 0.8,
    top_p: Annotated[float, typer.Option(help="Keep the most likely ids up to this probability.", min=0, max=1)] = 0.95,
    seed: Annotated[int, typer.Option(help="Same seed, same text.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp64.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    special: Annotated[
        bool, typer.Option("--special", help="Control strings in the prompt become control ids.")
    ] = False,
    as_json: bool = Json,
) -> None:
    """Continue raw text: puna generate runs/pretrain -p "Once upon a time" """
    if dtype not in ("auto", "fp32", "bf16", "fp64"):
        raise UsageError(f"`{dtype}` is not a dtype", fix="--dtype auto, fp32, bf16 or fp64")
    from puna.infer.llama import load

    text = _prompt(prompt)
    llama = load(model, dtype=dtype, device=device, packed="auto")
    before = llama.encode(text, special=special)
    ids = llama.continue_ids([before], max_tokens, temperature=temperature, top_p=top_p, seed=seed)[0]
    stopped = ids[-1] in llama.stop_ids
    kept = ids[:-1] if stopped else ids
    added = llama.tokenizer.decode_after(before, kept)
    if as_json:
        print_json({"text": added, "token_ids": kept, "finish_reason": "stop" if stopped else "length"})
    else:
        print(text + added)


def _prompt(given: str) -> str:
    text = (sys.stdin.read() if sys.stdin else "") if given == "-" else given
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError("the prompt is not UTF-8", cause="a byte of another encoding in the terminal") from None
    return text
