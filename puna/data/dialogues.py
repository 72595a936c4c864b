"""Small talk that comes as a Python package, read as files and never imported."""

from collections.abc import Iterator
from pathlib import Path

from puna.config import nearest, read_yaml
from puna.errors import DataError, UsageError
from puna.packages import Package

Dialogue = tuple[str, list[str]]
"""Where it stands, and what is said in turns, the user first."""

DIALOGUES = {"chatterbot": Package("chatterbot-corpus==1.3.3", "chatterbot_corpus", "small talk, 0.2 MB of text, BSD")}
_LONG = {"coding.yml", "tech_support.yml", "trivia.yml"}  # programs, tickets and quiz answers: no conversation


def read_dialogues(name: str) -> Iterator[Dialogue]:
    """The English dialogues of a package in DIALOGUES with at least one answer; an answer follows every question.

    Raises:
        UsageError: unknown name. DataError: not installed, or without its dialogues.
    """
    if name not in DIALOGUES:
        raise UsageError(f"no dialogues `{name}`" + nearest(name, list(DIALOGUES)), fix=", ".join(DIALOGUES))
    folder = DIALOGUES[name].require() / "data" / "english"
    files = [f for f in sorted(folder.glob("*.yml")) if f.name not in _LONG]
    if not files:
        raise DataError("the package holds no dialogues here", where=folder, cause="another version")
    for file in files:
        yield from _read(file)


def _read(file: Path) -> Iterator[Dialogue]:
    try:
        dialogues = read_yaml(file)["conversations"]
    except (UsageError, KeyError) as error:
        raise DataError(f"no dialogues in this file: {error}", where=file, cause="another version") from None
    for number, turns in enumerate(dialogues, 1):
        said = [str(turn).strip() for turn in turns]
        if len(said) % 2:
            said.pop()  # a question without an answer
        if said and all(said):
            yield f"{file.name}:{number}", said
