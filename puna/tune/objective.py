"""An objective that is handed to a recipe: what lineage calls it, and whether a run goes on with the one it had."""

from functools import partial

from puna.errors import UsageError
from puna.run_folder import Run
from puna.train.fit import Objective


def named_as(objective: Objective) -> str:
    """`module.name` of the function; of a partial of one with what it was given, of an object its class."""
    if isinstance(objective, partial):
        given = [*map(_short, objective.args), *(f"{name}={_short(x)}" for name, x in objective.keywords.items())]
        return f"{named_as(objective.func)}({', '.join(given)})"
    named = objective if hasattr(objective, "__qualname__") else type(objective)
    return f"{named.__module__}.{named.__qualname__}"


def check_same(objective: Objective | None, run: Run) -> None:
    """Refuse to go on with another objective than the run was started with; its config does not tell.

    Raises:
        UsageError: which one it was.
    """
    asked = named_as(objective) if objective else "the recipe's own"
    started = run.once("objective", lambda: asked)
    if started != asked:
        raise UsageError(
            f"an unfinished run with another objective is here: {started} -> {asked}", where=run.folder,
            fix="hand it over again, or choose another output=...",
        )  # fmt: skip


def _short(given: object) -> str:
    """A number or a word; of all else its type: what it prints may be another at the next start."""
    return repr(given)[:60] if isinstance(given, bool | int | float | str | None) else type(given).__name__
