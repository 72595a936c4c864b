"""`puna plan CONFIG`: memory by class, time, and what to change where it does not fit. Exit code 6 if it does not."""

import sys
from typing import Annotated, Any

import typer

from puna.cli.configs import ConfigName, Words
from puna.cli.output import Json, print_json, wrapped
from puna.errors import ResourceError

_ABOUT = {
    "weights": "as they lie in memory",
    "adapters": "fp32",
    "gradients": "of what is trained by then",
    "optimizer": "moments",
    "activations": "kept for the backward",
    "logits": "chunks of them, and the head's gradient",
    "runtime": "texts, tokenizer, and holes between blocks",
}


def register(app: typer.Typer) -> None:
    app.command("plan")(plan)


def plan(
    config: ConfigName,
    words: Words = None,
    nproc: Annotated[int, typer.Option("--nproc", min=1, help="Processes that would train together.")] = 1,
    as_json: bool = Json,
) -> None:
    """Memory and time of a run before it starts, and the cheapest change that makes it fit."""
    from puna.config import parse_words
    from puna.recipes import plan as plan_config

    found = plan_config(config, nproc, **parse_words(words or []))
    print_json(found.as_data()) if as_json else print("\n".join(told(found)))
    if not found.fits:
        sys.exit(ResourceError.exit_code)


def told(plan: Any) -> list[str]:
    """The plan as lines of at most 80 columns."""
    lines = [f"{name:12} {_gb(size):>10}  {_ABOUT[name]}" for name, size in plan.memory.items() if size]
    each = " on each rank" if plan.ranks > 1 else ""
    has = f", of {_gb(plan.has)} free" if plan.has is not None else ""
    lines += wrapped(f"{'in all':12} {_gb(plan.total):>10}  ", f"at its fullest, {plan.when}{each}{has}")
    low, high = (_clock(plan.seconds * (1 + sign * plan.spread)) for sign in (-1, 1))
    step = f"{plan.seconds_per_step:.3g} s a step, {plan.steps:,} steps: {low} to {high}"
    lines += ["", *wrapped("time         ", f"about {step}, without validations and checkpoints")]
    lines += [line for note in plan.notes for line in wrapped("note         ", note)]
    if plan.fits:
        return lines
    if plan.change is None:
        return [*lines, "", "It does not fit, and no change here makes it: a smaller model, a larger machine."]
    change = plan.change
    slower = change.seconds / plan.seconds_per_step - 1
    result = f"then {_gb(change.memory)} and {change.seconds:.3g} s a step ({slower:+.0%}); {change.what}"
    words = [f"  {word}" for word in change.words]
    return [*lines, "", "It does not fit. The cheapest change that does, to type:", *words, *wrapped("  ", result)]


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"


def _clock(seconds: float) -> str:
    from puna.log import clock

    return clock(seconds) if seconds < 48 * 3600 else f"{seconds / 86400:,.0f} days"
