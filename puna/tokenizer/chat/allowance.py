"""What a chat template may do: work and text, charged before they are done or made.

The size of what is rendered sets the allowance, no clock does: what passes on one machine passes on all.
"""

from collections.abc import Mapping
from contextvars import ContextVar
from types import GeneratorType
from typing import Any

from jinja2.exceptions import SecurityError

_VIEWS = (type({}.keys()), type({}.values()), type({}.items()), GeneratorType)


class Allowance:
    """What one rendering may still do, in proportion to what it was given."""

    def __init__(self, given: Any):
        values, characters = extent(given)
        self.steps = 300_000 + 2000 * values  # about 0.2 s, the default
        self.characters = (1 << 21) + 64 * characters
        self.longest = (1 << 16) + 4 * characters

    def walk(self, steps: int) -> None:
        """Charge for work: nodes of the template to run, or values to go through."""
        self.steps -= max(0, steps)  # a template that calls this itself must not earn
        if self.steps < 0:
            raise SecurityError("it runs without end")

    def write(self, characters: int) -> None:
        """Charge for a text that is about to be made."""
        self.characters -= max(0, characters)
        if characters > self.longest or self.characters < 0:
            raise SecurityError("it writes far more than it was given")


ALLOWANCE: ContextVar[Allowance] = ContextVar("allowance")
"""Of the rendering that runs in this thread."""


def extent(value: Any) -> tuple[int, int]:
    """How many values there are in `value`, and about how many characters it takes to write them."""
    values = characters = 0
    rest = [value]
    while rest:
        item = rest.pop()
        values += 1
        if isinstance(item, str):
            characters += len(item) + 4
        elif isinstance(item, Mapping):
            rest += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            rest += item
        else:
            characters += 24 + (item.bit_length() // 3 if isinstance(item, int) else 0)
    return values, characters


def charge(steps: int) -> None:
    """Charge for work."""
    ALLOWANCE.get().walk(steps)


def look(value: Any, times: int = 1) -> Any:
    """Charge for going through `value`: a list in a list in a list can be long although it took few words."""
    allowance, rest = ALLOWANCE.get(), [value]
    while rest:
        item = rest.pop()
        allowance.walk(times)
        if isinstance(item, str):
            allowance.walk(times * (len(item) >> 8))
        elif isinstance(item, Mapping):
            rest += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            rest += item
        elif isinstance(item, range):
            allowance.walk(times * len(item))
    return value


def made(value: Any) -> Any:
    """Charge for a value that a call or a filter made; what would be walked through later is walked through now."""
    if isinstance(value, str):
        ALLOWANCE.get().write(len(value))
        return value
    if isinstance(value, _VIEWS):
        allowance, kept = ALLOWANCE.get(), []
        for item in value:
            allowance.walk(1)
            kept.append(item)
        return look(kept)
    return look(value)
