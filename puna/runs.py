"""A run folder as it looks from outside: what was asked, how far it is, what its numbers are.

Read in milliseconds, by those who look at runs of many steps: without torch, and without the classes of its config.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from puna.errors import UsageError
from puna.files import is_locked
from puna.lineage import read_lineage
from puna.log import parse_row

ABSENT = "–"
"""In place of the value of a key that a run does not have."""


@dataclass(frozen=True)
class RunView:
    """What a run's files tell. Config keys are joined by dots."""

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """Every value it was started with."""
        return flat(read_plain(self.folder / "resolved.yaml"))

    @cached_property
    def given(self) -> dict[str, Any]:
        """What the user gave, as a tree."""
        return read_plain(self.folder / "config.yaml")

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        return self._read(every=True)

    @cached_property
    def ends(self) -> list[dict[str, Any]]:
        """The validations and the last trained step alone: what a list of many long runs has the time to read."""
        return self.rows if "rows" in self.__dict__ else self._read(every=False)

    @cached_property
    def result(self) -> dict[str, Any]:
        """What a finished run ended with."""
        return read_json(self.folder / "result.json")

    @cached_property
    def made_from(self) -> dict[str, Any]:
        """Lineage of the model in final/, or of the newest checkpoint."""
        saved = sorted((self.folder / "checkpoints").glob("step-*"), key=lambda p: (len(p.name), p.name))
        return next((found for place in (self.folder / "final", *saved[::-1]) if (found := read_lineage(place))), {})

    @property
    def recipe(self) -> str:
        return str(self.config.get("recipe", ""))

    @property
    def model(self) -> str:
        """A preset, or the model that was tuned."""
        return str(self.config.get("model", self.config.get("model.preset", "")))

    @property
    def trained(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "loss" in row]

    @property
    def last(self) -> dict[str, Any]:
        """The row of the last trained step."""
        return next((row for row in reversed(self.ends) if "loss" in row), {})

    @property
    def validations(self) -> list[dict[str, Any]]:
        return [row for row in self.ends if "loss" not in row]

    @property
    def steps(self) -> int:
        """Steps that were trained."""
        return self.last.get("step", 0)

    @property
    def planned(self) -> int | None:
        """Steps it is to have; None where that is not known yet."""
        measured = read_json(self.folder / "measured.json")
        plan = measured.get("plan")
        known = (
            plan.get("steps") if isinstance(plan, dict) else None, measured.get("steps"), self.config.get("steps")
        )  # fmt: skip
        return self.result.get("steps") or next((steps for steps in known if isinstance(steps, int)), None)

    @cached_property
    def state(self) -> tuple[str, str]:
        """(running, finished, stopped, failed or crashed; why). crashed: killed, or the power went."""
        if (self.folder / "final").exists():
            return "finished", ""
        if is_locked(self.folder):
            return "running", ""
        ending = read_json(self.folder / "ended.json")
        return str(ending.get("state", "crashed")), str(ending.get("why", "" if ending else "killed, or a power cut"))

    def values(self, key: str) -> list[tuple[int, float | None]]:
        """(step, value) of every row that has `key`."""
        return [(row["step"], row[key]) for row in self.rows if isinstance(row.get(key, ""), int | float | None)]

    def best(self, key: str = "valid_loss") -> tuple[int, float] | None:
        """(step, value) of the lowest `key` of all validations."""
        found = [(row["step"], row[key]) for row in self.validations if isinstance(row.get(key), int | float)]
        return min(found, key=lambda at: at[1]) if found else None

    def speed(self) -> float | None:
        """Tokens a second, the median of the last 50 steps."""
        return median(rates) if (rates := [row["tok_s"] for row in self.trained[-50:] if row.get("tok_s")]) else None

    def step_seconds(self) -> float | None:
        """Seconds of a step as the first five tell it."""
        first = [row["seconds"] for row in self.trained[:5] if row.get("seconds") is not None]
        return median(b - a for a, b in pairwise(first)) if len(first) > 1 else None

    def _read(self, every: bool) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        if not every:
            trained = [i for i, line in enumerate(lines) if b'"loss": ' in line]
            dropped = set(trained[:-1])
            lines = [line for i, line in enumerate(lines) if i not in dropped]
        return [row for line in lines if (row := parse_row(line))]


def read_run(folder: Path) -> RunView:
    """The run in `folder`.

    Raises:
        UsageError: none is there.
    """
    if not (folder / "resolved.yaml").is_file():
        here = [str(run.folder) for run in find_runs(Path("."))]
        near = [run for run in here if Path(run).name == folder.name] or get_close_matches(str(folder), here, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        raise UsageError(f"not a run folder{hint}", where=folder, fix="puna runs ls")
    return RunView(folder)


def find_runs(where: Path, depth: int = 3) -> Iterator[RunView]:
    """Run folders up to `depth` levels below `where`, by name."""
    found = {p.parent for level in range(depth + 1) for p in where.glob("*/" * level + "resolved.yaml")}
    return (RunView(folder) for folder in sorted(found))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return found


def changed(runs: Sequence[RunView]) -> dict[str, list[Any]]:
    """The config keys in which runs differ, without where they write: key -> its value in each run.

    A key that a run does not have counts only where the others disagree about it: a section that is null somewhere
    is one difference, not one for each of its keys, and another recipe has keys of its own.
    """
    found: dict[str, list[Any]] = {}
    for name in ("recipe", "model"):
        if len(set(values := [getattr(run, name) for run in runs])) > 1:
            found[name] = values
    for key in dict.fromkeys(key for run in runs for key in run.config):
        values = [run.config.get(key, _absent(run, key)) for run in runs]
        known = {repr(value) for value in values if value is not ABSENT}
        if len(known) > 1 and key not in ("output", "train.track", "recipe", "model", "model.preset"):
            found[key] = values
    return found


def _absent(run: RunView, key: str) -> str:
    return "set" if any(name.startswith(f"{key}.") for name in run.config) else ABSENT


def read_plain(path: Path) -> dict[str, Any]:
    """A YAML file of ours as plain values.

    Raises:
        UsageError: it cannot be read.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        found = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise UsageError(f"damaged: {' '.join(str(error).split())[:200]}", where=path) from None
    return found if isinstance(found, dict) else {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of ours; nothing where there is none, or none that can be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
