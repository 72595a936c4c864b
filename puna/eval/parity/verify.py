"""`puna verify A --against B`: do two models, of whatever formats, say the same? One is in memory at a time."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from puna.checkpoint.adapter import CONFIG as ADAPTER
from puna.checkpoint.adapter import base_of, embedding_rows, tokenizer_of
from puna.checkpoint.registry import find_model, find_written, open_file, open_model
from puna.checkpoint.stored import Stored
from puna.errors import CheckpointError, UsageError
from puna.eval.parity.budget import Budget, budget_for, logit_rows, perplexity_row
from puna.eval.parity.material import PROMPTS, TEXT
from puna.eval.parity.observe import Observed, apart, observe, same_answers
from puna.eval.parity.rows import Row, config_row, stops_row, template_row, tokenizer_row, vocabularies_apart
from puna.eval.parity.weights import compare_weights, merged_row, weights_row
from puna.infer.llama import load
from puna.integrity import check
from puna.log import log
from puna.tokenizer.tokenizer import Tokenizer


class Side(NamedTuple):
    """One of two models: opened, not loaded. `stored` is its base if it is an adapter."""

    name: str
    found: Path
    stored: Stored
    tokenizer: Tokenizer
    adapter: bool

    def told(self) -> dict[str, str]:
        kind = f"adapter on {self.stored.path}" if self.adapter else self.stored.format
        return {"name": self.name, "path": str(self.found), "format": kind, "storage": self.stored.storage}


def verify(
    a: str | Path, *, against: str | Path | None = None, prompts: Sequence[str] = PROMPTS, text: str = TEXT,
    budget: float | None = None, max_tokens: int = 32, dtype: str = "fp32", device: str = "auto",
) -> dict[str, Any]:  # fmt: skip
    """Compare two models in everything that conversions, merges and exports get wrong; one, with its hashes.

    Args:
        a, against: whatever `puna.load` takes; `a` is the reference. Without `against`, `a` is whatever puna wrote.
        prompts: asked by each model's own template; text to continue where it has none.
        text: for the perplexities.
        budget: the largest difference of a logit that is allowed; by default it depends on what is compared.

    Returns:
        {"ok", "a", "b", "budget", "rows": [{"name", "ok", "told"}], "measured"}. `ok` of a row is None where it
        decides nothing. Without `against`: {"ok", "rows": [{"path", "files", "bytes", "by", "wrong"}]}.

    Raises:
        CheckpointError: one of the two cannot be read, or their ids mean nothing to one another.
        UsageError: a budget that nothing can be within.
    """
    if against is None:
        found = check(find_written(a), open_file)
        return {"ok": all(checked.ok for checked in found), "rows": [checked._asdict() for checked in found]}
    if budget is not None and not budget >= 0:
        raise UsageError(f"{budget:g} is no difference that is allowed", where="--budget", fix="--budget 0, or more")
    sides = (_open(a), _open(against))
    one, two = sides
    if vocabularies_apart(one.tokenizer, two.tokenizer):
        sizes = " and ".join(f"{side.tokenizer.vocab_size:,} ids" for side in sides)
        raise CheckpointError(
            f"cannot be compared with {two.found}: no string has the same ids ({sizes})", where=one.found,
            cause="models of two families", fix="puna eval MODEL --text FILE of each: bits per byte compare",
        )  # fmt: skip
    rows = [
        config_row(one.stored.config, two.stored.config),
        tokenizer_row(one.tokenizer, two.tokenizer),
        template_row(one.tokenizer, two.tokenizer),
        stops_row(_stops(one), _stops(two), one.tokenizer),
    ]
    log.info("comparing %s with %s", one.found, two.found)
    weights, storages, gap = _weights(one, two)
    options = {"max_tokens": max_tokens, "text": text, "limit": min(s.stored.config.max_seq_len for s in sides)}
    first = observe(load(one.found, dtype, device), prompts, **options)
    second = observe(load(two.found, dtype, device), prompts, **options, rows=first.rows)
    found = apart(first, second)
    allowed = budget_for(storages, gap, dtype)
    if budget is not None:
        allowed = Budget("logits, as asked", logits=budget)
    rows += [*weights, *logit_rows(found, allowed, one.tokenizer.decode([found.where[2]], special=True))]
    bits, perplexities = (first.bits_per_byte, second.bits_per_byte), (first.perplexity, second.perplexity)
    rows += [perplexity_row(perplexities, bits, allowed), _answers_row(first, second, one, two, allowed)]
    measured = {**found._asdict(), "bits_per_byte": bits, "perplexity": perplexities}
    return {
        "ok": all(row.ok is not False for row in rows),
        "a": one.told(), "b": two.told(), "budget": allowed._asdict(),
        "rows": [row._asdict() for row in rows],
        "measured": {**measured, "same_answers": sum(same_answers(first, second)), "prompts": len(prompts)},
    }  # fmt: skip


def _open(name: str | Path) -> Side:
    found = find_model(name)
    adapter = (found / ADAPTER).exists()
    stored = open_model(base_of(found) if adapter else found)
    rows = embedding_rows(found) if adapter else None
    if rows is not None:  # of tokens that were added with the adapter
        stored = replace(stored, config=stored.config.model_copy(update={"vocab_size": rows}))
    return Side(str(name), found, stored, tokenizer_of(found, stored), adapter)


def _stops(side: Side) -> list[int]:
    return [*side.tokenizer.stop_ids, *side.stored.stop_ids]


def _weights(one: Side, two: Side) -> tuple[list[Row], tuple[str, str], float | None]:
    """The row about the weights, what the budget takes them to be stored in, and how far they are apart, if known."""
    if one.adapter and two.adapter:
        return [], ("F32", "F32"), None
    if one.adapter or two.adapter:  # an adapter is added in fp32, and what is left of that the merged one decides
        adapted, plain = (one, two) if one.adapter else (two, one)
        row = merged_row(load(adapted.found, "fp32", "cpu").model, plain.stored.weights)
        return [row], ("F32", plain.stored.storage), None
    found, storages = compare_weights(one.stored, two.stored), (one.stored.storage, two.stored.storage)
    return [weights_row(found, storages)], storages, found.worst


def _answers_row(first: Observed, second: Observed, one: Side, two: Side, budget: Budget) -> Row:
    """Greedy answers, and where the first one that differs does."""
    same = same_answers(first, second)
    told = f"{sum(same)} of {len(same)} answers alike"
    if not all(same):
        number = same.index(False)
        a, b = first.answers[number], second.answers[number]
        place = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        ends = (t.tokenizer.decode(ids[place : place + 1], special=True) for t, ids in ((one, a), (two, b)))
        told += "; prompt {}, token {}: A {!r}, B {!r}".format(number + 1, place, *ends)
        if first.prompts[number] != second.prompts[number]:
            told += ", asked with other ids"
    return Row("greedy", all(same) if budget.answers else None, told)
