"""The keys of a recipe's config, read from the sources: importing a recipe would load torch, two seconds a key."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parent.parent
_Found = tuple[str, ast.AST]
"""A definition and the module it stands in."""


def config_keys(recipe: str) -> dict[str, tuple[str, ...]]:
    """Dotted keys and the values one can type, where they are few: `{"steps": (), "compile": ("true", "false")}`."""
    found = _definition(f"puna.recipes.{recipe}", "Config")
    return dict(_fields(found, "")) if found else {}


def _fields(found: _Found, prefix: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    module, kind = found
    assert isinstance(kind, ast.ClassDef)
    for base in (_definition(module, b.id) for b in kind.bases if isinstance(b, ast.Name)):
        yield from _fields(base, prefix) if base else ()
    for field in kind.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            name = prefix + field.target.id
            yield name, tuple(_values(module, field.annotation))
            named_by_user = ast.unparse(field.annotation).startswith("dict[")
            for section in () if named_by_user else _sections(module, field.annotation):
                yield from _fields(section, name + ".")


def _values(module: str, annotation: ast.AST) -> Iterator[str]:
    """Of a Literal, a bool, or a section that can be null."""
    if isinstance(annotation, ast.Name):
        found = _definition(module, annotation.id)
        if annotation.id == "bool":
            yield from ("true", "false")
        elif found and not isinstance(found[1], ast.ClassDef):
            yield from _values(*found)
    elif isinstance(annotation, ast.BinOp):  # X | None
        yield from _values(module, annotation.left)
        if any(_sections(module, annotation.left)):
            yield "null"
    elif isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Literal":
        yield from (str(node.value) for node in ast.walk(annotation.slice) if isinstance(node, ast.Constant))


def _sections(module: str, annotation: ast.AST) -> Iterator[_Found]:
    for name in (node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)):
        if found := _definition(module, name):
            yield from [found] if isinstance(found[1], ast.ClassDef) else _sections(*found)


def _definition(module: str, name: str) -> _Found | None:
    """The class or the alias of this name, wherever the module has it from; None for a name that is not ours."""
    found = _names(module).get(name)
    return _definition(*found) if isinstance(found, tuple) else (module, found) if found else None


@cache
def _names(module: str) -> dict[str, ast.AST | tuple[str, str]]:
    file = _PACKAGE.parent / (module.replace(".", "/") + ".py")
    names: dict[str, ast.AST | tuple[str, str]] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body if file.is_file() else ():
        if isinstance(node, ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names[node.targets[0].id] = node.value
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("puna."):
            names |= {a.asname or a.name: (str(node.module), a.name) for a in node.names}
    return names
