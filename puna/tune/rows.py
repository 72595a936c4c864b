"""Conversations as a tuning recipe reads them: which, by which template, and what of them is trained."""

import math
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, PositiveInt

from puna.config import RecipeConfig, UserPath
from puna.data.conversations import ChatSource, given
from puna.data.encode import Encoding, TooLong
from puna.data.leaks import tell_leaks
from puna.data.packing import PackedLoader
from puna.data.packs import pack_rows
from puna.data.row_cache import find_rows
from puna.data.rows import Rows, split_rows
from puna.dist.collectives import from_first
from puna.files import write_json
from puna.packages import cache
from puna.tokenizer.chat.format import ChatFormat, Train
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
    seq_len: int = Field(default=512, ge=2)
    """Ids in a row. Higher: fewer conversations are too long; costs memory, and time in attention."""
    too_long: TooLong = "cut"
    """Conversations of more than seq_len ids: cut (an end may be lost), drop, or error. All are counted and told."""
    packed: bool = True
    """Several conversations to a row, none seeing another. false: one each, padded to the longest of its batch: the
    same gradients for a batch of the same conversations, and several times slower where they are short."""
    batch_size: PositiveInt = 4
    """Rows in a micro-batch, over all ranks. Higher: faster; costs memory."""
    valid_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Conversations held out (by hash) to measure the loss on. Higher: a surer loss; costs training data."""
    data_cache: UserPath | None = None
    """Where more than a million encoded ids are kept for the next run; null: puna/packed in the user's cache."""


def encode(
    config: ChatRows, tokenizer: Tokenizer, source: ChatSource, workers: int | None = None
) -> tuple[Tokenizer, Rows]:
    """The tokenizer with the chat template in force, and every conversation of the source as ids and mask.

    Args:
        workers: processes that encode; by default as many as cores.
    """
    chat = ChatFormat(tokenizer, config.template, **template_variables(config))
    encoding = Encoding(chat, config.seq_len, config.train_on, config.too_long)
    find = partial(find_rows, source, encoding, config.data_cache or cache("packed"), workers)
    rows: list[Rows] = []
    from_first(lambda: rows.append(find()))
    if not rows:  # another rank: what the first one made is there to be found
        rows.append(find())
    return tokenizer.with_template(chat.source), rows[0]


def read_rows(config: ChatRows, tokenizer: Tokenizer, selection: Path) -> tuple[Tokenizer, Rows, Rows]:
    """The tokenizer with the chat template in force, the rows to train on and those held out.

    What was dropped is written to `selection`; what training and the held-out rows have in common is told.
    """
    tokenizer, rows = encode(config, tokenizer, config.data)
    apart = encode(config, tokenizer, config.valid)[1] if given(config.valid) else Rows.of([])
    train, valid = split_rows(rows, 0 if apart else config.valid_fraction)
    valid = apart or valid
    if rows.selection:
        from_first(write_json, selection, rows.selection)
    from_first(tell_leaks, train, valid)
    return tokenizer, train, valid


def packed_as(config: ChatRows, rows: Rows, share: float) -> dict[str, Any]:
    """What would be read of the rows, in numbers; packs, and how full they are, are of those not held out.

    Args:
        share: held out.
    """
    train, held_out = split_rows(rows, share)
    packs, ids = pack_rows(train, config.seq_len), int(rows.lengths.sum())
    names, counts = rows.names, np.bincount(rows.entries["source"], minlength=len(rows.names)).tolist()
    return {
        "conversations": rows.counts["whole"] + rows.counts["cut"] + rows.counts["dropped"],
        "cut": rows.counts["cut"], "dropped": rows.counts["dropped"],
        "rows": len(rows), "ids": ids, "trained": rows.counts["trained"] / ids, "held_out": len(held_out),
        "packs": len(packs), "fill": int(train.lengths.sum()) / max(1, len(packs) * config.seq_len),
        "sources": {name: count for name, count in zip(names, counts, strict=True) if name},
        "folder": str(rows.folder) if rows.folder else None, "fingerprint": rows.fingerprint,
    }  # fmt: skip


def steps_of(epochs: float, batches: PackedLoader, accumulate: int) -> int:
    """Optimizer steps that go through the conversations `epochs` times."""
    return max(1, math.ceil(epochs * batches.drawn / (batches.batch_size * accumulate)))


def template_variables(config: ChatRows) -> dict[str, Any]:
    """What the chat template may ask for."""
    return {"date_string": config.date_string, **config.variables}
