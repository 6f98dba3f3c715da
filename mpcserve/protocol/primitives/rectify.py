"""rectify: max(x, 0) in two rounds, where a comparison and a selection take three.

The sign of x is that of its top chunk, t, and what the chunks below borrow, r: t + r − 2·t·r. A
comparison opens the outcomes of the lower chunks, and a round later their sum with the top one.
Here all are opened at once, t under a bit β: with T = t ⊕ β, κ = 1 − 2T and ν = 1 − 2β

    [x ≥ 0]·x = (1 − t)·x − κ·ν·r·x,      x = P − Λ as in select.

The first is a selection by T. r is multilinear in the masks of the lower outcomes; carol deals
shares of each product M of these as the numbers ν·M, ν·M·λ and ν·M·λ_msb: three times the bits
that all else takes, for a round. Worth it for small layers on slow networks.

Error: exact. Cost: 2 rounds: 2J − 1 bits and n bits each way, for J chunks; dealt: what sign and
select take, less sign's own products, and (3·2^(J−1) − 2)·(2n + n − m) bits.
Leaks: nothing: all that is opened is under fresh masks. Source: ABY2.0, FLUTE.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from mpcserve.kernels import bits, borrows, compare, packing
from mpcserve.kernels.tasks import Run, one_by_one
from mpcserve.plan.ops import rectify_products
from mpcserve.plan.plan import Instruction
from mpcserve.protocol.opening import open_packed, tiles
from mpcserve.protocol.parties import DealIO, Mask, PrepareIO, Round, Side, Steps
from mpcserve.protocol.primitives import select, sign
from mpcserve.ring import Words, as_words, word_type


class Material(NamedTuple):
    """Shares of the chunks' monomials and λ_msb, of the outcomes' masks and β, of what a selection
    by t takes, and of ν·M with ν·M·λ, and ν·M·λ_msb."""

    monomials: Words
    masks: Words
    beta: Words
    pair: select.Pair
    own: Words
    above: Words


class _Layout(NamedTuple):
    """`rows`: of monomials. `opened`: outcomes of the lower chunks. `to`: see `open_chunks`."""

    chunks: compare.Rows
    rows: int
    opened: int
    to: compare.Rows
    width: int

    @property
    def products(self) -> int:
        """Of the lower outcomes' masks."""
        return rectify_products(len(self.chunks))


def _layout(i: Instruction) -> _Layout:
    at = sign.layout_of(tuple(i.attrs["chunks"]), (len(i.attrs["chunks"]),))
    level, width = at.levels[0], sum(i.attrs["chunks"]) + 1
    return _Layout(at.chunks, level.first, level.opened, at.to, width)


def deal(io: DealIO, i: Instruction, masks: Sequence[Mask]) -> Mask:
    """Deal the chunks' monomials, what a selection by t takes, and the products."""
    at, n, size = _layout(i), i.value.width, i.value.size
    m, high, words = at.width, max(n - at.width, 0), (size + 63) // 64
    lam = np.asarray(masks[0].a + masks[0].b, order="C").reshape(-1)
    monomials = np.empty(at.rows * words, np.uint64)
    room = compare.scratch(max(i.attrs["chunks"]))
    compare.chunk_monomials(
        bits.bytes_of(lam), lam.itemsize, at.chunks, at.rows, words, room, monomials
    )
    fresh, beta = io.planes(at.opened, size), io.planes(1, size)
    io.deal_blocks(monomials, size)
    outcomes = (fresh.a ^ fresh.b).reshape(-1)
    number = np.empty(size, word_type(n))
    bits.unslice_bit((beta.a ^ beta.b)[0], number)
    select.deal_pair(io, number, masks[0], m, n)
    total = as_words(masks[0].total(m), n).reshape(-1)
    own = np.empty((2 * at.products, size), word_type(n))
    above = np.empty((at.products if high else 0, size), word_type(n))
    borrows.borrow_facts(total, number, m, outcomes, len(at.chunks), own, above)
    io.deal(own, n)
    if high:
        io.deal(above, high)
    return io.fresh(i)


def prepare(io: PrepareIO, i: Instruction, halves: Sequence[Words]) -> tuple[Words, Material]:
    """This side's shares."""
    at, n, size = _layout(i), i.value.width, i.value.size
    masks, beta = io.planes(at.opened, size).reshape(-1), io.planes(1, size)[0]
    monomials = io.dealt_blocks(at.rows, size)
    parts = select.dealt_pair(io, size, at.width, n)
    own, high = io.dealt((2 * at.products, size), n), n - at.width
    above = np.empty((0, size), word_type(n))
    if high:
        above = as_words(io.dealt((at.products, size), high), n)
    lam = io.fresh(i)
    pair = select.ready(halves[0], parts, lam.reshape(-1), at.width, n)
    return lam, Material(monomials, masks, beta, pair, own, np.ascontiguousarray(above))


def evaluate(
    side: Side, i: Instruction, material: Material, delta: Words, run: Run = one_by_one
) -> Steps[Words]:
    """2 rounds, of 2J − 1 bits and of n bits each way."""
    at, n, size, leader = _layout(i), i.value.width, i.value.size, side == "alice"
    flat = np.ascontiguousarray(delta).reshape(-1)
    mine, top = (
        np.empty(material.masks.size, np.uint64),
        np.empty((1, material.beta.size), np.uint64),
    )
    compare.open_chunks(
        bits.bytes_of(flat),
        flat.itemsize,
        at.chunks,
        at.to,
        material.monomials,
        at.rows,
        material.masks,
        at.opened,
        material.beta,
        leader,
        compare.scratch(max(i.attrs["chunks"])),
        mine,
        top,
    )
    lower, each = at.opened * ((size + 7) // 8), (size + 7) // 8
    received = memoryview(
        (yield Round((bits.pack_blocks(mine, size), bits.pack_planes(top, size)), lower + each))
    )
    opened = mine ^ bits.unpack_blocks(received[:lower], at.opened, size)
    said = np.asarray(top[0] ^ bits.unpack_planes(received[lower:], 1, size)[0])
    out, wide = np.empty(size, word_type(n)), as_words(flat, n)

    def piece(part: slice) -> memoryview:
        room = borrows.scratch(at.products, out.dtype.type)
        borrows.borrow_share(
            wide, opened, said, material.own, material.above, len(at.chunks), at.width, n,
            part.start, part.stop, room, out,
        )  # fmt: skip
        space = packing.packed_space(part.stop - part.start, n)
        select.add_selected(flat, said, material.pair, part, at.width, n, leader, out, space)
        return packing.packed_bytes(space)

    pieces = run(partial(piece, part) for part in tiles(size))
    return (yield from open_packed(out, n, pieces)).reshape(i.value.shape)
