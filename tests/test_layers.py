"""The layer table of the design, read from the imports."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "puna"
RANKS = [
    ["errors", "ranks", "config", "log", "device", "files", "run_folder", "packages", "report", "lineage", "integrity"],
    ["ops", "dist"],
    ["model", "tokenizer"],
    ["lora", "quant"],
    ["checkpoint"],
    ["data"],
    ["train", "infer"],
    ["align", "eval", "serve", "planner", "migrate", "tune"],
    ["recipes", "configs"],
    ["cli"],
    ["__main__"],
]
RANK = {place: rank for rank, places in enumerate(RANKS) for place in places}
CLOSURE_FILES, CLOSURE_LINES = 45, 7000  # 30 and 4,000 when pretraining was all there was


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """(dotted module of ours, whether it is imported inside a function) for every import."""
    tree = ast.parse(source)
    functions = ast.FunctionDef | ast.AsyncFunctionDef
    late = {n for f in ast.walk(tree) if isinstance(f, functions) for n in ast.walk(f)}
    for_types = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    unread = {n for block in for_types for n in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and node not in unread:
            yield from ((a.name, node in late) for a in node.names if a.name.split(".")[0] == "puna")
        elif isinstance(node, ast.ImportFrom) and node not in unread:
            assert not node.level, "a relative import hides where it points"
            whole = [f"{node.module}.{a.name}" for a in node.names]
            found = [w if find(w) or node.module == "puna" else str(node.module) for w in whole]
            yield from ((w, node in late) for w in found if w.split(".")[0] == "puna")


def find(module: str) -> Path | None:
    base = PACKAGE.parent / module.replace(".", "/")
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def violations(place: str, source: str) -> list[str]:
    """Imports in `source`, a file of `place`, that the layer table forbids."""
    wrong = []
    for module, late in imports(source):
        target = module.partition(".")[2].split(".")[0]
        if target == "__version__":
            continue
        if late and place != "cli":
            wrong.append(f"{place} imports {module} inside a function")
        same_room = place == target or RANK[place] == RANK.get(target) == 0
        if not same_room and RANK.get(target, len(RANKS)) >= RANK[place]:
            wrong.append(f"{place} imports {module}")
    return wrong


def test_every_import_points_down() -> None:
    """A module that reaches up or sideways ties rooms together that must be read apart."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        found += violations(place, path.read_text(encoding="utf-8")) if place != "__init__" else []
    assert found == []


def test_a_planted_import_is_caught() -> None:
    """The layer test itself must be able to fail."""
    assert violations("ops", "from puna.model import cache")
    assert violations("eval", "import puna.serve")
    assert violations("ops", "from puna import load")
    assert violations("ops", "import puna")
    assert violations("train", "async def f():\n    from puna.data import loader")
    assert violations("train", "def f():\n    from puna.data import loader")
    assert not violations("train", "from puna.data.loader import Batch")


def closure(module: str, seen: dict[Path, int]) -> dict[Path, int]:
    """Every file of ours that importing `module` reads, with its lines."""
    path = find(module)
    if path is not None and path not in seen:
        source = path.read_text(encoding="utf-8")
        seen[path] = source.count("\n")
        for inner, _ in imports(source):
            closure(inner, seen)
    return seen


def test_pretrain_stays_readable() -> None:
    """What one has to read to follow a pretraining run does not grow unnoticed."""
    files = closure("puna.recipes.pretrain", {})
    assert len(files) <= CLOSURE_FILES
    assert sum(files.values()) <= CLOSURE_LINES
