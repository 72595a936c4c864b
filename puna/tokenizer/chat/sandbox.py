"""Chat templates come with strangers' models: jinja, confined so that none reaches Python or runs or grows without end.

No clock is asked and nothing is undone: what a template is about to do (run a loop's body, walk through a value, make
a text) is charged to an allowance before it happens, and the size of the conversation sets the allowance. Filters and
methods that could make much out of little (center, ljust, batch) are not there.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import lru_cache, wraps
from itertools import islice
from typing import Any

from jinja2 import Environment, Template, TemplateError, nodes, pass_context, pass_environment
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.runtime import Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace

from puna.errors import DataError
from puna.tokenizer.chat.allowance import ALLOWANCE, Allowance, charge, extent, look, made
from puna.tokenizer.chat.charging import CHARGED, LOOKED, Charging

MAX_SOURCE, _MAX_TOKENS = 1 << 16, 12_000  # the longest template of a published Llama has 5 kB and 900 tokens
_MAX_BITS = 4096  # of a whole number: counting needs no more
_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "groupby", "int", "items", "last",
    "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "safe", "select", "selectattr",
    "sort", "string", "sum", "title", "trim", "unique", "upper",
)  # fmt: skip
_TEXT_METHODS = (
    "capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdigit", "islower", "isnumeric",
    "isspace", "isupper", "join", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind",
    "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "title", "upper",
)  # fmt: skip
_COLLECTION_METHODS = ("copy", "count", "get", "index", "items", "keys", "values")
_COLLECTIONS = (Mapping, list, tuple)


class ChatTemplate:
    """A compiled template. Rendering equals transformers' for every template that keeps within bounds."""

    def __init__(self, source: str):
        """Raises: DataError, not a template, or longer than any is."""
        if len(source) > MAX_SOURCE:
            raise DataError(f"the chat template has {len(source):,} characters", cause=f"more than {MAX_SOURCE:,}")
        try:
            self._template: Template = _Confined().from_string(source)
        except Exception as error:  # RecursionError and SyntaxError of what jinja makes of it, too
            raise DataError(f"the chat template is not valid: {_told(error)}") from None

    def render(self, **variables: Any) -> str:
        """The text.

        Raises:
            DataError: the template refuses the conversation, fails, or does more than the input justifies.
        """
        before = ALLOWANCE.set(Allowance(variables))
        written, pieces = 0, []
        try:
            for piece in self._template.generate(**variables):
                written += len(piece)
                if written > ALLOWANCE.get().longest:
                    raise SecurityError("it writes far more than it was given")
                pieces.append(piece)
        except Exception as error:  # whatever a template does to a value
            raise DataError(f"the chat template failed: {_told(error)}") from None
        finally:
            ALLOWANCE.reset(before)
        return "".join(pieces)


compiled = lru_cache(maxsize=64)(ChatTemplate)
"""The template of a source, compiled once: that takes longer than rendering it."""


class _Confined(ImmutableSandboxedEnvironment):
    """jinja with transformers' settings and globals, every growth and repetition charged."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self) -> None:
        # Not optimized: that would run constant expressions while compiling, before anything is charged.
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[loopcontrols, _Generation])
        self.filters = {name: _bounded(self.filters[name]) for name in _FILTERS}
        self.filters |= {"tojson": _to_json, CHARGED: charge, LOOKED: look}
        self.filters |= {"replace": _replace, "join": _join_filter, "indent": _indent}
        self.tests = {name: _bounded(test) for name, test in self.tests.items()}
        self.globals = {"range": self.globals["range"], "cycler": self.globals["cycler"], "dict": _dict}
        self.globals |= {"namespace": _PlainNamespace, "raise_exception": _refuse, "strftime_now": _now}
        self.finalize = _shown

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(list(islice(self.lex(source), _MAX_TOKENS + 1))) > _MAX_TOKENS:
            raise SecurityError("more words than any template needs")
        return Charging().visit(super()._parse(source, name, filename))

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What a macro or a block's assignment wrote, as one text."""
        kept = list(pieces)
        ALLOWANCE.get().write(sum(map(len, kept)))
        return "".join(kept)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str | bytes | int | float):
            return isinstance(obj, str) and attr in _TEXT_METHODS
        if isinstance(obj, _COLLECTIONS):
            return attr in _COLLECTION_METHODS
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if getattr(value, "__name__", "") != "format" or not isinstance(getattr(value, "__self__", None), str):
            return None
        return lambda *args, **kwargs: made(_Formatter(self).vformat(value.__self__, args, kwargs))

    def getitem(self, obj: Any, argument: Any) -> Any:
        return made(super().getitem(obj, argument)) if isinstance(argument, slice) else super().getitem(obj, argument)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner, method = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        named = {key: value for key, value in kwargs.items() if key not in ("_loop_vars", "_block_vars")}  # jinja's own
        for value in (owner, *args, *named.values()):
            look(value)
        if isinstance(owner, str) and method == "replace":
            return _replace(owner, *args, **named)
        if isinstance(owner, str) and method == "join":
            return _join(args[0], owner)
        return made(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, str | list | tuple) or isinstance(right, str | list | tuple):
            _charge_sequences(operator, left, right)
        elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() + right.bit_length() if operator == "*" else left.bit_length() * abs(right)
            if bits > _MAX_BITS:
                raise SecurityError("it computes with enormous numbers")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """`{% generation %}`: where transformers would find the assistant's words. Here they are found otherwise."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Formatter(SandboxedFormatter):
    """str.format without widths, which make any length of one character."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if format_spec:
            raise SecurityError("it formats with widths")
        text = _text(value)
        ALLOWANCE.get().write(len(text))
        return text


class _PlainNamespace(Namespace):
    """A namespace without names that mean something to Python (`__html__`)."""

    def __init__(*args: Any, **kwargs: Any):
        self, *given = args
        Namespace.__init__(self)
        for name, value in dict(*given, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"it sets {name}")
        super().__setitem__(name, value)


@pass_context
def _shown(context: Any, value: Any) -> Any:
    """What `{{ value }}` writes, charged before Python spells it out."""
    if isinstance(value, _COLLECTIONS):
        look(value)
        ALLOWANCE.get().write(2 * extent(value)[1])
    elif not (value is None or isinstance(value, str | int | float | Undefined)):
        raise SecurityError(f"it writes a {type(value).__name__}")
    return value


def _text(value: Any) -> str:
    return str(_shown(None, value))


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or a test, charged at every call: `select('in', values)` searches the values for each item."""

    @wraps(function)  # with jinja's marks of what else it passes
    def bounded(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            look(value)
        return made(function(*args, **kwargs))

    return bounded


@pass_environment
def _join_filter(environment: Environment, values: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    return _join(map(make_attrgetter(environment, attribute), values) if attribute else values, d)


def _join(values: Iterable[Any], between: Any = "") -> str:
    values = list(made(values if isinstance(values, list | tuple) else (value for value in values)))
    between = _text(between)
    ALLOWANCE.get().write(extent(values)[1] + len(between) * len(values))
    return between.join(map(str, values))


def _replace(text: Any, old: str, new: str, count: int | None = None) -> str:
    text, most = _text(text), -1 if count is None else count
    found = text.count(old) if most < 0 else min(most, text.count(old))
    ALLOWANCE.get().write(len(text) + found * len(new))
    return text.replace(old, new, most)


def _indent(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """As jinja's: every line but the first (and the empty ones) moved to the right."""
    text = _text(text)
    lines = (text + "\n").splitlines()
    ALLOWANCE.get().write(len(text) + len(lines) * (len(width) if isinstance(width, str) else max(width, 0)))
    margin = width if isinstance(width, str) else " " * width
    first_line, *rest = lines
    return "\n".join([margin * first + first_line, *(margin + line if line or blank else line for line in rest)])


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """transformers' tojson: json.dumps, nothing escaped for HTML."""
    if (indent is not None and not 0 <= int(indent) <= 16) or len("".join(separators or "")) > 16:
        raise SecurityError("it spreads JSON too widely")
    look(value)
    values, characters = extent(value)
    ALLOWANCE.get().write(characters + values * 4 * int(indent or 0))
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    # Private-use characters stand for a message's control strings: escaped, these would not come back.
    return re.sub("[^\0-\x7f\U000f0000-\U000ffffd]", lambda c: json.dumps(c[0])[1:-1], text) if ensure_ascii else text


def _charge_sequences(operator: str, left: Any, right: Any) -> None:
    """Before texts or lists are added or repeated."""
    if operator == "%":
        raise SecurityError("it formats with %")
    texts = isinstance(left, str) or isinstance(right, str)
    if operator == "+" and texts:
        ALLOWANCE.get().write(sum(len(side) for side in (left, right) if isinstance(side, str)))
    elif operator == "+":
        look([left, right])
    elif operator == "*":
        times, repeated = (left, right) if isinstance(left, int) else (right, left)
        if not isinstance(times, int):
            return  # Python refuses it
        if texts:
            ALLOWANCE.get().write(len(repeated) * max(times, 0))
        else:
            look(repeated, max(times, 1))


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _told(error: Exception) -> str:
    return (str(error) or type(error).__name__)[:300]
