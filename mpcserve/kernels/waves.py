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


@kernel(
    "void(uint64[::1], int64, Array(int64, 2, 'C', readonly=True),"
    " Array(int64, 2, 'C', readonly=True), int64[::1], uint64[:, ::1])"
)
def wave_masks(lam: Words, width: int, coarse: Table, fine: Table, bits: Table, out: Words) -> None:
    """out[2k], out[2k + 1] = cos, sin of the (k + 1)-fold angle λ, over 2^bits[k].

    Shapes: lam [N], each below 2^width; bits [K]; out [2K, N], in two's complement.
    """
    low_bits = np.uint64(width - 10 if width > 10 else 0)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    for e in range(lam.size):
        h = np.int64(lam[e] >> low_bits)
        low = np.int64(lam[e] & low_mask)
        c1 = (coarse[0, h] * fine[0, low] - coarse[1, h] * fine[1, low] + _ROUND) >> _SHIFT
        s1 = (coarse[1, h] * fine[0, low] + coarse[0, h] * fine[1, low] + _ROUND) >> _SHIFT
        c, s = c1, s1
        for k in range(bits.size):
            drop = _SHIFT - bits[k]
            half = np.int64(1) << (drop - np.int64(1))
            out[2 * k, e] = np.uint64((c + half) >> drop)
            out[2 * k + 1, e] = np.uint64((s + half) >> drop)
            c, s = (c * c1 - s * s1 + _ROUND) >> _SHIFT, (s * c1 + c * s1 + _ROUND) >> _SHIFT


@kernel(
    "void(uint64[::1], int64, Array(int64, 2, 'C', readonly=True),"
    " Array(int64, 2, 'C', readonly=True), int64[:, ::1], int64[:, ::1], uint64[::1],"
    " uint64[:, ::1], uint64[:, ::1])"
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
    out: Words,
) -> None:
    """out[:, p] = share of Σ_k sine_pk·sin(kω(Δ − λ)) + cosine_pk·cos(kω(Δ − λ)), from λ's waves.

    Coefficients are integers over 2^q; waves of harmonic k lack `lift[k]` bits of the finest. By
    angle addition the factor of cos(kωλ) is sine_k·sin(kωΔ) + cosine_k·cos(kωΔ), that of sin(kωλ)
    is cosine_k·sin(kωΔ) − sine_k·cos(kωΔ).
    Shapes: delta [N]; sine, cosine [P, K]; lift [K]; dealt [2K, N]; out [N, P].
    """
    low_bits = np.uint64(width - 10 if width > 10 else 0)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    for e in range(delta.size):
        h = np.int64(delta[e] >> low_bits)
        low = np.int64(delta[e] & low_mask)
        c1 = (coarse[0, h] * fine[0, low] - coarse[1, h] * fine[1, low] + _ROUND) >> _SHIFT
        s1 = (coarse[1, h] * fine[0, low] + coarse[0, h] * fine[1, low] + _ROUND) >> _SHIFT
        c, s = c1, s1
        for p in range(sine.shape[0]):
            out[e, p] = np.uint64(0)
        for k in range(sine.shape[1]):
            of_c, of_s = dealt[2 * k, e] << lift[k], dealt[2 * k + 1, e] << lift[k]
            for p in range(sine.shape[0]):
                by_c = (sine[p, k] * s + cosine[p, k] * c + _ROUND) >> _SHIFT
                by_s = (cosine[p, k] * s - sine[p, k] * c + _ROUND) >> _SHIFT
                out[e, p] += np.uint64(by_c) * of_c + np.uint64(by_s) * of_s
            c, s = (c * c1 - s * s1 + _ROUND) >> _SHIFT, (s * c1 + c * s1 + _ROUND) >> _SHIFT
