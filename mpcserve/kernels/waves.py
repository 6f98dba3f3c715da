"""Sines and cosines of whole turns in integers: the same bits on every machine.

Alice and bob multiply their shares by public sines of Δ. Were these to differ in a single unit, the
difference times a random share would be a random result; so they come from integer tables and
integer arithmetic, never from a machine's floating-point library.

An angle is a fraction of a turn: θ / 2^width. Its high bits pick from a coarse table, the low ones
from a fine one, the angle-addition formulas join them, and repeated they give the harmonics.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpcserve.kernels.jit import kernel
from mpcserve.kernels.places import Place, part, place_of
from mpcserve.ring import Words

Table = NDArray[np.int64]

ONE_BITS = 30
"""Sines are integers over 2^30: a product of two fits 62 bits."""

COARSE_BITS = 10

_PI = 0x3243F6A8885A308D313198A2E03707344A4093822299F31D0082EFA98EC4E6C89
"""π · 2^256, truncated: the well-known hexadecimal digits."""

_GUARD = 96
"""Bits of the fixed point in which the tables are computed."""

_ROUND = np.int64(1 << (ONE_BITS - 1))
_SHIFT = np.int64(ONE_BITS)


class Tables(NamedTuple):
    """cos and sin of j / 2^c turns (coarse) and of j / 2^width turns (fine), over 2^30."""

    coarse: Table
    fine: Table


@lru_cache(maxsize=16)
def tables(width: int) -> Tables:
    """Tables for angles of `width` bits. Shapes: [2, 2^c], [2, 2^(width − c)]."""
    coarse = min(COARSE_BITS, width)
    made = (_table(1 << coarse, coarse), _table(1 << (width - coarse), width))
    for table in made:
        table.flags.writeable = False
    return Tables(*made)


def _table(count: int, turn_bits: int) -> Table:
    pairs = [_cos_sin(j, turn_bits) for j in range(count)]
    return np.array(pairs, np.int64).T.copy()


def _cos_sin(j: int, turn_bits: int) -> tuple[int, int]:
    """Rounded 2^30·cos and 2^30·sin of j / 2^turn_bits turns, by their series in integers."""
    one = 1 << _GUARD
    x = (2 * _PI * j) >> (turn_bits + 256 - _GUARD)
    # reduced to [−π, π), where the series of 40 terms is exact to far more than 30 bits
    pi = _PI >> (256 - _GUARD)
    if x >= pi:
        x -= 2 * pi
    square, sums, term = (x * x) >> _GUARD, [0, 0], one
    for n in range(40):
        even = term
        odd = ((term * x) >> _GUARD) // (2 * n + 1)
        sums[0] += even if n % 2 == 0 else -even
        sums[1] += odd if n % 2 == 0 else -odd
        term = ((term * square) >> _GUARD) // ((2 * n + 1) * (2 * n + 2))
    half = 1 << (_GUARD - ONE_BITS - 1)
    return (sums[0] + half) >> (_GUARD - ONE_BITS), (sums[1] + half) >> (_GUARD - ONE_BITS)


ROWS = 4
"""Rows of `BLOCK` integers that the kernels here need for themselves, beside one for each sum."""

BLOCK = 256
"""Elements whose angles, harmonics and sums stay in the first-level cache."""


def scratch(sums: int = 0) -> Table:
    """What the kernels here need for so many sums."""
    return np.empty((ROWS + sums, BLOCK), np.int64)


@part
def _begin(angle: Place, size: int, width: int, coarse: Table, fine: Table, room: Table) -> None:
    """Rows of `room`: cos and sin of the angles, and once more, as the first harmonic."""
    low_bits = np.uint64(width - 10 if width > 10 else 0)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    for e in range(size):
        h = np.int64(angle[e] >> low_bits)
        low = np.int64(angle[e] & low_mask)
        c = (coarse[0, h] * fine[0, low] - coarse[1, h] * fine[1, low] + _ROUND) >> _SHIFT
        s = (coarse[1, h] * fine[0, low] + coarse[0, h] * fine[1, low] + _ROUND) >> _SHIFT
        room[0, e] = room[2, e] = c
        room[1, e] = room[3, e] = s


@part
def _advance(c1: Place, s1: Place, c: Place, s: Place, size: int) -> None:
    """The next harmonic."""
    for e in range(size):
        cos, sin = c[e], s[e]
        c[e] = (cos * c1[e] - sin * s1[e] + _ROUND) >> _SHIFT
        s[e] = (sin * c1[e] + cos * s1[e] + _ROUND) >> _SHIFT


@part
def _round(x: Place, size: int, drop: np.int64, out: Place) -> None:
    half = np.int64(1) << (drop - np.int64(1))
    for e in range(size):
        out[e] = np.uint64((x[e] + half) >> drop)


@kernel(
    "void(uint64[::1], int64, Array(int64, 2, 'C', readonly=True),"
    " Array(int64, 2, 'C', readonly=True), int64[::1], int64[:, ::1], uint64[:, ::1])"
)
def wave_masks(
    lam: Words, width: int, coarse: Table, fine: Table, bits: Table, room: Table, out: Words
) -> None:
    """out[2k], out[2k + 1] = cos, sin of the (k + 1)-fold angle λ, over 2^bits[k].

    Shapes: lam [N], each below 2^width; bits [K]; room: `scratch`; out [2K, N], in two's
    complement.
    """
    c1, s1 = place_of(room, 0), place_of(room, BLOCK)
    c, s = place_of(room, 2 * BLOCK), place_of(room, 3 * BLOCK)
    for first in range(0, lam.size, BLOCK):
        size = min(BLOCK, lam.size - first)
        _begin(place_of(lam, first), size, width, coarse, fine, room)
        for k in range(bits.size):
            at = 2 * k * lam.size + first
            _round(c, size, _SHIFT - bits[k], place_of(out, at))
            _round(s, size, _SHIFT - bits[k], place_of(out, at + lam.size))
            _advance(c1, s1, c, s, size)


@part
def _add(
    c: Place, s: Place, size: int, sine: np.int64, cosine: np.int64, of_c: Place, of_s: Place,
    lift: np.uint64, total: Place,
) -> None:  # fmt: skip
    """total += one harmonic's part of a sum; see `wave_share`."""
    for e in range(size):
        by_c = (sine * s[e] + cosine * c[e] + _ROUND) >> _SHIFT
        by_s = (cosine * s[e] - sine * c[e] + _ROUND) >> _SHIFT
        more = np.uint64(by_c) * (of_c[e] << lift) + np.uint64(by_s) * (of_s[e] << lift)
        total[e] += np.int64(more)


@kernel(
    "void(uint64[::1], int64, Array(int64, 2, 'C', readonly=True),"
    " Array(int64, 2, 'C', readonly=True), int64[:, ::1], int64[:, ::1], uint64[::1],"
    " uint64[:, ::1], int64[:, ::1], uint64[:, ::1])"
)
def wave_share(
    delta: Words,
    width: int,
    coarse: Table,
    fine: Table,
    sine: Table,
    cosine: Table,
    lift: Words,
    dealt: Words,
    room: Table,
    out: Words,
) -> None:
    """out[:, p] = share of Σ_k sine_pk·sin(kω(Δ − λ)) + cosine_pk·cos(kω(Δ − λ)), from λ's waves.

    Coefficients are integers over 2^q; waves of harmonic k lack `lift[k]` bits of the finest. By
    angle addition the factor of cos(kωλ) is sine_k·sin(kωΔ) + cosine_k·cos(kωΔ), that of sin(kωλ)
    is cosine_k·sin(kωΔ) − sine_k·cos(kωΔ).
    Shapes: delta [N]; sine, cosine [P, K]; lift [K]; dealt [2K, N]; room: `scratch(P)`; out [N, P].
    """
    sums, count = sine.shape
    c1, s1 = place_of(room, 0), place_of(room, BLOCK)
    c, s = place_of(room, 2 * BLOCK), place_of(room, 3 * BLOCK)
    for first in range(0, delta.size, BLOCK):
        size = min(BLOCK, delta.size - first)
        _begin(place_of(delta, first), size, width, coarse, fine, room)
        for p in range(sums):
            for e in range(size):
                room[ROWS + p, e] = 0
        for k in range(count):
            at = 2 * k * delta.size + first
            of_c, of_s = place_of(dealt, at), place_of(dealt, at + delta.size)
            for p in range(sums):
                total = place_of(room, (ROWS + p) * BLOCK)
                _add(c, s, size, sine[p, k], cosine[p, k], of_c, of_s, lift[k], total)
            _advance(c1, s1, c, s, size)
        for p in range(sums):
            for e in range(size):
                out[first + e, p] = np.uint64(room[ROWS + p, e])
