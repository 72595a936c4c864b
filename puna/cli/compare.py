"""`puna verify A --against B`: the table, and how it ends."""

from pathlib import Path
from typing import Any

from puna.cli.output import print_json, wrapped
from puna.errors import DataError

_MARKS = {True: "ok", False: "BAD", None: "--"}


def compare(a: str, b: str, as_json: bool, prompts: Path | None, text: Path | None, **options: Any) -> bool:
    """Compare two models and print what was found; whether they are within the budget."""
    from puna.eval.parity.verify import verify

    if prompts is not None:
        options["prompts"] = [line for line in read_text(prompts).splitlines() if line.strip()]
    if text is not None:
        options["text"] = read_text(text)
    found = verify(a, against=b, **options)
    print_json(found) if as_json else print("\n".join(_table(found)))
    return found["ok"]


def _table(found: dict[str, Any]) -> list[str]:
    lines = []
    for side in ("a", "b"):
        told = found[side]
        lines += wrapped(f"{side.upper()}  ", f"{told['name']}  ({told['format']}, {told['storage']})")
    lines.append("")
    width = max(len(row["name"]) for row in found["rows"])
    for row in found["rows"]:
        lines += wrapped(f"{_MARKS[row['ok']]:3}  {row['name']:{width}}  ", row["told"])
    bad = [row["name"] for row in found["rows"] if row["ok"] is False]
    verdict = f"they differ: {', '.join(bad)}; beyond" if bad else "within"
    lines += ["", *wrapped("", f"{verdict} the budget for {found['budget']['kind']}")]
    unjudged = any(row["ok"] is None for row in found["rows"])
    return [*lines, *[f"{_MARKS[None]}: worth knowing, not judged"] * unjudged]


def read_text(path: Path) -> str:
    """A UTF-8 text that a user named.

    Raises:
        DataError: no such file, another encoding, or nothing in it.
    """
    from puna.config import nearest_path

    path = path.expanduser()
    if not path.is_file():
        raise DataError("no such file" + nearest_path(path), where=path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read as UTF-8 text: {error}", where=path) from None
    if not text.strip():
        raise DataError("is empty", where=path)
    return text
