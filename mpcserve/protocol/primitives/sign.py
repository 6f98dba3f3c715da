"""sign: the bit [x < 0], by comparing Δ with λ in chunks of bits.

With Δ public and λ dealt, x = Δ − λ (mod 2^m) has msb(x) = Δ_msb ⊕ λ_msb ⊕ [Δ_low < λ_low]. The low
m − 1 bits fall into chunks; in each, [Δ < λ] and [Δ = λ] are multilinear in λ's bits with public
coefficients, and carol deals all monomials, so their shares are local. One round opens them under
fresh masks and merges the chunks, again by dealt monomials of those masks; with many chunks, groups
are merged first and a second round merges the groups. The last round opens the result's bit under
its own mask β.

Leaks: nothing: every opened bit is masked by a fresh bit of which each server knows one share.
Cost: see `plan.ops`; one-level: 2 rounds, 2(J − 1) + 1 bits each way.
Source: FLUTE (multi-input products of masked bits), ABY2.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from mpcserve.kernels import bits, compare
from mpcserve.plan.ops import combine_planes, needs_eq, sign_levels
from mpcserve.plan.plan import Instruction
from mpcserve.protocol.parties import DealIO, Mask, PrepareIO, Round, Side, Steps
from mpcserve.ring import Words


class Material(NamedTuple):
    """What one server keeps: dealt rows, masks of each level's opened bits, the result's mask.

    Rows lie in blocks. Dealt are the chunks' monomials, λ_msb, and the merges' monomials.
    """

    dealt: Words
    masks: tuple[Words, ...]
    beta: Words


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Chunks, or earlier groups, from `at` on that become one; it opens rows from `start` on.

    `table`: where the merge finds its monomials. Nothing is merged or opened if `count` is 1.
    """

    at: int
    count: int
    with_eq: bool
    start: int
    table: compare.Rows


@dataclass(frozen=True, slots=True, eq=False)
class _Level:
    """Groups merged in one round, which opens `opened` rows; `pairs` of rows make those dealt."""

    groups: tuple[_Group, ...]
    opened: int
    first: int
    pairs: compare.Rows


@dataclass(frozen=True, slots=True, eq=False)
class _Layout:
    """Where every bit of a sign lies: it follows from the plan. `to`: see `compare.open_chunks`."""

    chunks: compare.Rows
    levels: tuple[_Level, ...]
    rows: int
    to: compare.Rows

    @property
    def scratch(self) -> int:
        """Bits of the largest table."""
        counts = [g.count for level in self.levels for g in level.groups]
        return int(max([*self.chunks.tolist(), *counts]))


def _layout(i: Instruction) -> _Layout:
    return layout_of(tuple(i.attrs["chunks"]), tuple(i.attrs["groups"]))


@lru_cache(maxsize=256)
def layout_of(chunks: tuple[int, ...], groups: tuple[int, ...]) -> _Layout:
    rows = sum((1 << c) - 1 for c in chunks) + 1
    levels = []
    for counts in sign_levels({"chunks": chunks, "groups": groups}):
        levels.append(_level(counts, rows))
        rows += len(levels[-1].pairs)
    to = _destinations(levels[0]) if levels else [-1, compare.NOWHERE]
    return _Layout(np.array(chunks), tuple(levels), rows, np.array(to))


def _level(counts: Sequence[int], first: int) -> _Level:
    groups: list[_Group] = []
    pairs: list[tuple[int, int]] = []
    at = start = 0
    for g, count in enumerate(counts):
        with_eq = needs_eq(counts, g)
        table = _table(count, with_eq, start, first, pairs) if count > 1 else []
        groups.append(_Group(at, count, with_eq, start, np.array(table, np.int64)))
        at, start = at + count, start + combine_planes(count, with_eq)
    return _Level(tuple(groups), start, first, np.array(pairs, np.int64).reshape(-1, 2))


def _table(
    count: int, with_eq: bool, start: int, first: int, pairs: list[tuple[int, int]]
) -> list[int]:
    """Where a merge's monomials lie (see `compare.merge_group`); dealt ones are added to `pairs`.

    Opened are a_0 … a_{J−2}, then the b's: masks' rows from `start` on.
    """
    skipped = 0 if with_eq else 1
    lts, eqs = ([-1 - (start + k) for k in range(n)] for n in (count - 1, count - skipped))
    eqs = [row - (count - 1) for row in eqs]

    def product(left: int, right: int) -> int:
        pairs.append((left, right))
        return first + len(pairs) - 1

    table = [compare.ONE]
    for s in range(1, 1 << len(eqs)):
        top = s.bit_length() - 1
        rest = s ^ (1 << top)
        table.append(product(table[rest], eqs[top]) if rest else eqs[top])
    for j, lt in enumerate(lts):
        for s in range(1 << (count - 1 - j)):
            table.append(product(lt, table[s << (j + 1 - skipped)]) if s else lt)
    return table


def _destinations(level: _Level) -> list[int]:
    """Where lt and eq of each chunk go: rows to be opened, or kept: lt and eq of each group."""
    to: list[int] = []
    for g, group in enumerate(level.groups):
        for j in range(group.count):
            top, eq = j == group.count - 1, group.start + group.count - 1 + j
            lt = -1 - 2 * g if top else group.start + j
            if group.count == 1:
                eq = -2 - 2 * g
            elif not group.with_eq:
                eq = eq - 1 if j else compare.NOWHERE
            to += [lt, eq]
    return to


def deal(io: DealIO, i: Instruction, masks: Sequence[Mask]) -> Mask:
    """Deal the chunks' monomials, λ_msb and the merges' monomials."""
    at, size = _layout(i), i.value.size
    words = (size + 63) // 64
    lam = np.asarray(masks[0].a + masks[0].b, order="C").reshape(-1)
    room = compare.scratch(at.scratch)
    made = np.empty(at.rows * words, np.uint64)
    compare.chunk_monomials(bits.bytes_of(lam), lam.itemsize, at.chunks, at.rows, words, room, made)
    for level in at.levels:
        fresh = io.planes(level.opened, size)
        joint = (fresh.a ^ fresh.b).reshape(-1)
        compare.mask_products(joint, level.opened, level.pairs, level.first, at.rows, words, made)
    beta = io.fresh(i)
    io.deal_blocks(made, size)
    return beta


def prepare(io: PrepareIO, i: Instruction) -> tuple[Words, Material]:
    """Draw or receive the shares of what carol dealt, in her order."""
    at, size = _layout(i), i.value.size
    masks = tuple(io.planes(level.opened, size).reshape(-1) for level in at.levels)
    beta = io.fresh(i)
    return beta, Material(io.dealt_blocks(at.rows, size), masks, beta)


def evaluate(side: Side, i: Instruction, material: Material, delta: Words) -> Steps[Words]:
    """2 rounds (one-level), 1 (a single chunk) or 3 (two-level)."""
    at, size, leader = _layout(i), i.value.size, side == "alice"
    words, room = material.beta.size, compare.scratch(at.scratch)
    count = at.levels[0].opened if at.levels else 0
    masks = material.masks[0] if at.levels else np.empty(0, np.uint64)
    mine = np.empty(count * words, np.uint64)
    kept = np.empty((2 * max(1, len(at.levels[0].groups) if at.levels else 1), words), np.uint64)
    flat = np.ascontiguousarray(delta).reshape(-1)
    compare.open_chunks(
        bits.bytes_of(flat),
        flat.itemsize,
        at.chunks,
        at.to,
        material.dealt,
        at.rows,
        masks,
        count,
        material.beta,
        leader,
        room,
        mine,
        kept,
    )
    for number, level in enumerate(at.levels):
        if number:
            mine = _to_open(level, kept) ^ material.masks[number]
        received = yield Round((bits.pack_blocks(mine, size),), level.opened * ((size + 7) // 8))
        opened = mine ^ bits.unpack_blocks(received, level.opened, size)
        kept = _merged(level, at, opened, material, number, kept, leader, room)
    out = kept[0]
    received = yield Round((bits.pack_planes(out[None], size),), (size + 7) // 8)
    return np.asarray(out ^ bits.unpack_planes(received, 1, size)[0])


def _to_open(level: _Level, kept: Words) -> Words:
    """What a later level opens of the groups before it, in blocks."""
    (group,) = level.groups
    return bits.blocked(np.concatenate([kept[0 : 2 * group.count - 2 : 2], kept[3::2]]))


def _merged(
    level: _Level,
    at: _Layout,
    opened: Words,
    material: Material,
    number: int,
    kept: Words,
    leader: bool,
    room: Words,
) -> Words:
    """lt and eq of each group of this level, one after another."""
    if number:  # the top group's lt is all that is left to be merged into
        kept = kept[-2:]
    for g, group in enumerate(level.groups):
        if group.count > 1:
            compare.merge_group(
                opened,
                level.opened,
                group.start,
                material.dealt,
                at.rows,
                material.masks[number],
                group.table,
                group.count,
                group.with_eq,
                leader,
                room,
                kept[2 * g],
                kept[2 * g + 1],
            )
    return kept
