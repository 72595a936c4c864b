"""What a tokenizer.json has to be before the engine sees it: the engine aborts, hangs or lies on hostile ones.

`tokenizers` believes every number, runs any regular expression, and panics where one backtracks too long.
"""

import contextlib
import gc
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic_core import from_json

from puna.errors import DataError

# The largest published tokenizer has 33 MB, 580,000 merges, 262,144 ids; 1.7 million commas.
MAX_BYTES, MAX_MERGES, MAX_IDS, _MAX_ITEMS = 48 << 20, 1_000_000, 1 << 20, 2_000_000
_MAX_GROWTH = 8  # of a text by its normalizer; a space becomes three bytes
_MAX_AFFIX, _MAX_WRITTEN, _MAX_PATTERN = 16, 64, 200  # characters, ids of a post-processor, characters
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LOWER, _UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LLAMA4 = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_CPP = r"[\p{P}\$\+<=>\^\~\|]+"
KNOWN_PATTERNS = {LLAMA_CPP, LLAMA3, LLAMA3.replace("{1,3}", ""), GPT2, GPT2 + r"|\s+", _LLAMA4}
"""Published splits that were tried on a million of everything: Llama 3, Qwen 2, GPT-2, Llama 4."""
_ATOM = r"(?:\\[pP]\{\^?\w+\}|\\.|\[\^?(?:\\[pP]\{\w+\}|\\.|[^\]\[\\&])+\]|[^\\\[\](){}|*+?^$])"
_BRANCH = rf"(?:{_ATOM}\??)?(?:{_ATOM}(?:\?|\{{\d(?:,\d)?\}})?)?{_ATOM}{{0,16}}(?:{_ATOM}[*+])?"
_LINEAR = re.compile(rf"(?:{_BRANCH})(?:\|(?:{_BRANCH}))*")
"""Patterns that hardly backtrack: in each branch what repeats without bound stands last, and before it one part may be
there or not, one repeat up to nine times."""


def parse(raw: bytes, where: object) -> dict[str, Any]:
    """tokenizer.json as JSON, checked.

    Raises:
        DataError: not a tokenizer, or one that nobody made in good faith.
    """
    if len(raw) > MAX_BYTES:
        raise DataError(f"tokenizer.json has {len(raw) / 1e6:,.0f} MB", where=where, cause="not a tokenizer")
    try:
        if raw.count(b",") > _MAX_ITEMS:  # before it takes a hundred bytes of memory for each of its own
            raise ValueError("too many items")
        with _no_collection():
            parsed = from_json(raw, cache_strings=False)  # a third of the time of the standard library's
            _check(parsed)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"tokenizer.json cannot be read: {error!r}", where=where, cause="damaged or hostile") from None
    return parsed


def patterns(step: Any) -> list[str]:
    """Every regular expression inside a step of a tokenizer.json."""
    if isinstance(step, Mapping):
        own = [step["Regex"]] if isinstance(step.get("Regex"), str) else []
        return own + [p for inner in step.values() for p in patterns(inner)]
    return [p for inner in step for p in patterns(inner)] if isinstance(step, list) else []


def leaves(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps inside a step of a tokenizer.json, however deep its sequences lie in one another."""
    if not step:
        return []
    if step["type"] != "Sequence":
        return [step]
    parts = [part for name in ("normalizers", "pretokenizers", "processors") for part in step.get(name, [])]
    return [leaf for part in parts for leaf in leaves(part)]


@contextlib.contextmanager
def engine_errors(what: str, where: object) -> Iterator[None]:
    """Turn whatever the engine raises into a DataError; its panics do not derive from Exception."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{what}: {str(error)[:300]}", where=where) from None


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection in the block: a hundred thousand merges set off dozens, which find nothing."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _check(parsed: dict[str, Any]) -> None:
    model, added = parsed["model"], parsed.setdefault("added_tokens", [])
    vocab = model["vocab"]
    if model.setdefault("type", "BPE") == "BPE":
        if len(model["merges"]) > MAX_MERGES:
            raise ValueError(f"{len(model['merges']):,} merges")
        if model.get("dropout"):
            raise ValueError("dropout in the merges: one text would have many ids")
    ids = list(vocab.values()) if isinstance(vocab, Mapping) else list(range(len(vocab)))
    if len(set(ids)) != len(ids):
        raise ValueError("two tokens have one id")
    _check_added(added, vocab if isinstance(vocab, Mapping) else {}, set(ids))
    if any(type(i) is not int or not 0 <= i < MAX_IDS for i in [*ids, *(t["id"] for t in added)]):
        raise ValueError(f"an id that is not in 0..{MAX_IDS}")
    _check_steps(parsed)


def _check_added(added: Sequence[Any], vocab: Mapping[str, int], ids: set[int]) -> None:
    texts = [token["content"] for token in added]
    if len(set(texts)) != len(texts) or len({token["id"] for token in added}) != len(added):
        raise ValueError("two added tokens have one id or one text")
    for token in added:
        text, id = token["content"], token["id"]
        if not text or vocab.get(text, id) != id or (text not in vocab and id in ids):
            raise ValueError(f"the added token {text[:80]!r} has the id {id} of another")
        if token["special"] and text.replace(" ", "").isalnum():
            raise ValueError(f"the control token {text[:80]!r} is a word that any text may hold")


def _check_steps(parsed: Mapping[str, Any]) -> None:
    """What happens to a text around the model may take time and memory of the text's size only."""
    steps = [parsed.get(name) for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")]
    for pattern in patterns(steps):
        if pattern not in KNOWN_PATTERNS and (len(pattern) > _MAX_PATTERN or not _LINEAR.fullmatch(pattern)):
            raise ValueError(f"the pattern {pattern[:120]!r} may never end on some text")
    if _growth(parsed.get("normalizer")) > _MAX_GROWTH:
        raise ValueError("the normalizer makes a long text of a short one")
    if sum(map(_written, leaves(parsed.get("post_processor")))) > _MAX_WRITTEN:
        raise ValueError("the post-processor writes many ids around every text")
    affixes = [parsed["model"].get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix")]
    affixes += [step["prepend"] for step in leaves(parsed.get("normalizer")) if step["type"] == "Prepend"]
    if any(len(affix or "") > _MAX_AFFIX for affix in affixes):
        raise ValueError("something long is put before or after every text or word")


def _growth(normalizer: Mapping[str, Any] | None) -> int:
    replaced = [s for s in leaves(normalizer) if s["type"] == "Replace"]
    return math.prod(max(1, len(s["content"]) // len(s["pattern"].get("String") or "?")) for s in replaced)


def _written(processor: Mapping[str, Any]) -> int:
    """Pieces that a post-processor's templates are made of: ids, and the text itself."""
    pieces = [piece for template in ("single", "pair") for piece in processor.get(template, [])]
    named = [piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece]
    return len(pieces) + sum(len(processor["special_tokens"][name]["ids"]) for name in named)
