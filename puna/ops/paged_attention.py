"""Attention over a cache of blocks: a plain oracle, and rows of like size computed together. One signature.

Keys and values of a layer lie in a pool (blocks, K, BLOCK, D): those of position p of a text in slot p % BLOCK of block
p // BLOCK of its table. A step is one flat row of N tokens: pieces of several texts one after another, each continuing
what its table holds (Kwon et al. 2023, with prompts and single tokens in the same pass).
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from puna.ops.attention import attention, attention_eager
from puna.ops.flex_paged import compiled, flex_mask, flex_paged_attention, usable
from puna.ops.native.block import Tokens, attend
from puna.ops.native.library import native
from puna.ops.native.linear import takes

_FEW = 16  # tokens of a piece: a guess that is looked at, and not a prompt
BLOCK = 32  # tokens: 4 kB of bf16 keys of 64 a head, long enough to be read at full speed


class Piece(NamedTuple):
    """The tokens start .. start + length - 1 of a text, whose keys and values lie in the blocks of `table`."""

    start: int
    length: int
    table: list[int]


@dataclass(frozen=True)
class Group:
    """Pieces of about one size: B of them, padded to T queries and M blocks."""

    rows: Tensor
    """(B, T) places in the flat row; padding repeats a piece's last token."""
    real: Tensor | None
    """(B, T) what is not padding; None: all."""
    tables: Tensor
    """(B, M) blocks; padding is block 0, which the mask hides."""
    lengths: Tensor
    """(B,) tokens that the last query sees."""
    mask: Tensor | None
    """(B, 1, T, M * BLOCK) what a query sees; None: the pieces are whole beginnings, seen causally."""
    fixed: bool = False
    """Whether groups of just this size come again and again."""
    kept: dict[str, Any] = field(default_factory=dict)
    """What layers make of the above and share."""

    @property
    def positions(self) -> Tensor:
        """(B, T) of the queries."""
        return self.lengths[:, None] - 1 - (self.rows[:, -1:] - self.rows)


class Pieces:
    """Where the tokens of a step go, and what each sees: made once, used by every layer."""

    def __init__(self, pieces: list[Piece], device: torch.device):
        self.pieces = pieces
        self.blocks = torch.tensor([t[p // BLOCK] for s, n, t in pieces for p in range(s, s + n)], device=device)
        self.slots = torch.tensor([p % BLOCK for s, n, _ in pieces for p in range(s, s + n)], device=device)
        self.device, self.tokens = device, len(self.blocks)

    @cached_property
    def groups(self) -> list[Group]:
        """Pieces of about one size together, for those who compute them so."""
        first, by_size = 0, dict[tuple[int, int, bool], list[tuple[int, Piece]]]()
        for piece in self.pieces:
            by_size.setdefault(_size(piece), []).append((first, piece))
            first += piece.length
        return [_group(members, self.device) for members in by_size.values()]

    @property
    def short(self) -> bool:
        """Whether every piece is a token or a few, so that there is nothing to gain from looking at them together."""
        return all(piece.length <= _FEW for piece in self.pieces)

    @cached_property
    def each(self) -> Tokens:
        """The tokens one by one, whatever piece they are of."""
        lengths = [p + 1 for start, length, _ in self.pieces for p in range(start, start + length)]
        width = -(-max(lengths) // BLOCK)
        padded = [(piece.table + [0] * width)[:width] for piece in self.pieces]
        counts = torch.tensor([piece.length for piece in self.pieces])
        tables = torch.tensor(padded).repeat_interleave(counts, 0)
        return Tokens(self.blocks, self.slots, tables, torch.tensor(lengths))


class Rows(Pieces):
    """The last token of each of B texts whose tables lie on the device: nothing here depends on what they hold.

    Args:
        tables: (B, M) blocks, those past a text's end any.
        positions: (B,).
    """

    def __init__(self, tables: Tensor, positions: Tensor):
        self.pieces = []
        self.blocks = tables.gather(1, (positions // BLOCK)[:, None])[:, 0]
        self.slots = positions % BLOCK
        self.tokens = len(positions)
        rows = torch.arange(self.tokens, device=tables.device)[:, None]
        seen = torch.arange(tables.shape[1] * BLOCK, device=tables.device) <= positions[:, None, None, None]
        self.groups = [Group(rows, None, tables, positions + 1, seen, fixed=True)]
        self.each = Tokens(self.blocks, self.slots, tables, positions + 1)


def paged_attention_eager(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, pieces: Pieces) -> Tensor:
    """The oracle: one piece after another, each over its own keys and values laid out in a row.

    Args:
        q: (1, H, N, D); k, v: (1, K, N, D) of the step's tokens, which are stored first.
        keys, values: (blocks, K, BLOCK, D), changed in place.

    Returns:
        (1, H, N, D).
    """
    _store(k, v, keys, values, pieces)
    out, first = torch.empty_like(q), 0
    for start, length, table in pieces.pieces:
        end = start + length
        one = slice(first, first + length)
        k, v = (x[table].transpose(0, 1).flatten(1, 2)[None, :, :end] for x in (keys, values))  # (1, K, end, D)
        seen = torch.arange(end, device=q.device) <= torch.arange(start, end, device=q.device)[:, None]
        out[:, :, one] = attention_eager(q[:, :, one], k, v, seen[None, None])
        first += length
    return out


def paged_attention(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, pieces: Pieces) -> Tensor:
    """`paged_attention_eager` for pieces of one size at a time; native for single tokens, and for bf16 by AVX-512."""
    library = native() if takes(q) and _plain(q, keys) else None
    if library is not None and (pieces.short or (library.wide and q.dtype == torch.bfloat16 and q.shape[-1] % 32 == 0)):
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (N, H, D), (N, K, D), (N, K, D)
        return attend(library, q, k, v, keys, values, pieces.each).transpose(0, 1)[None]
    _store(k, v, keys, values, pieces)
    if len(pieces.groups) == 1 and pieces.groups[0].rows.shape[1] == 1:  # single tokens only: nothing to pick or place
        heads = _of_group(q.permute(2, 1, 0, 3), k, v, keys, values, pieces.groups[0])
        return heads.permute(2, 1, 0, 3)
    out = torch.empty_like(q[0]).transpose(0, 1)  # (N, H, D)
    for group in pieces.groups:
        heads = _of_group(q[0][:, group.rows].transpose(0, 1), k, v, keys, values, group)
        heads = heads.transpose(1, 2)  # (B, T, H, D)
        if group.real is None:
            out[group.rows] = heads
        else:
            out[group.rows[group.real]] = heads[group.real]
    return out.transpose(0, 1)[None]


def _plain(q: Tensor, keys: Tensor) -> bool:
    return q.dtype == keys.dtype and keys.is_contiguous() and q.shape[-1] % 16 == 0


def _of_group(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, group: Group) -> Tensor:
    """(B, H, T, D) -> (B, H, T, D)."""
    if group.mask is None:
        return attention(q, *(x[0][:, group.rows].transpose(0, 1) for x in (k, v)))
    if usable(q, keys):
        return _fused(q, keys, values, group)
    return attention(q, _gathered(keys, group.tables), _gathered(values, group.tables), group.mask)


def _fused(q: Tensor, keys: Tensor, values: Tensor, group: Group) -> Tensor:
    if "mask" not in group.kept:
        group.kept["mask"] = flex_mask(group.tables, group.positions, keys, q.shape[1])
    return flex_paged_attention(q, keys, values, group.kept["mask"], compiled(group.fixed))


def _store(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, pieces: Pieces) -> None:
    keys[pieces.blocks, :, pieces.slots] = k[0].transpose(0, 1)
    values[pieces.blocks, :, pieces.slots] = v[0].transpose(0, 1)


def _gathered(pool: Tensor, tables: Tensor) -> Tensor:
    """(blocks, K, BLOCK, D) by (B, M) -> (B, K, M * BLOCK, D), each block of a head copied in one piece."""
    (_, heads, block, dim), (batch, count) = pool.shape, tables.shape
    if not pool.is_contiguous():  # laid out for FlexAttention
        return pool[tables].transpose(1, 2).flatten(2, 3)
    index = tables[:, None, :] * heads + torch.arange(heads, device=tables.device)[:, None]  # (B, K, M)
    picked = pool.view(-1, block * dim).index_select(0, index.flatten())
    return picked.view(batch, heads, count * block, dim)


def _size(piece: Piece) -> tuple[int, int, bool]:
    """What pieces of a group have in common: about their queries (a quarter more) and blocks (twice), and whether they
    begin their text. A group costs as much as 50 blocks, so tighter ones do not pay."""
    step = 1 << max(0, (piece.length - 1).bit_length() - 2)
    blocks = -(-(piece.start + piece.length) // BLOCK)
    return -(-piece.length // step) * step, (blocks - 1).bit_length(), piece.start == 0 and piece.length > 1


def _group(members: list[tuple[int, Piece]], device: torch.device) -> Group:
    longest = max(piece.length for _, piece in members)
    first = torch.tensor([first for first, _ in members])[:, None]
    count = torch.tensor([piece.length for _, piece in members])[:, None]
    start = torch.tensor([piece.start for _, piece in members])[:, None]
    step = torch.arange(longest)
    place = step.minimum(count - 1)  # (B, T)
    real = None if bool((count == longest).all()) else (step < count).to(device)
    width = -(-int((start + count).max()) // BLOCK)
    tables = torch.tensor([(piece.table + [0] * width)[:width] for _, piece in members])
    whole = longest > 1 and not bool(start.any())
    mask = None if whole else (torch.arange(width * BLOCK) <= (start + place)[:, :, None])[:, None].to(device)
    lengths = (start + count).flatten()
    return Group((first + place).to(device), real, tables.to(device), lengths.to(device), mask)
