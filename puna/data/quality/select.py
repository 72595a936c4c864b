"""Conversations through the rules of `data.select`, lazily, with a report of what was dropped and why."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from puna.data.conversation import Conversation
from puna.data.quality.config import SelectConfig
from puna.data.quality.near_duplicates import NearDuplicates, grams, signature, word_ids
from puna.data.quality.rules import pieces, repetition, wrong_length
from puna.errors import DataError, UsageError

Scorer = Callable[[Conversation], float]
"""Higher is better: a reward model's score, or how hard a conversation is."""
_EXAMPLES = 10  # of each rule, in the report
_NO_SCORERS: Mapping[str, Scorer] = {}
_NO_SHARES: Mapping[str, float] = {}


def select(
    conversations: Iterable[Conversation],
    config: SelectConfig,
    scorers: Mapping[str, Scorer] = _NO_SCORERS,
    keep: Mapping[str, float] = _NO_SHARES,
) -> "Selection":
    """The conversations that no rule drops, in their order; a pure function of its arguments.

    Args:
        scorers: functions by name. With any, what passed the other rules is held in memory, since the best are known
            only in the end.
        keep: which share of these stays, 0 to 1, for each scorer; of equals the earlier ones.

    Raises:
        UsageError: a scorer without a share, or a share without a scorer.
    """
    if set(scorers) != set(keep) or not all(0 < share <= 1 for share in keep.values()):
        raise UsageError("scorers and shares do not match", fix='scorers={"reward": f}, keep={"reward": 0.5}')
    return Selection(conversations, config, scorers, keep)


class Selection:
    """What is kept, read once; `report` is whole when all of it was read."""

    def __init__(
        self,
        conversations: Iterable[Conversation],
        config: SelectConfig,
        scorers: Mapping[str, Scorer],
        keep: Mapping[str, float],
    ):
        self.config, self._scorers, self._keep = config, scorers, keep
        self._conversations = conversations
        self._places: dict[bytes, str] = {}
        self._near = NearDuplicates(config.near_duplicates) if config.near_duplicates else None
        self._near_places: list[str] = []
        self.report: dict[str, Any] = {"read": 0, "kept": 0, "dropped": {}, "examples": {}}

    def __iter__(self) -> Iterator[Conversation]:
        passed = self._passed()
        for conversation in self._best(list(passed)) if self._scorers else passed:
            self.report["kept"] += 1
            yield conversation

    def _passed(self) -> Iterator[Conversation]:
        for conversation in self._conversations:
            self.report["read"] += 1
            found = self._broken(conversation)
            if found is None:
                yield conversation
            else:
                self._drop(conversation, *found)

    def _broken(self, conversation: Conversation) -> tuple[str, str] | None:
        """(rule, why) of the first rule that drops it. Comparing comes last: what is dropped shadows nothing later."""
        config, (prompt, answer) = self.config, sides(conversation)
        if config.empty_answers and _says_nothing(conversation):
            return "empty_answers", "the assistant says nothing"
        for broken in wrong_length(prompt, answer, config):
            return broken
        if config.repetition and (why := repetition(answer, config.repetition)):
            return "repetition", why
        return self._alike(conversation.where, prompt if config.compare == "prompt" else f"{prompt}\n{answer}")

    def _alike(self, where: str, text: str) -> tuple[str, str] | None:
        if self.config.duplicates:
            digest = hashlib.blake2b(" ".join(text.casefold().split()).encode(), digest_size=16).digest()
            if first := self._places.get(digest):
                return "duplicates", f"like {first}"
            self._places[digest] = where
        if self._near is not None and len(hashes := grams(word_ids(pieces(text)))):
            own = signature(hashes)
            if found := self._near.find(own):
                return "near_duplicates", f"like {self._near_places[found[0]]} ({found[1]:.2f})"
            self._near.add(own)
            self._near_places.append(where)
        return None

    def _best(self, passed: list[Conversation]) -> Iterator[Conversation]:
        """Those that are among the best of every scorer, in their order."""
        out: dict[int, tuple[str, str]] = {}
        for name, scorer in self._scorers.items():
            scores = [_finite(scorer(c), name, c) for c in passed]
            ranked = sorted(range(len(passed)), key=lambda i, scores=scores: (-scores[i], i))
            for i in ranked[math.ceil(self._keep[name] * len(passed)) :]:
                out.setdefault(i, (name, f"{scores[i]:.4g}"))
        for i, conversation in enumerate(passed):
            if i in out:
                self._drop(conversation, *out[i])
            else:
                yield conversation

    def _drop(self, conversation: Conversation, rule: str, why: str) -> None:
        dropped, examples = self.report["dropped"], self.report["examples"]
        dropped[rule] = dropped.get(rule, 0) + 1
        if len(examples.setdefault(rule, [])) < _EXAMPLES:
            examples[rule].append({"where": conversation.where, "why": why})


def told(report: Mapping[str, Any]) -> str:
    """`940 of 999 conversations kept; dropped: 30 near_duplicates, 29 repetition`."""
    dropped = ", ".join(f"{count:,} {rule}" for rule, count in report["dropped"].items())
    return f"{report['kept']:,} of {report['read']:,} conversations kept" + (f"; dropped: {dropped}" if dropped else "")


def sides(conversation: Conversation) -> tuple[str, str]:
    """All that is not the assistant's but the system message, and all that is; a raw text is both."""
    if conversation.text is not None:
        return conversation.text, conversation.text
    said: dict[bool, list[str]] = {True: [], False: []}
    for message in conversation.messages:
        if message["role"] != "system":
            said[message["role"] == "assistant"].append(str(message["content"]))
    return "\n".join(said[False]), "\n".join(said[True])


def _says_nothing(conversation: Conversation) -> bool:
    if conversation.text is not None:
        return not conversation.text.strip()
    answers = [m for m in conversation.messages if m["role"] == "assistant"]
    return not all(str(m["content"]).strip() or m.get("tool_calls") for m in answers) or not answers


def _finite(score: float, name: str, conversation: Conversation) -> float:
    if not math.isfinite(score):
        raise DataError(f"the scorer {name} gives {score}", where=conversation.where)
    return score
