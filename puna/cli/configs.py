"""Recipes and their configs: run, ls, cat, cp, validate, schema."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from puna.cli.output import Json, print_json, print_rows
from puna.errors import UsageError
from puna.files import write_text
from puna.ranks import started_as

Words = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values over the config's.", show_default=False)
]
ConfigName = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A name of `puna ls configs`, a recipe, or a YAML file.")
]


def register(app: typer.Typer) -> None:
    for verb in (run, ls, cat, cp, validate, schema):
        app.command(verb.__name__)(verb)


def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A name of `puna ls recipes`.")],
    words: Words = None,
    config: Annotated[str | None, typer.Option("--config", "-c", help="A shipped config or a YAML file.")] = None,
    nproc: Annotated[int, typer.Option("--nproc", min=1, help="Processes that train together, one a device.")] = 1,
) -> None:
    """Run a recipe: puna run pretrain --config quickstart/pretrain seconds=60"""
    from puna.config import parse_words
    from puna.recipes import load
    from puna.recipes import run as run_recipe

    settings = load(recipe, config, parse_words(words or []))
    started = started_as().ranks
    if nproc > 1 and started == 1:
        from puna.dist.launch import launch
        from puna.recipes import check_ranks

        check_ranks(settings, nproc)
        raise typer.Exit(launch(nproc, [sys.executable, "-m", "puna", *sys.argv[1:]]))
    if nproc not in (1, started):
        raise UsageError(f"--nproc {nproc} among {started} ranks that torchrun started", fix="leave --nproc out")
    run_recipe(recipe, settings)


def ls(
    what: Annotated[
        str, typer.Argument(help="recipes, configs, models, tasks or runs; the first three by default.")
    ] = "all",
    as_json: bool = Json,
) -> None:
    """List recipes, configs, models, tasks of `puna eval`, or runs."""
    from puna.config import nearest
    from puna.recipes import CONFIGS, RECIPES

    sections = {"recipes": RECIPES, "configs": CONFIGS}
    if what == "runs":
        from puna.cli.runs import list_runs, print_runs

        print_runs(list_runs(Path(".")), as_json)
        return
    if what == "tasks":
        print_rows(_tasks(), as_json)
        return
    if what not in (*sections, "models", "all"):
        raise UsageError(
            f"nothing called `{what}` to list" + nearest(what, [*sections, "models", "tasks", "runs"]),
            fix="puna ls recipes, configs, models, tasks or runs",
        )
    rows: dict[str, list[dict[str, Any]]]
    rows = {kind: [{"name": n, "summary": s} for n, s in table.items()] for kind, table in sections.items()}
    if what in ("models", "all"):
        rows["models"] = _models()
    if what != "all":
        print_rows(rows[what], as_json)
    elif as_json:
        print_json([{"kind": kind, **row} for kind, table in rows.items() for row in table])
    else:
        for kind, table in rows.items():
            print(f"{kind}:")
            print_rows([{**row, "name": "  " + row["name"]} for row in table], False)


def cat(config: ConfigName) -> None:
    """Print a config as it is written; for a recipe's name every key with its default and what it is for."""
    print(_text(config), end="")


def cp(config: ConfigName, file: Annotated[Path, typer.Argument(help="Where to write it.")]) -> None:
    """Copy a config, or a recipe's every key, to a file of your own."""
    file = file / Path(config).name if file.is_dir() else file
    target = file if file.suffix in (".yaml", ".yml") else file.with_name(file.name + ".yaml")
    if target.exists():
        raise UsageError("exists already", where=target, fix="another file name")
    text = _text(config)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, text)
    print(target)


def validate(config: ConfigName, words: Words = None) -> None:
    """Check a config and print every value it resolves to."""
    from puna.config import parse_words, to_yaml
    from puna.recipes import RECIPES, config_file, load, recipe_of

    recipe, file = (config, None) if config in RECIPES else (recipe_of(config_file(config)), config)
    settings = load(recipe, file, parse_words(words or []))
    print(to_yaml(settings), end="")


def schema(recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A name of `puna ls recipes`.")]) -> None:
    """Print a recipe's JSON Schema, for editors."""
    from puna.config import nearest
    from puna.recipes import RECIPES, config_type

    if recipe not in RECIPES:
        raise UsageError(f"no recipe `{recipe}`" + nearest(recipe, list(RECIPES)), fix="puna ls recipes")
    print_json(config_type(recipe).model_json_schema())


def _text(config: str) -> str:
    from puna.config import template
    from puna.recipes import CONFIGS, RECIPES, config_file, config_type

    if config in RECIPES and config not in CONFIGS:
        return template(config_type(config)) + "\n"
    return config_file(config).read_text(encoding="utf-8")


def _tasks() -> list[dict[str, Any]]:
    """What can be measured: sets with data of their own, written-out requests, and problems that are made."""
    from importlib.util import find_spec

    from puna.eval.sets import PACKAGE
    from puna.eval.table import TASKS

    rows = [{"name": name, "summary": task.summary} for name, task in TASKS.items()]
    rows.append({"name": "olmes:TASK/FORM", "summary": f"requests of {PACKAGE.requirement}: olmes:arc_easy/rc_5shot"})
    if find_spec("reasoning_gym"):
        from reasoning_gym import factory  # pyright: ignore[reportMissingImports]

        rows += [{"name": name, "summary": "problems made by reasoning-gym"} for name in sorted(factory.DATASETS)]
    return rows


def _models() -> list[dict[str, Any]]:
    """What can be trained (presets), and what is there to be opened: registered names and the Hugging Face cache."""
    from puna.checkpoint.hub import cached_models
    from puna.checkpoint.registered import REGISTERED
    from puna.model.config import count_parameters
    from puna.model.presets import PRESETS

    rows = []
    for name, shape in PRESETS.items():
        size = count_parameters(shape)
        about = f"{size / 1e9:.2f}B" if size >= 1e9 else f"{size / 1e6:.1f}M"
        about += f" parameters, {shape.n_layers} layers of {shape.dim}, context {shape.max_seq_len:,}"
        rows.append({"name": name, "summary": about, "parameters": size})
    rows += [{"name": n, "summary": f"{package.about}, with its weights"} for n, (package, _) in REGISTERED.items()]
    for found in cached_models():
        size = sum(file.stat().st_size for file in found.folder.glob("*.safetensors"))
        rows.append({"name": str(found.name), "summary": f"in the Hugging Face cache, {size / 1e9:.2f} GB of weights"})
    return rows
