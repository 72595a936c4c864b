"""What a model learns to hold: one conversation, or one raw text."""

from typing import Any, NamedTuple


class Conversation(NamedTuple):
    """Messages, where they came from (`file:line`), and the tools the assistant may call."""

    where: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    source: str = ""
    """Which part of a mixture it belongs to."""
    text: str | None = None
    """Raw text instead of messages: every id of it is trained."""
