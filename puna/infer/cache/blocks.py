"""Who holds which block of the cache, and which ids each block is the memory of. No tensors.

A full block is known by the hash of its ids and of everything before them, so equal beginnings find each other; it is
never written again and may have several users. A block that is not full has one user; others copy what they share.
Blocks that nobody uses keep their content until the room is needed, least recently used first.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

from puna.ops.paged_attention import BLOCK

_TRIED = 8  # blocks looked into for a common beginning: those that came last


@dataclass
class _Content:
    before: bytes
    """The key of everything before this block."""
    ids: list[int] = field(default_factory=list)
    key: bytes | None = None
    """Its own, once it is full and the first of its content."""


class Beginning(NamedTuple):
    """A block whose first `length` ids are the ones looked for."""

    block: int
    length: int
    ready: bool
    """Whether they are computed, rather than in the step that is being planned."""


def key_of(before: bytes, ids: Sequence[int]) -> bytes:
    """The name of `ids` after what `before` names; equal names are equal texts."""
    return blake2b(before + array("q", ids).tobytes(), digest_size=16).digest()


class Blocks:
    """`count` blocks, all free."""

    def __init__(self, count: int):
        self.count = count
        self._free = list(range(count))[::-1]
        self._users = [0] * count
        self._content: dict[int, _Content] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._full: dict[bytes, int] = {}
        self._begun: dict[tuple[bytes, int], list[int]] = {}
        self._planned: dict[int, int] = {}

    @property
    def available(self) -> int:
        """Blocks that `take` can give."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that have a user."""
        return self.count - self.available

    def take(self) -> int:
        """A block for one user, its content forgotten. There has to be one available."""
        if not self._free:
            oldest, _ = self._idle.popitem(last=False)
            self._forget(oldest)
        block = self._free.pop()
        self._users[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more user."""
        self._idle.pop(block, None)
        self._users[block] += 1

    def give(self, block: int) -> None:
        """One user less; without any the content stays until the room is needed."""
        self._users[block] -= 1
        if self._users[block] == 0:
            if block in self._content:
                self._idle[block] = None
            else:
                self._free.append(block)

    def write(self, block: int, before: bytes, ids: Sequence[int]) -> bytes | None:
        """The step being planned adds `ids` to a block; its key once it is full."""
        content = self._content.get(block)
        if content is None:
            content = self._content[block] = _Content(before)
            self._begun.setdefault((before, ids[0]), []).append(block)
        self._planned.setdefault(block, len(content.ids))
        content.ids.extend(ids)
        if len(content.ids) < BLOCK:
            return None
        key = key_of(before, content.ids)
        if self._full.setdefault(key, block) == block:
            content.key = key
        return key

    def computed(self) -> None:
        """What was planned is in the cache now."""
        self._planned.clear()

    def find(self, key: bytes) -> int | None:
        """The full block of this key. It may be in the step being planned: a step stores before it looks."""
        return self._full.get(key)

    def beginning(self, before: bytes, ids: Sequence[int]) -> Beginning | None:
        """The block that begins with the most of `ids`, for copying."""
        best: Beginning | None = None
        for block in self._begun.get((before, ids[0]), [])[-_TRIED:] if ids else []:
            held = self._content[block].ids
            shorter = min(len(held), len(ids))
            count = next((i for i in range(shorter) if held[i] != ids[i]), shorter)
            if best is None or count > best.length:
                best = Beginning(block, count, count <= self._planned.get(block, BLOCK))
        return best

    def forget(self) -> None:
        """Drop what nobody uses. What is still used stays findable: whoever asks anew begins with another first key."""
        self._planned.clear()
        while self._idle:
            self._forget(self._idle.popitem(last=False)[0])

    def _forget(self, block: int) -> None:
        content = self._content.pop(block)
        if content.key is not None:
            del self._full[content.key]
        begun = self._begun[content.before, content.ids[0]]
        begun.remove(block)
        if not begun:
            del self._begun[content.before, content.ids[0]]
        self._free.append(block)
