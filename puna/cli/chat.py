"""`puna chat` and `puna merge`."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from puna.errors import UsageError
from puna.log import harmless, log

_HELP = 'Type a message; """ begins and ends one of several lines. /system TEXT, /retry, /save FILE, /quit.'


def register(app: typer.Typer) -> None:
    app.command("chat")(chat)
    app.command("merge")(merge)


def chat(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model or run folder, a .gguf file, or smollm2-135m.")
    ],
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most ids in an answer.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0: always the most likely id.", min=0)] = 0.6,
    top_p: Annotated[float, typer.Option(help="Keep the most likely ids up to this probability.", min=0, max=1)] = 0.9,
    seed: Annotated[int, typer.Option(help="Same seed and words, same answers.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp64.")] = "auto",
) -> None:
    """Talk with a model: puna chat smollm2-135m"""
    from puna.infer.llama import load

    llama = load(model, dtype=dtype)
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    options = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    llama.template.prompt(messages)  # a model without a template is told before anyone types
    log.info("%s", _HELP)
    while (text := _read()) is not None:
        word, _, rest = text.partition(" ")
        if word == "/quit":
            break
        if word == "/system":
            messages = [{"role": "system", "content": rest}] if rest else []
        elif word == "/save":
            Path(rest or "chat.json").write_text(json.dumps(messages, indent=2, ensure_ascii=False), encoding="utf-8")
            log.info("saved %s", rest or "chat.json")
        elif word == "/retry" and messages and messages[-1]["role"] == "assistant":
            messages.pop()
            options["seed"] += 1
            messages.append({"role": "assistant", "content": _answer(llama, messages, options)})
        elif word.startswith("/"):
            log.info("%s", _HELP)
        elif text.strip():
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": _answer(llama, messages, options)})


def merge(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="An adapter folder, or a run that made one.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The model folder to write.")],
    save_dtype: Annotated[str, typer.Option(help="bf16, fp32 or fp16.")] = "bf16",
) -> None:
    """Add an adapter into its base model and write a model directory."""
    from puna.checkpoint.adapter import base_of
    from puna.checkpoint.names import DTYPES
    from puna.checkpoint.registry import find_model
    from puna.infer.llama import load
    from puna.lineage import lineage, parent
    from puna.lora import lora_parameters, merge_lora

    if save_dtype not in DTYPES:
        raise UsageError(f"`{save_dtype}` is not a dtype", fix=", ".join(DTYPES))
    llama = load(adapter, dtype="fp32", device="cpu")
    if not lora_parameters(llama.model):
        raise UsageError("this is no adapter: there is nothing to merge", where=adapter, fix="use it as it is")
    merge_lora(llama.model)
    base = base_of(llama.path)
    made_from = lineage("merge", [llama.path, parent(base, find_model(base))])
    llama.save(target, dtype=save_dtype, made_from=made_from)
    print(target)


def _read() -> str | None:
    """A message: one line, or several between lines of three quotes; None at the end of input."""
    try:
        line = input("> " if sys.stdin.isatty() else "")
        if not line.startswith('"""'):
            return line
        lines = [line[3:]]
        while not lines[-1].endswith('"""'):
            lines.append(input(". " if sys.stdin.isatty() else ""))
        return "\n".join(lines)[:-3].strip("\n")
    except EOFError:
        return None


def _answer(llama: Any, messages: list[dict[str, str]], options: dict[str, Any]) -> str:
    """Print the answer as it comes, without anything a terminal would obey; Ctrl-C ends it early."""
    prompt = llama.template.prompt(messages)
    stream, shown = llama.tokenizer.stream(), ""

    def show(piece: str) -> None:
        nonlocal shown
        print(harmless(piece), end="", flush=True)
        shown += piece

    try:
        llama.continue_ids([prompt], on_token=lambda token: show(stream.feed(token)), **options)
    except KeyboardInterrupt:
        print(" ...", end="")
    show(stream.end())
    print()
    return shown
