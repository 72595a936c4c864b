"""`puna generate`."""

import sys
from dataclasses import replace
from typing import Annotated, Any, Literal

import typer

from puna.cli.output import Json, print_json
from puna.errors import UsageError
from puna.log import log

MODEL = "A folder of a model (also Meta's), a run or an adapter, a .gguf, a llama2.c .bin, org/name, or smollm2-135m."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)]

TopK = Annotated[int, typer.Option(help="Keep this many of the most likely ids; 0: all.", min=0)]
MinP = Annotated[float, typer.Option(help="Drop ids less likely than this part of the likeliest.", min=0, max=1)]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: say less again of what was said.", min=0.01)]
Speculate = Annotated[
    str | None,
    typer.Option(help="Guess ahead by lookup in the text, self (in 4 bits) or a smaller MODEL: same text, sooner."),
]
Stop = Annotated[list[str] | None, typer.Option(help="A string that ends the text; as often as you like.")]


def register(app: typer.Typer) -> None:
    app.command("generate")(generate)


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue; - reads standard input.")],
    max_tokens: Annotated[int, typer.Option(help="Most ids to add.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0: always the most likely id.", min=0)] = 0.8,
    top_p: Annotated[float, typer.Option(help="Keep the most likely ids up to this probability.", min=0, max=1)] = 0.95,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = None,
    n: Annotated[int, typer.Option("--n", "-n", help="Texts to write; text i has the seed + i.", min=1)] = 1,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: log-probabilities, and those of the N most likely ids.", min=0)
    ] = None,
    speculate: Speculate = None,
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
    if logprobs is not None and not as_json:
        raise UsageError("--logprobs has no place in plain text", fix="--json --logprobs N")
    from puna.infer.llama import load

    text, ends = _prompt(prompt), stops(stop)
    llama = load(model, dtype=dtype, device=device, packed=packed(speculate))
    before = llama.encode(text, special=special)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed, "n": n}
    penalties = {"repetition_penalty": repetition_penalty, "stop": ends, "logprobs": logprobs}
    [result] = llama.complete([before], max_tokens, speculate=speculate, **sampling, **penalties)
    if speculate:
        log.info("%s", llama.speculation(speculate))
    told = [_told(llama, before, completion) for completion in result.completions]
    if as_json:
        print_json(told if n > 1 else told[0])
    else:
        print("\n\n".join(text + each["text"] for each in told))


def stops(given: list[str] | None) -> list[str]:
    """What `--stop` was given, before a model is loaded."""
    if given and not all(given):
        raise UsageError("--stop is empty", cause="nothing ends at no text", fix='--stop "END", or leave it out')
    return given or []


def packed(speculate: str | None) -> Literal[False, "auto"]:
    """How to load quantized weights: a model that guesses for itself packs a copy of its plain ones."""
    return False if speculate == "self" else "auto"


def _told(llama: Any, before: list[int], completion: Any) -> dict[str, Any]:
    """A completion as JSON, the stop id left out."""
    ids = list(completion.token_ids)
    if ids and ids[-1] in llama.stop_ids:
        completion = replace(completion, token_ids=tuple(ids[:-1]))
    told = {
        "text": llama.added_text(before, completion),
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
    }
    if completion.logprobs is not None:
        pairs = zip(completion.token_ids, completion.logprobs, strict=False)
        told["logprobs"] = [{"id": i, "logprob": p.chosen, "top": [*map(list, p.top)]} for i, p in pairs]
    return told


def _prompt(given: str) -> str:
    text = (sys.stdin.read() if sys.stdin else "") if given == "-" else given
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError("the prompt is not UTF-8", cause="a byte of another encoding in the terminal") from None
    return text
