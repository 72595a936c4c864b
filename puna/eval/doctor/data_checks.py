"""Does the model read, and is it trained on, what one thinks? All exact: the measure is how much is wrong."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from puna.data.loader import TokenLoader
from puna.eval.doctor.case import Case
from puna.ops.cross_entropy import IGNORE
from puna.tokenizer.chat.format import Encoded

Parts = dict[str, float]
"""What was compared -> the difference."""


def round_trip(case: Case) -> Parts:
    """Texts that do not come back from their ids, and ids beyond the embedding."""
    tokenizer = case.tokenizer
    lost = [text for text in case.texts if tokenizer.decode(tokenizer.encode(text)) != text]
    vocab = case.model.config.vocab_size
    return {"texts that came back changed": len(lost), "ids beyond the embedding": sum(
        not 0 <= i < vocab for row in case.rows for i in row.ids
    )}  # fmt: skip


def control(case: Case) -> Parts:
    """Control tokens that someone can type."""
    special = case.tokenizer.special_tokens
    made = [name for name in special if set(case.tokenizer.encode(f"a{name}b")) & set(special.values())]
    return {"control strings that became control ids": len(made)}


def bos(case: Case) -> Parts:
    """Rows that begin with BOS twice, and a raw prompt that does not begin as the tokenizer's config says."""
    begin = case.tokenizer.bos_id
    twice = sum(row.ids[:2] == [begin, begin] for row in case.rows)
    raw = case.source.encode(case.texts[0])
    expected = [begin] * case.tokenizer.adds_bos + case.tokenizer.encode(case.texts[0])
    return {"rows with BOS twice": twice, "raw prompts that begin otherwise": raw != expected}


def mask(case: Case) -> Parts:
    """The trained stretches against the assistant's messages, word for word, each with a control token at its end."""
    wrong, endless = 0, 0
    special = set(case.tokenizer.special_tokens.values())
    for (_, messages, *_), (ids, trained) in zip(case.conversations, _encoded(case), strict=True):
        said = [m for m in messages if m["role"] == "assistant" and m.get("train", True)]
        stretches = [ids[start:end] for start, end in stretches_of(trained)]
        endless += sum(stretch[-1] not in special for stretch in stretches)
        learned = [case.tokenizer.decode(stretch).strip() for stretch in stretches]
        wrong += len(learned) != len(said) or not all(map(_says, learned, said))
    return {"rows that train other words": wrong, "answers without a trained end": endless}


def _says(learned: str, message: dict[str, Any]) -> bool:
    """Whether what is trained is the message's text, or names the tools it calls."""
    if calls := message.get("tool_calls"):
        return all(call["function"]["name"] in learned for call in calls)
    return learned == message["content"].strip()


def stop(case: Case) -> Parts:
    """Trained ends at which generation would go on."""
    ends = {ids[end - 1] for ids, trained in _encoded(case) for _, end in stretches_of(trained)}
    return {"kinds of end that do not stop generation": len(ends - set(case.llama.stop_ids))}


def prompt(case: Case) -> Parts:
    """The ids generation starts from against those that stood before the answer in training."""
    assert case.chat is not None
    wrong = 0
    for (_, messages, tools, *_), (ids, trained) in zip(case.conversations, _encoded(case), strict=True):
        starts = [start for start, _ in stretches_of(trained)]
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("train", True)]
        for start, answer in zip(starts, answers, strict=False):
            wrong += case.chat.prompt(messages[:answer], tools) != ids[:start]
    return {"answers asked for in another way": wrong}


def labels(case: Case) -> Parts:
    """Every label is the id that comes next where it is trained; every text begins at position 0; n counts them."""
    loader = case.packed()
    wrong, moved, counted = 0, 0, 0
    for members in loader.packs:
        batch = loader.batch([members])
        assert batch.positions is not None
        expected, places = [], []
        for ids, trained in (case.windows[i] for i in members):
            expected += [i if t else IGNORE for (i, t) in zip(ids[1:], trained[1:], strict=True)] + [IGNORE]
            places += range(len(ids))
        expected += [IGNORE] * (loader.seq_len - len(expected))
        wrong += sum(a != b for a, b in zip(batch.labels[0].tolist(), expected, strict=True))
        moved += batch.positions[0, : len(places)].tolist() != places
        counted += batch.n != sum(label != IGNORE for label in expected)
    windows = case.batches()
    if isinstance(windows, TokenLoader):
        batch = next(windows)
        wrong += int((batch.labels[:, :-1] != batch.tokens[:, 1:]).sum())
        counted += batch.n != batch.tokens.numel()
    return {"wrong labels": wrong, "rows whose positions go on": moved, "batches with a wrong n": counted}


def stretches_of(trained: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """(start, end) of each run of trained ids."""
    borders = [i for i, (a, b) in enumerate(pairwise([False, *trained, False])) if a != b]
    yield from zip(borders[::2], borders[1::2], strict=True)


def _encoded(case: Case) -> list[Encoded]:
    assert case.chat is not None
    return [case.chat.encode(c.messages, tools=c.tools) for c in case.conversations]
