"""The acts of a Llama's life, each a page. `RECIPES` is a static table, so listing them imports nothing."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module, resources
from inspect import signature
from pathlib import Path
from typing import Any

from puna.config import Config, load_config, nearest, nearest_path, read_yaml
from puna.errors import UsageError
from puna.log import log, setup_logging
from puna.ranks import rows_each, started_as
from puna.train.run_report import write_run_report

RECIPES = {
    "tokenizer": "train a tokenizer: text -> tokenizer folder",
    "data": "encode text into token shards: text + tokenizer -> shard folder",
    "pretrain": "pretrain a Llama: token shards -> run folder with a model",
    "sft": "tune a model on conversations: model + rows -> run folder with an adapter or a model",
}

CONFIGS = {
    "quickstart/tokenizer": "2,048 ids from Shakespeare and the King James Bible",
    "quickstart/data": "the same text as shards, two plays held out",
    "quickstart/pretrain": "a 1M-parameter Llama 3 in two minutes on a laptop",
    "quickstart/chat": "that newborn learns small talk, every weight trained",
    "quickstart/lora": "LoRA of SmolLM2-135M on three tasks, judged before and after",
    "lora": "adapters on a frozen model, for `model=...` and `data.path=...` of yours",
    "qlora": "the same over a base in 4 bits, in a quarter of its memory",
    "full": "every weight of it trained, with 8-bit AdamW",
    "debug": "ten steps of a tiny model on your shards: does the machinery turn?",
}

_LIMITS = ("steps", "epochs", "seconds")
_PLACES = ("path", "hub", "file")
"""Keys that say the same otherwise: how long a run is, and where a section's conversations are."""


def config_type(recipe: str) -> type[Config]:
    """The recipe's Config class (imports the recipe)."""
    return _module(recipe).Config


def config_file(name: str) -> Path:
    """A shipped config's file, or the file of that name.

    Raises:
        UsageError: neither.
    """
    if name in CONFIGS:
        return Path(str(resources.files("puna") / "configs" / f"{name}.yaml"))
    try:
        if Path(name).is_file():
            return Path(name)
    except OSError as error:
        raise UsageError(f"no config `{name[:100]}`: {error.strerror}", fix="puna ls configs") from None
    if Path(name).suffix in (".yaml", ".yml"):
        raise UsageError("no such config file" + nearest_path(Path(name)), where=name, fix="puna ls configs")
    near = nearest(name, [*CONFIGS, *RECIPES]) or nearest_path(Path(name))
    raise UsageError(f"no config `{name}`{near}", fix="puna ls configs, or a .yaml file")


def recipe_of(file: Path) -> str:
    """The recipe a config file is for, from its `recipe:` line."""
    recipe = read_yaml(file).get("recipe")
    if recipe not in RECIPES:
        hint = nearest(str(recipe), list(RECIPES)) if recipe else ""
        raise UsageError(
            f"recipe is {recipe!r}{hint}" if recipe else "the file does not say which recipe it is for",
            where=file, fix=f"a line `recipe: NAME` with one of {', '.join(RECIPES)}",
        )  # fmt: skip
    return recipe


def load(recipe: str, config: str | Path | None = None, given: Mapping[str, Any] | None = None) -> Config:
    """The recipe's config from a shipped or own file (none: its defaults) and values over it, dotted keys."""
    if recipe not in RECIPES:
        fix = f"puna run {recipe_of(config_file(recipe))} --config {recipe}" if recipe in CONFIGS else "puna ls recipes"
        raise UsageError(f"no recipe `{recipe}`" + nearest(recipe, list(RECIPES)), fix=fix)
    file = config_file(str(config)) if config is not None else None
    told = read_yaml(file) if file else {}
    if file is not None and "recipe" in told and (named := recipe_of(file)) != recipe:
        raise UsageError(
            f"this config is for the recipe `{named}`, not `{recipe}`",
            where=file,
            fix=f"puna run {named} --config {config}",
        )
    kind = config_type(recipe)
    return load_config(kind, file, _over(kind.model_fields, given or {}, told))


def _over(fields: Mapping[str, Any], given: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """The values, with what the file says otherwise about the same taken back: what is typed wins.

    Args:
        fields: of the recipe's config, by name.
        told: the file's tree.
    """
    back: dict[str, Any] = {}
    for key in (key for key, value in given.items() if value is not None):
        section, dot, name = key.rpartition(".")
        if key in _LIMITS:
            back |= {other: fields[other].default for other in _LIMITS if other in fields and other in told}
        elif section and name in ("path", "hub"):  # `file` is a part of hub, and alone says no place
            others = (section + dot + other for other in _PLACES if other != name)
            back |= {other: None for other in others if _said(told, other) is not None}
    return {**back, **given}


def _said(told: Any, key: str) -> Any:
    """The value of a dotted key of a file, if it has one."""
    for part in key.split("."):
        told = told.get(part) if isinstance(told, Mapping) else None
    return told


def run(
    recipe: str,
    config: Config | str | Path | None = None,
    *,
    objective: Callable[[Any, Any], Any] | None = None,
    **overrides: Any,
) -> Path:
    """Run a recipe and return its output: `puna.run("pretrain", data="shards", **{"train.accumulate": 4})`.

    Args:
        config: the name of a shipped config, a YAML file, or a config that `load` made.
        objective: what is minimised in place of the recipe's own, of those that take one (docs/objectives.md).
        overrides: values over the config's; dotted keys by `**{...}`.

    Where it trains, CPU tensors of this process have an allocator of ours from then on, which torch's profiler does
    not see (`PUNA_NATIVE=0`: torch's own).
    """
    if not log.handlers:
        setup_logging()
    settings: Any = config if isinstance(config, Config) else load(recipe, config, overrides)
    check_ranks(settings, started_as().ranks)
    if started_as().rank:
        log.setLevel(logging.ERROR)  # rank 0 speaks for all
    folder, main = settings.output, _module(recipe).main
    if objective is not None:
        if "objective" not in signature(main).parameters:
            raise UsageError(f"`{recipe}` takes no objective", fix="sft does")
        main = partial(main, objective=objective)
    if "forecast" in signature(main).parameters:
        import_module("puna.ops.native.allocator").fit_holes()  # or a forecast would be of another memory
        main = partial(main, forecast=_planner().forecast_of(settings))
    try:
        return main(settings)
    finally:  # also when a signal, or a kill the last time, came between the run's end and this page
        ended = started_as().rank == 0 and all((folder / name).exists() for name in ("result.json", "final"))
        if ended and not (folder / "report.html").exists():
            log.info("report: %s", write_run_report(folder))


def plan(config: Config | str | Path, ranks: int = 1, **overrides: Any) -> Any:
    """What a run would take in memory and time: `puna.plan("my.yaml", seq_len=2048).memory`; a `planner.plan.Plan`.

    Args:
        config: the name of a shipped config or of a recipe, a YAML file, or a config that `load` made.
        ranks: processes that would train together.
        overrides: values over the config's.

    Raises:
        UsageError: a recipe that trains nothing.
    """
    if not isinstance(config, Config):
        name = str(config)
        own = name not in RECIPES or name in CONFIGS
        config = load(recipe_of(config_file(name)) if own else name, name if own else None, overrides)
    check_ranks(config, ranks)
    return _planner().plan(config, ranks)


def check_ranks(config: Any, count: int) -> None:
    """Raise UsageError if the recipe of `config` does not work as `count` ranks, or its batches not among them."""
    if count > 1 and config.recipe not in ("pretrain", "sft"):
        raise UsageError(f"`{config.recipe}` runs in one process", fix="without --nproc or torchrun")
    if count > 1:
        rows_each(config.batch_size, count)


def _planner() -> Any:
    return import_module("puna.planner.plan")  # listings load no torch


def _module(recipe: str) -> Any:
    return import_module(f"puna.recipes.{recipe}")
