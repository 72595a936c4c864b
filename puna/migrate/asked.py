"""What a torchtune config asks for: values that rules take, and what is left when every rule has taken its own."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from puna.config import nearest_path, plain, read_yaml
from puna.errors import UsageError

_SWITCHES = {
    "true": True,
    "yes": True,
    "on": True,
    "false": False,
    "no": False,
    "off": False,
    "none": False,
}  # YAML 1.1
_REFERENCE = re.compile(r"\$\{([^{}]*)\}")


class Asked:
    """Values under dotted keys. What no rule takes is told at the end, so nothing is dropped unseen."""

    def __init__(self, values: Mapping[str, Any], where: object):
        self.values, self.where = values, where
        self._taken: set[str] = set()

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a dotted key; it and all below it count as read. `default` where it is absent."""
        self._taken.add(key)
        found: Any = self.values
        for part in key.split("."):
            if not isinstance(found, Mapping) or part not in found:
                return default
            found = found[part]
        return found

    def has(self, key: str) -> bool:
        """Whether a dotted key is there with a value; it stays unread."""
        found: Any = self.values
        for part in key.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        return found is not None

    def flag(self, key: str, default: bool = False) -> bool:
        """The same of a switch; null is off.

        Raises:
            UsageError: it is neither true nor false.
        """
        value = self.take(key, default)
        found = _SWITCHES.get(str(value).lower())
        if found is None:
            fix = f"{key}: True, or False"
            raise UsageError(f"`{key}` is {value!r}, neither True nor False", where=self.where, fix=fix)
        return found

    def count(self, key: str, default: int | None = None) -> int | None:
        """The same of a whole number.

        Raises:
            UsageError: it is something else.
        """
        value = self.take(key, default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise UsageError(f"`{key}` is {value!r}, not a whole number", where=self.where, fix=f"{key}: 1, say")
        return value

    def component(self, section: str = "") -> str:
        """The dotted path that builds a section (or the whole), as it is written; empty where there is none."""
        value = self.take(f"{section}._component_" if section else "_component_")
        return value if isinstance(value, str) else ""

    def name(self, section: str = "") -> str:
        """The last name of that path: `torch.optim.AdamW` is AdamW."""
        return self.component(section).rpartition(".")[2]

    def left(self) -> Iterator[tuple[str, Any]]:
        """Every key with a value that nobody took."""
        return self._left(self.values, "")

    def _left(self, values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            name = f"{prefix}{key}"
            if name in self._taken or value is None:
                continue
            if isinstance(value, Mapping) and value:
                yield from self._left(value, f"{name}.")
            else:
                yield name, value


def read(file: Path) -> Asked:
    """The config of a file, its `${...}` filled in.

    Raises:
        UsageError: not a config, or a reference to nothing.
    """
    if not file.exists():
        fix = "tune cp NAME FILE writes one of torchtune's own configs; then puna migrate FILE"
        raise UsageError("no such torchtune config" + nearest_path(file), where=file, fix=fix)
    try:
        values = plain(read_yaml(file))
    except UsageError as error:
        raise UsageError(error.what, where=error.where, cause=error.cause, fix="a file that `tune cp` wrote") from None
    return Asked(_filled(values, values, file, ()), file)


def _filled(value: Any, root: Mapping[str, Any], file: Path, inside: tuple[str, ...]) -> Any:
    """OmegaConf's `${key}` replaced by what the key holds: alone it keeps its type, in a text it becomes text.

    Args:
        inside: the references that are being filled in: one among them would never end.
    """
    if isinstance(value, dict):
        return {key: _filled(inner, root, file, inside) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, root, file, inside) for inner in value]
    if not isinstance(value, str) or "${" not in value:
        return value

    def looked_up(key: str) -> Any:
        found: Any = root
        for part in key.strip().split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if found is None or key in inside:
            raise UsageError(f"`${{{key}}}` points at nothing", where=file, fix="write the value itself in its place")
        return _filled(found, root, file, (*inside, key))

    if whole := _REFERENCE.fullmatch(value):
        return looked_up(whole[1])
    return _REFERENCE.sub(lambda match: str(looked_up(match[1])), value)
