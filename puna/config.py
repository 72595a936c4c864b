"""Typed configs: frozen pydantic models filled from a YAML file and `key=value` words, errors with file:line.

Precedence: command line > file > default. YAML is read as version 1.2, duplicate keys are refused, and words from
the command line are parsed by the same types. A config holds values only; whatever is derived is a function.
"""

import difflib
import io
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from puna.errors import UsageError

Keys = tuple[str | int, ...]
UserPath = Annotated[Path, AfterValidator(Path.expanduser)]
"""A path as people type it: `~` is their home."""
C = TypeVar("C", bound="Config")
_ANY = "NAME"  # in a dotted key: whatever the user calls a part


class Config(BaseModel):
    """Base of all configs: immutable, unknown keys refused, the string below a field is its documentation."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


class RecipeConfig(Config):
    """What every recipe has in common."""

    recipe: str
    """Which recipe this file is for; lets `puna validate FILE` know."""
    output: UserPath
    """Folder to write. It must not hold something else already."""
    seed: int = 0
    """Initial weights, sample order and generated text follow from it; tokenizer and data draw nothing."""
    dtype: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """Compute dtype. auto: bf16 where the hardware has native bf16, else fp32."""
    device: str = "auto"
    """auto: cuda, then mps, then cpu; or a torch device such as cuda:1."""


def load_config(kind: type[C], file: Path | None = None, given: Mapping[str, Any] | None = None) -> C:
    """Read `file` (YAML), lay the `given` values over it (dotted keys) and validate.

    Raises:
        UsageError: listing every problem with its file:line or `key=value` and the nearest valid key.
    """
    tree = read_yaml(file) if file else {}
    values = plain(tree)
    said: dict[Keys, str] = {}
    for key, value in (given or {}).items():
        keys = tuple(key.split("."))
        _put(values, keys, str(value) if isinstance(value, Path) else value)
        said[keys] = f"{key}={value}"
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = [_problem(kind, e, file, tree, said) for e in error.errors()]
        raise UsageError("\n".join(problems)) from None


def parse_words(words: Sequence[str]) -> dict[str, Any]:
    """`["train.lr=1e-3"]` -> {"train.lr": "1e-3"}; lists, mappings, quotes and null are YAML, the rest is text."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    given: dict[str, Any] = {}
    for word in words:
        key, sign, text = word.partition("=")
        if not sign or not key:
            fix = f"{word}=VALUE" if not sign else "for example sources.path=FOLDER or steps=100"
            raise UsageError(f"`{word}` is not of the form key=value", fix=fix)
        given[key] = text
        if text[:1] in ("[", "{", '"', "'") or text in ("null", "~", ""):
            try:
                given[key] = plain(YAML(typ="rt").load(text))
            except YAMLError:
                raise UsageError(f"the value of `{word}` is not valid YAML", cause="an open bracket or quote") from None
    return given


def read_yaml(file: Path) -> Any:
    """The file as ruamel's mapping, which knows the line of every key."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        tree = YAML(typ="rt").load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError("no such config file" + nearest_path(file), where=file, fix="puna ls configs") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot be read as a config: {error}", where=file) from None
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UsageError((error.problem or "not valid YAML").split(" with value")[0], where=f"{file}:{line}") from None
    except YAMLError as error:
        raise UsageError(f"not valid YAML: {error}", where=file) from None
    if tree is None:
        return {}
    if not isinstance(tree, Mapping):
        raise UsageError("a config is a mapping of `key: value` lines", where=f"{file}:1")
    return tree


def to_yaml(config: Config, given_only: bool = False) -> str:
    """The config as YAML: every value, or only those the user gave."""
    from ruamel.yaml import YAML

    stream = io.StringIO()
    YAML(typ="rt").dump(config.model_dump(mode="json", exclude_unset=given_only), stream)
    return stream.getvalue()


def template(kind: type[Config], indent: str = "") -> str:
    """A config file with every key, its default and what it is for."""
    lines = []
    for key, field in kind.model_fields.items():
        lines += [f"{indent}# {line}" for line in textwrap.wrap(" ".join((field.description or "").split()), 100)]
        inner = _submodel(field.annotation)
        if inner and field.default is not None:
            lines += [f"{indent}{key}:", template(inner, indent + "  ")]
        else:
            default = kind.model_construct().model_dump(mode="json").get(key)
            lines.append(f"{indent}{key}: {json.dumps(default, ensure_ascii=False)}")
    return "\n".join(lines)


def nearest(word: str, choices: Sequence[str]) -> str:
    """`; did you mean X?` for the closest of `choices`, whatever its case, or an empty string."""
    spelled = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(word.lower(), spelled, n=1, cutoff=0.6)
    return f"; did you mean `{spelled[close[0]]}`?" if close else ""


def nearest_path(path: Path) -> str:
    """The same for a path that is not there: the first part that is wrong, against what lies beside it."""
    wrong = next((p for p in (*reversed(path.parents), path) if not p.exists()), None)
    if wrong is None:
        return ""
    rest = path.relative_to(wrong)
    beside = sorted(wrong.parent.iterdir()) if wrong.parent.is_dir() else []
    return nearest(str(path), [str(p / rest) for p in beside if (p / rest).exists() and nearest(wrong.name, [p.name])])


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """`key: old -> new` for every leaf in which two plain config trees differ."""
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}: {a} -> {b}"


def plain(value: Any) -> Any:
    """ruamel's annotated containers and scalars as plain Python ones."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    for scalar in (bool, int, float, str):
        if isinstance(value, scalar):
            return scalar(value)
    return value


def _put(values: dict[str, Any], keys: Keys, value: Any) -> None:
    for key in keys[:-1]:
        inner = values.get(str(key))
        if isinstance(inner, str):
            inner = {"preset": inner}  # `model: llama3.2-1b` in the file, `model.n_layers=4` on the command line
        values[str(key)] = inner = dict(inner) if isinstance(inner, Mapping) else {}
        values = inner
    values[str(keys[-1])] = value


def _problem(kind: type[Config], error: Any, file: Path | None, tree: Any, said: Mapping[Keys, str]) -> str:
    keys: Keys = tuple(error["loc"])
    name = ".".join(map(str, keys))
    where = _where(keys, file, tree, said)
    if error["type"] == "extra_forbidden":
        everywhere = _all_keys(kind)
        level = _below(everywhere, keys[:-1])
        same = [k for k in everywhere if k.split(".")[-1] == keys[-1]]
        hint = f"; did you mean `{same[0]}`?" if same else nearest(str(keys[-1]), level)
        if not hint:
            hint = nearest(name, everywhere)
        elif not same and len(keys) > 1:
            hint = hint.replace("`", f"`{'.'.join(map(str, keys[:-1]))}.", 1)
        return f"{where}unknown key `{name}`{hint}\n  valid here: {', '.join(level)}"
    if error["type"] == "missing":
        if isinstance(keys[-1], int):
            return f"{where}`{'.'.join(map(str, keys[:-1]))}` has too few values ({keys[-1]})"
        return f"{where}`{name}` is missing; add it to the config or type {name}=..."
    if error["type"] == "literal_error":
        choices = [c.strip("'") for c in error["ctx"]["expected"].replace(" or ", ", ").split(", ")]
        return f"{where}`{name}` is {error['input']!r}; it must be one of {', '.join(choices)}" + nearest(
            str(error["input"]), choices
        )
    if error["type"] == "model_type":
        return (
            f"{where}`{name}` is a section, not {error['input']!r}\n  keys: {', '.join(_below(_all_keys(kind), keys))}"
        )
    if error["type"] in ("path_type", "string_type") and error["input"] is not None:
        return f"{where}`{name}` is text; YAML reads {str(error['input'])!r} as something else: put it in quotes"
    if error["type"] == "list_type" and isinstance(error["input"], str):
        return f"{where}`{name}` is a list; type {name}=[{error['input']}]"
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}`{name}`: {message[:1].lower()}{message[1:]} (got {error['input']!r})"


def _where(keys: Keys, file: Path | None, tree: Any, said: Mapping[Keys, str]) -> str:
    for end in range(len(keys), 0, -1):
        if keys[:end] in said:
            return f"{said[keys[:end]]}: "
    if not _in_file(keys, tree):  # `optimiser` came in by the word `train.optimiser.lr=1`
        for said_keys, word in said.items():
            if said_keys[: len(keys)] == keys:
                return f"{word}: "
    if file is None:
        return ""
    line = 1
    for key in keys:
        try:
            line = (tree.lc.item if isinstance(key, int) else tree.lc.key)(key)[0] + 1
            tree = tree[key]
        except (AttributeError, KeyError, IndexError, TypeError):
            break
    return f"{file}:{line}: "


def _in_file(keys: Keys, tree: Any) -> bool:
    for key in keys[:-1]:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return isinstance(tree, Mapping) and keys[-1] in tree


def _submodel(annotation: Any) -> type[Config] | None:
    """The section that a key holds; of a mapping, whose names the user gives, there is none."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    for inner in () if get_origin(annotation) is dict else getattr(annotation, "__args__", ()):
        if found := _submodel(inner):
            return found
    return None


def _below(everywhere: Sequence[str], keys: Keys) -> list[str]:
    parent = ".".join(map(str, keys))
    found = [k.rpartition(".") for k in everywhere]
    return [key for level, _, key in found if level == parent or (_ANY in level and _fits(level, parent))]


def _fits(level: str, parent: str) -> bool:
    ours, theirs = level.split("."), parent.split(".")
    return len(ours) == len(theirs) and all(a in (_ANY, b) for a, b in zip(ours, theirs, strict=True))


def _all_keys(kind: type[Config], prefix: str = "") -> list[str]:
    names = []
    for key, field in kind.model_fields.items():
        inner = _submodel(field.annotation)
        names += [f"{prefix}{key}", *(_all_keys(inner, f"{prefix}{key}.") if inner else [])]
        if get_origin(field.annotation) is dict and (member := _submodel(get_args(field.annotation)[1])):
            names += _all_keys(member, f"{prefix}{key}.{_ANY}.")
    return names
