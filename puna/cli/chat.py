"""`puna chat`."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from puna.cli.models import MinP, Model, RepetitionPenalty, Speculate, Stop, TopK, packed, stops
from puna.errors import PunaError, UsageError
from puna.log import harmless, log

_HELP = 'Type a message; """ begins and ends one of several lines. /system TEXT, /retry, /save FILE, /quit.'


def register(app: typer.Typer) -> None:
    app.command("chat")(chat)


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most ids in an answer.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0: always the most likely id.", min=0)] = 0.6,
    top_p: Annotated[float, typer.Option(help="Keep the most likely ids up to this probability.", min=0, max=1)] = 0.9,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = None,
    speculate: Speculate = None,
    seed: Annotated[int, typer.Option(help="Same seed and words, same answers.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp64.")] = "auto",
    template: Annotated[
        str | None, typer.Option(help="llama3, chatml ... or a jinja file; the model's own by default.")
    ] = None,
    tools: Annotated[Path | None, typer.Option(help="JSON list of functions it may call; you type results.")] = None,
) -> None:
    """Talk with a model: puna chat smollm2-135m"""
    offered, ends = _read_tools(tools) if tools else None, stops(stop)
    llama = _load(model, dtype, template, packed(speculate))
    if speculate is not None:
        llama.speculation(speculate)
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    options = {
        "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "stop": ends, "seed": seed, "speculate": speculate,
    }  # fmt: skip
    # a template that is missing, or has no place for tools, is told before anyone types, as is a draft that is none
    llama.template.prompt([*messages, {"role": "user", "content": "?"}], offered)
    log.info("%s", _HELP)
    while (text := _read()) is not None:
        word, _, rest = text.partition(" ")
        if word == "/quit":
            break
        if word == "/system":
            messages = [{"role": "system", "content": rest}] if rest else []
        elif word == "/save":
            _save(messages, Path(rest or "chat.json"))
        elif word == "/retry" and messages and messages[-1]["role"] == "assistant":
            while messages[-1]["role"] != "user":
                messages.pop()
            options["seed"] += 1
            _take_turn(llama, messages, offered, options)
        elif word.startswith("/"):
            log.info("%s", _HELP)
        elif text.strip():
            messages.append({"role": "user", "content": text})
            _take_turn(llama, messages, offered, options)


def _load(model: str, dtype: str, template: str | None, packed: Any) -> Any:
    """The model, with another chat template than its own if one is named."""
    from dataclasses import replace

    from puna.infer.llama import load
    from puna.tokenizer.chat.format import fitting, lacking, read_template

    source = read_template(template) if template else None
    llama = load(model, dtype=dtype, packed=packed)
    if source is None:
        return llama
    if told := lacking(source, llama.tokenizer):
        raise UsageError(told, where=f"--template {template}", fix=f"--template {', '.join(fitting(llama.tokenizer))}")
    return replace(llama, tokenizer=llama.tokenizer.with_template(source))


def _read_tools(path: Path) -> list[dict[str, Any]] | None:
    from puna.config import nearest_path
    from puna.tokenizer.chat.messages import plain_tools

    if not path.is_file():
        raise UsageError("no such file" + nearest_path(path), where=path, fix="a JSON list of functions")
    try:
        return plain_tools(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UsageError(f"the tools cannot be read: {error}", where=path, fix="a JSON list of functions") from None


def _save(messages: list[dict[str, Any]], path: Path) -> None:
    try:
        path.write_text(json.dumps(messages, indent=2, ensure_ascii=False), encoding="utf-8")
        log.info("saved %s", path)
    except OSError as error:
        log.error("not saved: %s: %s", path, error.strerror)


def _read(asking: str = "> ") -> str | None:
    """A message: one line, or several between lines of three quotes; None at the end of input."""
    try:
        line = input(asking if sys.stdin.isatty() else "")
        if not line.startswith('"""'):
            return line
        lines = [line[3:]]
        while not lines[-1].endswith('"""'):
            lines.append(input(". " if sys.stdin.isatty() else ""))
        return "\n".join(lines)[:-3].strip("\n")
    except EOFError:
        return None


def _take_turn(llama: Any, messages: list[dict[str, Any]], tools: Any, options: dict[str, Any]) -> None:
    """Append the assistant's answer; where it calls tools, the results that are typed and what it says to them."""
    start = len(messages) - 1
    try:
        while True:
            ids, tail = _answer(llama, llama.template.prompt(messages, tools), options)
            messages.append(llama.template.answer(ids, tools, tail))
            for call in (calls := messages[-1].get("tool_calls", [])):
                function = call["function"]
                given = ", ".join(f"{name}={value!r}" for name, value in function["arguments"].items())
                log.info("%s", harmless(f"it calls {function['name']}({given}); type the result"))
                if (result := _read("result> ")) is None:
                    return
                messages.append({"role": "tool", "content": result})
            if not calls:
                return
    except PunaError as error:  # of what was typed: a tag of Llama 2, or more than the model's context holds
        log.error("%s", error)
        log.info("your message is dropped; /save FILE keeps the conversation, /system begins another")
        del messages[start:]


def _answer(llama: Any, prompt: list[int], options: dict[str, Any]) -> tuple[list[int], str]:
    """Print the answer as it comes, without anything a terminal would obey; Ctrl-C ends it early.

    Returns:
        Its ids, and what comes after them up to a stop string that begins inside an id.
    """
    ids: list[int] = []
    said, text = "", None
    stream = llama.tokenizer.stream()

    def show(token: int) -> None:
        nonlocal said
        ids.append(token)
        said += (more := stream.feed(token))
        print(harmless(more), end="", flush=True)

    try:
        [result] = llama.complete([prompt], on_token=show, **options)
        text = result.completions[0].text
    except KeyboardInterrupt:
        print(" ...", end="")
    rest = stream.end()
    tail = "" if text is None else text[len(said + rest) :]
    print(harmless(rest + tail))
    return ids, tail
