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
from typing import NamedTuple

import numpy as np

from mpcserve.kernels import bits
from mpcserve.plan.ops import combine_planes, needs_eq, sign_levels
from mpcserve.plan.plan import Instruction
from mpcserve.protocol.parties import DealIO, Mask, PrepareIO, Round, Side, Steps
from mpcserve.ring import Words

_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)


class Merge(NamedTuple):
    """One group of chunks to be merged: its masks (for opening) and its monomials."""

    chunks: int
    with_eq: bool
    masks: Words
    table: Words


class Material(NamedTuple):
    """What one server keeps for an evaluation."""

    chunks: tuple[Words, ...]
    top: Words
    levels: tuple[tuple[Merge | None, ...], ...]
    beta: Words


def _sliced(x: Words, count: int) -> Words:
    flat = np.ascontiguousarray(x).reshape(-1)
    planes = np.empty((count, (flat.size + 63) // 64), np.uint64)
    bits.slice_bits(flat, 0, count, planes)
    return planes


def _chunk_planes(planes: Words, chunks: Sequence[int]) -> list[Words]:
    ends = np.cumsum(chunks)
    return [planes[e - c : e] for c, e in zip(chunks, ends, strict=True)]


def _merges(i: Instruction) -> list[list[tuple[int, bool]]]:
    return [
        [(count, needs_eq(level, g)) for g, count in enumerate(level)]
        for level in sign_levels(i.attrs)
    ]


def _subsets(count: int, with_eq: bool) -> tuple[int, list[tuple[int, int]]]:
    """Number of b's, and for each row a_j·b_S with S ≠ ∅ its (j, S as a mask over all b's)."""
    first = 0 if with_eq else 1
    rows = [
        (j, s << (j + 1 - first)) for j in range(count - 1) for s in range(1 << (count - 1 - j))
    ]
    return count - first, rows


def _dealt_rows(count: int, with_eq: bool) -> list[int]:
    """Rows of the table that are dealt; the others are the constant and the masks themselves."""
    n, rows = _subsets(count, with_eq)
    products = [s for s in range(1 << n) if s & (s - 1)]
    return products + [(1 << n) + r for r, (_, s) in enumerate(rows) if s]


def _fill_masks(table: Words, masks: Words, count: int, with_eq: bool) -> None:
    """Put the single masks in their rows. `masks`: a_0 … a_{J−2}, then the b's."""
    n, rows = _subsets(count, with_eq)
    for e in range(n):
        table[1 << e] = masks[count - 1 + e]
    for r, (j, s) in enumerate(rows):
        if s == 0:
            table[(1 << n) + r] = masks[j]


def _full_table(masks: Words, count: int, with_eq: bool) -> Words:
    """All monomials of the opened bits' masks, on carol. Row order: see `merge_chunks`."""
    n, rows = _subsets(count, with_eq)
    table = np.empty(((1 << n) + len(rows), masks.shape[1]), np.uint64)
    table[0] = _ALL
    if n:
        bits.monomials(np.ascontiguousarray(masks[count - 1 :]), table[1 : 1 << n])
    for r, (j, s) in enumerate(rows):
        np.bitwise_and(masks[j], table[s], out=table[(1 << n) + r])
    return table


def deal(io: DealIO, i: Instruction, masks: Sequence[Mask]) -> Mask:
    """Deal the chunks' monomials, λ_msb and the merges' monomials."""
    size, chunks = i.value.size, i.attrs["chunks"]
    m = sum(chunks) + 1
    planes = _sliced(masks[0].total(m), m)
    for chunk in _chunk_planes(planes[:-1], chunks):
        mono = np.empty(((1 << chunk.shape[0]) - 1, chunk.shape[1]), np.uint64)
        bits.monomials(np.ascontiguousarray(chunk), mono)
        io.deal_bits(mono, size)
    io.deal_bits(planes[-1:], size)
    for level in _merges(i):
        for count, with_eq in level:
            if count > 1:
                fresh = io.planes(combine_planes(count, with_eq), size)
                table = _full_table(fresh.a ^ fresh.b, count, with_eq)
                io.deal_bits(table[_dealt_rows(count, with_eq)], size)
    beta = io.planes(1, size)
    return Mask(beta.a[0], beta.b[0])


def prepare(io: PrepareIO, i: Instruction) -> tuple[Words, Material]:
    """Draw or receive the shares of what carol dealt, in her order."""
    size = i.value.size
    chunks = tuple(io.dealt_bits((1 << c) - 1, size) for c in i.attrs["chunks"])
    top = io.dealt_bits(1, size)[0]
    levels = []
    for level in _merges(i):
        merges: list[Merge | None] = []
        for count, with_eq in level:
            merges.append(_prepare_merge(io, size, count, with_eq) if count > 1 else None)
        levels.append(tuple(merges))
    beta = io.planes(1, size)[0]
    return beta, Material(chunks, top, tuple(levels), beta)


def _prepare_merge(io: PrepareIO, size: int, count: int, with_eq: bool) -> Merge:
    masks = io.planes(combine_planes(count, with_eq), size)
    n, rows = _subsets(count, with_eq)
    table = np.empty(((1 << n) + len(rows), masks.shape[1]), np.uint64)
    table[0] = _ALL if io.leader else np.uint64(0)
    dealt = _dealt_rows(count, with_eq)
    table[dealt] = io.dealt_bits(len(dealt), size)
    _fill_masks(table, masks, count, with_eq)
    return Merge(count, with_eq, masks, table)


def evaluate(side: Side, i: Instruction, material: Material, delta: Words) -> Steps[Words]:
    """2 rounds (one-level), 1 (a single chunk) or 3 (two-level)."""
    size, chunks = i.value.size, i.attrs["chunks"]
    leader = side == "alice"
    planes = _sliced(delta, sum(chunks) + 1)
    lts, eqs = [], []
    for chunk, mono in zip(_chunk_planes(planes[:-1], chunks), material.chunks, strict=True):
        lt, eq = np.empty_like(material.top), np.empty_like(material.top)
        bits.compare_chunk(chunk, mono, leader, lt, eq)
        lts.append(lt)
        eqs.append(eq)
    for level in material.levels:
        lts, eqs = yield from _merge_level(level, size, lts, eqs)
    out: Words = lts[0] ^ material.top ^ material.beta
    if leader:
        out ^= planes[-1]
    received = yield Round((bits.pack_planes(out[None], size),), (size + 7) // 8)
    out ^= bits.unpack_planes(received, 1, size)[0]
    return out


def _merge_level(
    level: Sequence[Merge | None], size: int, lts: Sequence[Words], eqs: Sequence[Words]
) -> Steps[tuple[list[Words], list[Words]]]:
    """Open the masked outcomes of every group at once, then merge each group locally."""
    mine, at = [], 0
    for merge in level:
        count = merge.chunks if merge else 1
        if merge:
            first = at + (0 if merge.with_eq else 1)
            shares = np.stack([*lts[at : at + count - 1], *eqs[first : at + count]])
            mine.append(shares ^ merge.masks)
        at += count
    opened = np.concatenate(mine)
    received = yield Round((bits.pack_planes(opened, size),), opened.shape[0] * ((size + 7) // 8))
    opened ^= bits.unpack_planes(received, opened.shape[0], size)
    new_lts, new_eqs, at, row = [], [], 0, 0
    for merge in level:
        count = merge.chunks if merge else 1
        lt, eq = lts[at + count - 1], eqs[at + count - 1]
        if merge:
            rows = merge.masks.shape[0]
            bits.merge_chunks(
                opened[row : row + rows], merge.table, merge.chunks, merge.with_eq, lt, eq
            )
            row += rows
        new_lts.append(lt)
        new_eqs.append(eq)
        at += count
    return new_lts, new_eqs
