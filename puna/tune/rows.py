"""Conversations as a tuning recipe reads them: which, by which template, and what of them is trained."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from puna.config import RecipeConfig
from puna.data.conversations import ChatSource, read_conversations
from puna.data.packing import encode_conversations
from puna.data.quality.config import SelectConfig
from puna.files import write_json
from puna.tokenizer.chat.format import ChatFormat, Encoded, Train
from puna.tokenizer.tokenizer import Tokenizer


class ChatRows(RecipeConfig):
    """The part of a recipe's config that says what is learned from."""

    data: ChatSource = ChatSource()
    valid: ChatSource = ChatSource()
    """Conversations to measure the loss on, if they lie apart; then valid_fraction takes none of `data`."""
    template: str | None = None
    """llama2, llama3, llama3.1, llama3.2, llama3.2-pythonic, llama3.3 or chatml; null takes the model's own."""
    date_string: str = "26 Jul 2024"
    """The day that templates of Llama 3.1 and later name: today's would make other ids of the same data every day."""
    variables: dict[str, Annotated[bool | str | list[str], Field(union_mode="left_to_right")]] = {}
    """What else the template asks for: `builtin_tools: [brave_search, code_interpreter]`, say, of Llama 3.1."""
    train_on: Train = "all"
    """all: every assistant message; last: the last one of each conversation; [assistant, user]: all of these roles
    (also system and tool), to learn how the others speak. A message with `train: false` never is."""
    seq_len: PositiveInt = 512
    """Ids in a packed row. Longer conversations are cut."""
    batch_size: PositiveInt = 4
    """Rows in a micro-batch, over all ranks."""
    valid_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Conversations held out (by hash) to measure the loss on."""


def encode(config: ChatRows, tokenizer: Tokenizer, source: ChatSource) -> tuple[Tokenizer, list[Encoded]]:
    """The tokenizer with the chat template in force, and every conversation of the source as ids and mask."""
    chat = ChatFormat(tokenizer, config.template, **template_variables(config))
    rows = encode_conversations(read_conversations(source), chat, config.seq_len, config.train_on)
    return tokenizer.with_template(chat.source), rows


def template_variables(config: ChatRows) -> dict[str, Any]:
    """What the chat template may ask for."""
    return {"date_string": config.date_string, **config.variables}


def write_selection(path: Path, source: ChatSource) -> None:
    """What `select` kept and dropped of the source, once, in `path`; nothing where it drops nothing.

    It reads the conversations again: the ids of an earlier run may have been found without reading any.
    """
    if source.select != SelectConfig() and not path.exists():
        report: dict[str, Any] = {}
        for _ in read_conversations(source, report):
            pass
        write_json(path, report)
