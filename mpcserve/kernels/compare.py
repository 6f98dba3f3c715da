"""Comparing in chunks of bits: from Δ and shares of λ's monomials to shares of the outcomes.

Rows of bits lie in blocks (see `kernels.bits`): what one block of elements needs lies together, is
read once from front to back, and all that is made of it on the way stays in the first-level cache.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mpcserve.kernels.bits import BLOCK, Bytes, slice_word
from mpcserve.kernels.folding import LANES, LOW, fold_lanes, fold_word
from mpcserve.kernels.jit import kernel
from mpcserve.kernels.places import Place, fetch, on, part, place_of
from mpcserve.ring import Words

Rows = NDArray[np.int64]
"""Which row: r ≥ 0 is row r of what was dealt, −1 − r is row r of the masks."""

ONE = -(1 << 40)
"""As a row: the constant 1, which the leader holds and the other does not."""
NOWHERE = 1 << 40
"""As a destination: an outcome that nobody needs."""

_U0 = np.uint64(0)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_PLANES = 64


def scratch(chunk: int) -> Words:
    """What the kernels here need for chunks, or merges, of that many bits."""
    return np.empty((_PLANES + 1 + (1 << chunk)) * BLOCK, np.uint64)


@part
def _slice_block(
    x: Bytes, size: int, first: int, words: int, width: int, planes: Place, soon: Place, rows: int
) -> None:
    """planes[i·BLOCK + w] = bit i of elements 64·(first + w) and on.

    Meanwhile what will be read is fetched: x's next block, and `rows` rows from `soon` on. The
    machine does not foresee it, for reading pauses while a block is sliced or its rows are folded.
    """
    for w in range(words):
        fetch(place_of(x, 64 * (first + BLOCK + w) * size), 64 * size, 1)
        fetch(on(soon, w * rows), rows, 8)
        slice_word(x, size, 64 * (first + w), 0, (width + 7) >> 3, on(planes, w), BLOCK)


@part
def _compare(
    delta: Place, mono: Place, bits: int, words: int, one: Place, lts: Place, eqs: Place
) -> None:
    """Shares of [Δ < λ] and [Δ = λ] for one chunk, from shares of λ's monomials.

    Both are multilinear in λ's bits with coefficients that are functions of Δ's. Bits are folded
    in from the low end; after bit k the tables hold, for every subset S of the higher bits,
        eq[S] = [Δ = λ on bits ≤ k] · λ_S,   lt[S] = [Δ < λ on bits ≤ k] · λ_S
    by eq'[S] = ¬Δ_k·eq[S] ⊕ eq[S∪k],   lt'[S] = ¬Δ_k·(λ_{S∪k} ⊕ lt[S]) ⊕ lt[S∪k].
    """
    low = min(bits, LOW)
    whole = words // LANES * LANES
    for s in range(1 << (bits - low)):
        rows = on(mono, (s << low) * words)
        empty = on(rows, -words) if s else one
        lt, eq = on(lts, s * BLOCK), on(eqs, s * BLOCK)
        for w in range(0, whole, LANES):
            fold_lanes(on(delta, w), on(empty, w), on(rows, w), words, low, on(lt, w), on(eq, w))
        for w in range(whole, words):
            fold_word(on(delta, w), on(empty, w), on(rows, w), words, low, on(lt, w), on(eq, w))
    for k in range(low, bits):
        bit = on(delta, k * BLOCK)
        for s in range(1 << (bits - 1 - k)):
            with_k = on(mono, ((s << (k + 1)) + (1 << k) - 1) * words)
            eq, eq0, eq1 = on(eqs, s * BLOCK), on(eqs, 2 * s * BLOCK), on(eqs, (2 * s + 1) * BLOCK)
            lt, lt0, lt1 = on(lts, s * BLOCK), on(lts, 2 * s * BLOCK), on(lts, (2 * s + 1) * BLOCK)
            for w in range(words):
                no = ~bit[w]
                eq[w] = (no & eq0[w]) ^ eq1[w]
                lt[w] = (no & (with_k[w] ^ lt0[w])) ^ lt1[w]


@part
def _deliver(
    outcome: Place, to: int, first: int, words: int, masks: Place, opened: Place, kept: Words
) -> None:
    """To a row to be opened, under its mask, or to one that is kept."""
    if to == NOWHERE:
        return
    if to >= 0:
        mask, out = on(masks, to * words), on(opened, to * words)
        for w in range(words):
            out[w] = outcome[w] ^ mask[w]
    else:
        for w in range(words):
            kept[-1 - to, first + w] = outcome[w]


@kernel(
    "void(uint8[::1], int64, int64[::1], int64[::1], uint64[::1], int64, uint64[::1], int64,"
    " uint64[::1], boolean, uint64[::1], uint64[::1], uint64[:, ::1])"
)
def open_chunks(
    x: Bytes,
    size: int,
    chunks: Rows,
    to: Rows,
    dealt: Words,
    rows: int,
    masks: Words,
    count: int,
    beta: Words,
    leader: bool,
    scratch: Words,
    opened: Words,
    kept: Words,
) -> None:
    """This side's shares of all chunks' outcomes: lt of chunk j goes to to[2j], eq to to[2j + 1].

    Into the last chunk's lt go Δ's sign, λ's and `beta` too: with the borrows of the chunks below
    it, it is the masked result. Shapes: x [N], words of `size` bytes; dealt, `rows` rows: the
    chunks' monomials, λ's sign, and more; masks and opened, `count` rows; beta [W]; kept [K, W].
    """
    one = _ALL if leader else _U0
    planes, total = place_of(scratch, 0), beta.size
    ones = on(planes, _PLANES * BLOCK)
    for w in range(BLOCK):
        ones[w] = one
    width = needed = 1
    for j in range(chunks.size):
        width += chunks[j]
        needed += (1 << chunks[j]) - 1
    for first in range(0, total, BLOCK):
        words = min(BLOCK, total - first)
        mono, mask = place_of(dealt, first * rows), place_of(masks, first * count)
        _slice_block(x, size, first, words, width, planes, mono, needed)
        out, bit = place_of(opened, first * count), planes
        for j in range(chunks.size):
            lts = on(ones, BLOCK)
            eqs = on(lts, BLOCK << (chunks[j] - 1))
            _compare(bit, mono, chunks[j], words, ones, lts, eqs)
            mono, bit = on(mono, ((1 << chunks[j]) - 1) * words), on(bit, chunks[j] * BLOCK)
            if j == chunks.size - 1:
                fresh = place_of(beta, first)
                for w in range(words):
                    lts[w] ^= mono[w] ^ fresh[w] ^ (one & bit[w])
            _deliver(lts, to[2 * j], first, words, mask, out, kept)
            _deliver(eqs, to[2 * j + 1], first, words, mask, out, kept)


@part
def _fold(opened: Place, subsets: int, words: int, work: Place) -> None:
    """Fold one opened bit in: work[S] ← opened·work[S] ⊕ work[S ∪ this bit]."""
    for s in range(subsets):
        to, low, high = on(work, s * BLOCK), on(work, 2 * s * BLOCK), on(work, (2 * s + 1) * BLOCK)
        for w in range(words):
            to[w] = (opened[w] & low[w]) ^ high[w]


@part
def _row(row: int, dealt: Place, masks: Place, one: Place, words: int) -> Place:
    if row == ONE:
        return one
    return on(dealt, row * words) if row >= 0 else on(masks, (-1 - row) * words)


@part
def _all_equal(
    opened: Place,
    table: Rows,
    dealt: Place,
    masks: Place,
    one: Place,
    chunks: int,
    words: int,
    work: Place,
) -> None:
    """work[0] ← Π_e (opened[e] ⊕ b_e)."""
    for s in range(1 << chunks):
        b, to = _row(table[s], dealt, masks, one, words), on(work, s * BLOCK)
        for w in range(words):
            to[w] = b[w]
    for e in range(chunks):
        _fold(on(opened, e * words), 1 << (chunks - 1 - e), words, work)


@part
def _dealt_rows(table: Rows) -> tuple[int, int]:
    """The first dealt row of a merge, and how many there are: they lie together.

    A few of each block: the machine does not foresee those of the next.
    """
    first, count = NOWHERE, 0
    for s in range(table.size):
        if table[s] >= 0:
            first, count = min(first, table[s]), count + 1
    return first, count


@kernel(
    "void(uint64[::1], int64, int64, uint64[::1], int64, uint64[::1], int64[::1], int64, boolean,"
    " boolean, uint64[::1], uint64[::1], uint64[::1])"
)
def merge_group(
    opened: Words,
    count: int,
    start: int,
    dealt: Words,
    rows: int,
    masks: Words,
    table: Rows,
    chunks: int,
    with_eq: bool,
    leader: bool,
    scratch: Words,
    lt: Words,
    eq: Words,
) -> None:
    """lt ⊕= the borrow of the chunks below the top one; eq = all chunks equal (if `with_eq`).

    With l_j, e_j the chunks' outcomes, low to high:
        lt = l_top ⊕ e_top·(l_{J−2} ⊕ e_{J−2}·( … e_1·l_0)),   eq = e_top · … · e_0
    Every l_j and e_j was opened under a mask, l_j = L_j ⊕ a_j, e_j = E_j ⊕ b_j, so both are
    multilinear in the masks with public coefficients. `lt` holds the top chunk's share on entry.

    Shapes: opened and masks, `count` rows, of which this group's begin at `start`: L_0 … L_{J−2},
    then E of the chunks that have one, low to high; dealt, `rows` rows; lt [W], eq [W].
    table [R]: where the shares of b_S lie for S = 0 … 2^nb − 1 (first the constant 1), then for
    each j those of a_j·b_S for the subsets S of the chunks above j.
    """
    skipped = 0 if with_eq else 1
    subsets = 1 << (chunks - skipped)
    lowest, dealt_rows = _dealt_rows(table)
    one, work = place_of(scratch, 0), place_of(scratch, BLOCK)
    for w in range(BLOCK):
        one[w] = _ALL if leader else _U0
    for first in range(0, lt.size, BLOCK):
        words = min(BLOCK, lt.size - first)
        given, fresh = place_of(dealt, first * rows), place_of(masks, first * count)
        fetch(on(given, BLOCK * rows + lowest * words), dealt_rows * words, 8)
        said = on(place_of(opened, first * count), start * words)
        row = subsets
        for j in range(chunks - 1):
            above, bit = chunks - 1 - j, on(said, j * words)
            for s in range(1 << above):
                b = _row(table[s << (j + 1 - skipped)], given, fresh, one, words)
                ab = _row(table[row + s], given, fresh, one, words)
                to = on(work, s * BLOCK)
                for w in range(words):
                    to[w] = (to[w] if j else _U0) ^ (bit[w] & b[w]) ^ ab[w]
            row += 1 << above
            _fold(on(said, (chunks + j - skipped) * words), 1 << (above - 1), words, work)
        here = place_of(lt, first)
        for w in range(words):
            here[w] ^= work[w]
        if with_eq:
            _all_equal(
                on(said, (chunks - 1) * words), table, given, fresh, one, chunks, words, work
            )
            here = place_of(eq, first)
            for w in range(words):
                here[w] = work[w]


@kernel("void(uint8[::1], int64, int64[::1], int64, int64, uint64[::1], uint64[::1])")
def chunk_monomials(
    x: Bytes, size: int, chunks: Rows, rows: int, total: int, scratch: Words, out: Words
) -> None:
    """All monomials of every chunk of x's bits, then x's top bit.

    Row S − 1 of a chunk is the product of its bits i in S, for every non-empty subset S (a
    bitmask). Shapes: x [N], words of `size` bytes; planes have `total` words; out, `rows` rows.
    """
    planes = place_of(scratch, 0)
    width = 1
    for j in range(chunks.size):
        width += chunks[j]
    for first in range(0, total, BLOCK):
        words = min(BLOCK, total - first)
        mono, bit = place_of(out, first * rows), planes
        _slice_block(x, size, first, words, width, planes, mono, 0)
        for j in range(chunks.size):
            for i in range(chunks[j]):
                alone = on(mono, ((1 << i) - 1) * words)
                for w in range(words):
                    alone[w] = bit[w]
                for s in range(1, 1 << i):
                    low, to = on(mono, (s - 1) * words), on(alone, s * words)
                    for w in range(words):
                        to[w] = low[w] & bit[w]
                bit = on(bit, BLOCK)
            mono = on(mono, ((1 << chunks[j]) - 1) * words)
        for w in range(words):
            mono[w] = bit[w]


@kernel("void(uint64[::1], int64, int64[:, ::1], int64, int64, int64, uint64[::1])")
def mask_products(
    masks: Words, count: int, pairs: Rows, start: int, rows: int, total: int, out: Words
) -> None:
    """Row start + p of `out` is the product of the two rows pairs[p], none later than itself."""
    for first in range(0, total, BLOCK):
        words = min(BLOCK, total - first)
        made, fresh = place_of(out, first * rows), place_of(masks, first * count)
        for p in range(pairs.shape[0]):
            left = _row(pairs[p, 0], made, fresh, fresh, words)
            right = _row(pairs[p, 1], made, fresh, fresh, words)
            to = on(made, (start + p) * words)
            for w in range(words):
                to[w] = left[w] & right[w]
