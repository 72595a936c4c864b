"""Questions that training and validation share: a loss on what was learned by heart says nothing."""

from collections.abc import Iterable, Sequence
from itertools import chain, islice, takewhile

import numpy as np

from puna.data.quality.near_duplicates import NearDuplicates, grams, signature
from puna.log import log
from puna.tokenizer.chat.format import Encoded

_ALIKE = 0.8
_SOME = 100
_MOST = 50_000  # five seconds at every start


def near_both(train: Iterable[Encoded], valid: Sequence[Encoded], threshold: float = _ALIKE) -> int:
    """How many rows of `valid` have a prompt of which `train` has one at least this alike (Jaccard of id triples).

    A prompt is what stands before the first trained id, of a raw text all of it; what all prompts of `valid` begin and
    end with is the template's, or if they are all one prompt, what it shares with some of `train`. Takes about 0.1 ms a
    row.
    """
    prompts, rest = [_prompt(row) for row in valid], map(_prompt, train)
    some = list(islice(rest, _SOME))
    several = prompts
    if len(set(map(tuple, prompts))) == 1:  # of `some` those that begin alike: raw texts have no template
        several = [prompts[0], *(prompt for prompt in some if prompt[:2] == prompts[0][:2])]
    start, end = _shared(several), _shared([prompt[::-1] for prompt in several])
    found = NearDuplicates(threshold)
    for prompt in prompts:
        if (own := _signature(prompt, start, end)) is not None:
            found.add(own)
    near = set[int]()
    for prompt in chain(some, rest) if found.count else ():
        if (own := _signature(prompt, start, end)) is not None:
            near |= {number for number, _ in found.all_near(own)}
    return len(near)


def tell_leaks(train: Iterable[Encoded], valid: Sequence[Encoded]) -> None:
    """Warn of rows of `valid` whose prompt is nearly one of `train`, of which the first 50,000 are looked at."""
    if count := near_both(islice(train, _MOST), valid):
        log.warning(
            "%s of %s held-out conversations ask nearly what training answers: their loss flatters"
            " (data.select.near_duplicates=0.8 keeps one of each)",
            f"{count:,}", f"{len(valid):,}",
        )  # fmt: skip


def _prompt(row: Encoded) -> list[int]:
    first = row.trained.index(True) if True in row.trained else len(row.ids)
    return row.ids[:first] if first > 1 else row.ids


def _shared(prompts: Sequence[list[int]]) -> int:
    """Ids that all begin with: those that the first and the last in order share."""
    low, high = (min(prompts), max(prompts)) if prompts else ([], [])
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(low, high, strict=False))))


def _signature(prompt: Sequence[int], start: int, end: int) -> np.ndarray | None:
    hashes = grams(np.array(prompt[start : max(start, len(prompt) - end)], dtype=np.uint64))
    return signature(hashes) if len(hashes) else None
