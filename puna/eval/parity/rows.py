"""What two models say of themselves, before anything is computed: config, tokenizer, template, stop ids."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from puna.errors import DataError
from puna.eval.parity.material import CONVERSATIONS, STRINGS
from puna.model.config import ModelConfig
from puna.tokenizer.chat.format import ChatFormat, has_template
from puna.tokenizer.tokenizer import Tokenizer

_HARMLESS = ("max_seq_len", "tie_embeddings")
"""Values that may differ between models that say the same: a format may not know them, or store the head twice."""


class Row(NamedTuple):
    """One thing that was compared. `ok` is None for what is worth knowing and decides nothing."""

    name: str
    ok: bool | None
    told: str


def config_row(a: ModelConfig, b: ModelConfig) -> Row:
    """Every value that differs, by its name."""
    one, two = a.model_dump(), b.model_dump()
    different = [name for name in one if one[name] != two[name]]
    told = "; ".join(f"{name} {_short(one[name], two[name])}" for name in different)
    return Row("config", None if different and set(different) <= {*_HARMLESS} else not different, told or "the same")


def tokenizer_row(a: Tokenizer, b: Tokenizer) -> Row:
    """Ids of strings that differ once a vocabulary or a rule does; sizes, BOS and EOS, control tokens."""
    pairs = list(zip(a.encode_batch(STRINGS), b.encode_batch(STRINGS), strict=True))
    different = [i for i, (one, two) in enumerate(pairs) if one != two]
    told = [f"{len(pairs) - len(different)} of {len(pairs)} strings alike"]
    if different:
        first = different[0]
        told.append(f"{STRINGS[first]!r}: A {_some(pairs[first][0])}, B {_some(pairs[first][1])}")
    sizes, ends = (a.vocab_size, b.vocab_size), (_ends(a), _ends(b))
    told.append(f"{sizes[0]:,} ids" if sizes[0] == sizes[1] else f"A {sizes[0]:,} ids, B {sizes[1]:,}")
    told.append(f"BOS {ends[0][0]}, EOS {ends[0][1]}" if ends[0] == ends[1] else f"BOS, EOS: A {ends[0]}, B {ends[1]}")
    moved = [n for n in a.special_tokens.keys() & b.special_tokens.keys() if a.special_tokens[n] != b.special_tokens[n]]
    told += [f"{min(moved)} is A {a.special_tokens[min(moved)]}, B {b.special_tokens[min(moved)]}"] if moved else []
    if a.adds_bos != b.adds_bos:
        told.append(f"BOS before a prompt: {_yes(a.adds_bos)} in A, {_yes(b.adds_bos)} in B")
    same = not different and not moved and ends[0] == ends[1] and a.adds_bos == b.adds_bos
    listed = a.special_tokens.keys() ^ b.special_tokens.keys()
    told += [f"control tokens of one alone: {', '.join(sorted(listed)[:4])}"] if listed else []
    return Row("tokenizer", same if not same or (sizes[0] == sizes[1] and not listed) else None, ", ".join(told))


def _ends(tokenizer: Tokenizer) -> tuple[int | None, int | None]:
    return tokenizer.named_id("bos_token"), tokenizer.named_id("eos_token")


def vocabularies_apart(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether two tokenizers agree on nothing: ids of one mean nothing to the other's model."""
    pairs = zip(a.encode_batch(STRINGS), b.encode_batch(STRINGS), strict=True)
    return a.vocab_size != b.vocab_size and not any(one == two for one, two in pairs if one)


def template_row(a: Tokenizer, b: Tokenizer) -> Row:
    """Three conversations by each template: the ids that a model would be asked with."""
    if not (has_template(a) and has_template(b)):
        only = "A" if has_template(a) else "B" if has_template(b) else ""
        return Row("template", None if not only else False, f"only {only} has one" if only else "neither has one")
    told = []
    for number, messages in enumerate(CONVERSATIONS, 1):
        one, two = (_rendered(tokenizer, messages) for tokenizer in (a, b))
        if one != two:
            told.append(f"conversation {number}: {_first_difference(one, two, a, b)}")
    alike = f"{len(CONVERSATIONS) - len(told)} of {len(CONVERSATIONS)} conversations alike"
    twice = [f"{n} begins with BOS twice" for n, t in (("A", a), ("B", b)) if _doubled(t)]
    return Row("template", not told and not twice, "; ".join([alike, *twice, *told[:1]]))


def stops_row(a: Sequence[int], b: Sequence[int], tokenizer: Tokenizer) -> Row:
    """The ids at which generation ends, whatever their order."""
    told = ", ".join(f"{i} {tokenizer.token(i)}" for i in sorted({*a} & {*b}))
    for name, only in (("A", {*a} - {*b}), ("B", {*b} - {*a})):
        told += "".join(f"; only {name}: {i} {tokenizer.token(i)}" for i in sorted(only))
    return Row("stops", {*a} == {*b}, told.removeprefix("; "))


def _rendered(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> list[int] | str:
    """The ids, or why there are none: a template may refuse a system message."""
    try:
        return ChatFormat(tokenizer).prompt(messages)
    except DataError as error:
        return error.what


def _first_difference(one: list[int] | str, two: list[int] | str, a: Tokenizer, b: Tokenizer) -> str:
    if isinstance(one, str) or isinstance(two, str):
        return f"A {one if isinstance(one, str) else 'has ids'}, B {two if isinstance(two, str) else 'has ids'}"
    place = next((i for i, (x, y) in enumerate(zip(one, two, strict=False)) if x != y), min(len(one), len(two)))
    shown = [repr(t.decode(ids[place : place + 1], special=True)) for t, ids in ((a, one), (b, two))]
    return f"token {place} is {shown[0]} in A, {shown[1]} in B"


def _doubled(tokenizer: Tokenizer) -> bool:
    ids = _rendered(tokenizer, CONVERSATIONS[0])
    return not isinstance(ids, str) and ids[:2] == [tokenizer.named_id("bos_token")] * 2


def _short(one: Any, two: Any) -> str:
    """`A 1e-05, B 1e-06`; of two sections what differs in them."""
    if isinstance(one, dict) and isinstance(two, dict):
        return ", ".join(f"{key} A {one[key]}, B {two[key]}" for key in one if one[key] != two[key])
    a, b = (f"factor {x['factor']}" if isinstance(x, dict) else x for x in (one, two))
    return f"A {a}, B {b}"


def _some(ids: list[int]) -> str:
    return f"{ids[:4]}".replace("]", ", ...]" if len(ids) > 4 else "]")


def _yes(value: bool) -> str:
    return "yes" if value else "no"
