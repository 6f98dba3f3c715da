"""What a comparison's lower chunks borrow, times a value: it corrects a selection by the top chunk.

With l_j, e_j the outcomes of a comparison's chunks, low to high (see `compare`), the chunks below
the top one borrow  r = e_J·(l_{J−1} + e_{J−1}·( … e_2·l_1)),  0 or 1. All are open under masks,
l_j = L_j ⊕ a_j and e_j = E_j ⊕ b_j, so r is multilinear in the masks, and carol deals shares of
their products. Products are numbered: first those of the subsets S of b_2 … b_J, as bitmasks; then
for each j below J those of a_j and the subsets of b_{j+1} … b_J.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mpcserve.kernels.bits import BLOCK
from mpcserve.kernels.jit import kernel
from mpcserve.kernels.places import Place, on, part, place_of, spread
from mpcserve.ring import Words

_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_WORD = 64


def scratch(products: int, word: Any) -> Words:
    """What `borrow_share` needs for so many products."""
    return np.empty((2 * products + 3) * _WORD, word)


def _both(signature: str) -> tuple[str, str]:
    """For words of 64 and of 32 bits, W."""
    return signature.replace("W", "uint64"), signature.replace("W", "uint32")


@part
def _row_of(rows: Place, count: int, row: int, w: int, total: int) -> Any:
    """Word w of a row, of `count` rows that lie in blocks."""
    first = w // BLOCK * BLOCK
    return rows[first * count + row * min(BLOCK, total - first) + w - first]


@part
def _of_equals(
    masks: Place, count: int, chunks: int, first: int, s: int, w: int, total: int
) -> np.uint64:
    """The product of the b's, from the one numbered `first` on, that are in s."""
    product = _ALL
    for k in range(first, chunks - 1):
        if s >> (k - first) & 1:
            product &= _row_of(masks, count, chunks - 1 + k, w, total)
    return product


@part
def _write_product(
    product: np.uint64,
    lam: Place,
    beta: Place,
    size: int,
    high: int,
    own: Place,
    cross: Place,
    above: Place,
    has_above: bool,
    T: Any,
) -> None:
    """ν·M, ν·M·λ and ν·M·λ_msb of 64 elements, where ν = 1 − 2β and M the product's bit."""
    for k in range(size):
        bit = T(product >> np.uint64(k) & np.uint64(1))
        number = T(bit * T(T(1) - T(T(2) * beta[k])))
        own[k] = number
        cross[k] = T(number * lam[k])
        if has_above:
            above[k] = T(number * T(lam[k] >> T(high)))


@kernel(*_both("void(W[::1], W[::1], int64, uint64[::1], int64, W[:, ::1], W[:, ::1])"))
def borrow_facts(
    lam: Words, beta: Words, width: int, masks: Words, chunks: int, own: Words, above: Words
) -> None:
    """What carol deals: of every product M of the outcomes' masks ν·M, ν·M·λ and ν·M·λ_msb.

    ν = 1 − 2β, and λ < 2^width. Shapes: lam and beta (0 or 1) [N]; masks, 2·(chunks − 1) rows in
    blocks; own [2·M, N]; above [M, N], or [0, N].
    """
    T = lam.dtype.type
    count, total, high = 2 * (chunks - 1), (lam.size + 63) >> 6, width - 1
    products, has_above = own.shape[0] >> 1, above.shape[0] > 0
    rows, size = place_of(masks, 0), lam.size
    for w in range(total):
        at = w * _WORD
        here, mine, bits = min(_WORD, size - at), place_of(lam, at), place_of(beta, at)
        m = 0
        for j in range(chunks):  # of the b's alone, then with each a
            first, alone = 0, _ALL
            if j:
                first, alone = j - 1, _row_of(rows, count, j - 1, w, total)
            for s in range(1 << (chunks - 1 - first)):
                product = alone & _of_equals(rows, count, chunks, first, s, w, total)
                top = place_of(above, (m if has_above else 0) * size + at)
                _write_product(
                    product, mine, bits, here, high, place_of(own, m * size + at),
                    place_of(own, (products + m) * size + at), top, has_above, T,
                )  # fmt: skip
                m += 1


@part
def _term(
    p: Place, low: Place, number: Place, cross: Place, above: Place, wide: bool, shift: Any,
    size: int, to: Place, T: Any,
) -> None:  # fmt: skip
    """to ← share of ν·M·(P − Λ); `low`: all ones where P's top bit is clear."""
    for k in range(size):
        to[k] = T(T(number[k] * p[k]) - cross[k])
    if wide:
        for k in range(size):
            to[k] = T(to[k] + T(T(above[k] & low[k]) << shift))


@part
def _fold(low: Place, high: Place, taken: Place, add: bool, to: Place, T: Any) -> None:
    """to ← o·low + (1 − 2·o)·high, or that is added: o, a bit, is all ones or 0 in `taken`."""
    for k in range(_WORD):
        o = taken[k]
        value = T(T(o & low[k]) + T(T(high[k] ^ o) - o))
        to[k] = T(T(to[k] if add else T(0)) + value)


@part
def _borrow(
    terms: Place, rows: Place, count: int, chunks: int, w: int, total: int, taken: Place,
    work: Place, T: Any,
) -> None:  # fmt: skip
    """work[0] ← r times what the term of the empty product is a multiple of, for word w."""
    alone = 1 << (chunks - 1)  # the first product with a_1
    for j in range(1, chunks):
        # what the chunks up to j borrow, times each product of the b's above them
        spread(_row_of(rows, count, j - 1, w, total), taken)
        for s in range(1 << (chunks - j)):
            low, high = on(terms, (s << (j - 1)) * _WORD), on(terms, (alone + s) * _WORD)
            _fold(low, high, taken, j > 1, on(work, s * _WORD), T)
        alone += 1 << (chunks - j)
        spread(_row_of(rows, count, chunks - 2 + j, w, total), taken)
        for s in range(1 << (chunks - 1 - j)):
            low, high = on(work, 2 * s * _WORD), on(work, (2 * s + 1) * _WORD)
            _fold(low, high, taken, False, on(work, s * _WORD), T)


@kernel(
    *_both(
        "void(W[::1], uint64[::1], uint64[::1], W[:, ::1], W[:, ::1], int64, int64, int64, int64,"
        " int64, W[::1], W[::1])"
    )
)
def borrow_share(
    delta: Words,
    opened: Words,
    top: Words,
    own: Words,
    above: Words,
    chunks: int,
    width: int,
    out_width: int,
    start: int,
    stop: int,
    room: Words,
    out: Words,
) -> None:
    """out[start:stop] ← share of −κν·r·(P − Λ), κ = 1 − 2·top: what r changes of (1 − t)·(P − Λ).

    t = top ⊕ β is what the top chunk alone says; with the borrow r it is t + r − 2·t·r, and
    1 − 2·t = κ·ν. P = Δ mod 2^width, and Λ = λ, or λ − 2^width·λ_msb where P's top bit is clear.
    Shapes: delta [N], words of out_width bits; opened, 2·(chunks − 1) rows in blocks; top a plane;
    own [2·M, N] and above [M, N], shares of what `borrow_facts` makes; start is a multiple of 64.
    """
    T = out.dtype.type
    count, total, products = 2 * (chunks - 1), top.size, own.shape[0] >> 1
    mask, last, shift = T(_ALL >> np.uint64(64 - width)), T(width - 1), T(width)
    out_mask, wide, size = T(_ALL >> np.uint64(64 - out_width)), above.shape[0] > 0, out.size
    p, low = place_of(room, 0), place_of(room, _WORD)
    taken, terms = place_of(room, 2 * _WORD), place_of(room, 3 * _WORD)
    work, rows = on(terms, products * _WORD), place_of(opened, 0)
    for w in range(start >> 6, (stop + 63) >> 6):
        at = w * _WORD
        here = min(_WORD, size - at)
        for k in range(here):
            p[k] = T(delta[at + k] & mask)
            low[k] = T(T(p[k] >> last) - T(1))  # all ones where the top bit is clear
        for m in range(products):
            _term(
                p, low, place_of(own, m * size + at), place_of(own, (products + m) * size + at),
                place_of(above, (m if wide else 0) * size + at), wide, shift, here,
                on(terms, m * _WORD), T,
            )  # fmt: skip
        _borrow(terms, rows, count, chunks, w, total, taken, work, T)
        spread(~top[w], taken)
        for k in range(here):
            out[at + k] = T(T(T(work[k] ^ taken[k]) - taken[k]) & out_mask)
