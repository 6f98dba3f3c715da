"""Z_2^n and fixed point: how a real number becomes a ring element and back.

A real v is the integer round(v · 2^frac_bits), taken mod 2^width, in a uint64 word whose bits above
the width are zero. uint64 is a trap in NumPy (a Python int or an int64 operand may promote), so
every constant here is a named uint64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

U64 = np.uint64
Words = NDArray[np.uint64]

WORD_BITS = 64


def mask_of(width: int) -> np.uint64:
    """The word with the low `width` bits set, 1 ≤ width ≤ 64."""
    assert 1 <= width <= WORD_BITS
    return np.uint64((1 << width) - 1)


def reduce(x: Words, width: int) -> Words:
    """x mod 2^width; x itself when width is 64. Exact for any |x| < 2^(width − 1)."""
    assert x.dtype == np.uint64
    return x if width == WORD_BITS else x & mask_of(width)


def to_signed(x: Words, width: int) -> NDArray[np.int64]:
    """The representative in [−2^(width−1), 2^(width−1)) of words mod 2^width."""
    signed: NDArray[np.int64] = (x << np.uint64(WORD_BITS - width)).view(np.int64)
    return signed >> np.int64(WORD_BITS - width)


def from_signed(x: NDArray[np.int64], width: int) -> Words:
    """Two's complement: int64 → words mod 2^width."""
    assert x.dtype == np.int64
    return reduce(np.ascontiguousarray(x).view(np.uint64), width)


def encode(x: NDArray[np.floating], frac_bits: int, width: int) -> Words:
    """round(x · 2^frac_bits) mod 2^width. Error: half an ulp.

    Domain: |x| < 2^(width − 1 − frac_bits).
    """
    scaled = np.rint(np.ldexp(np.asarray(x, np.float64), frac_bits))
    assert bool(np.all(np.abs(scaled) < 2.0**63)), "out of the ring"
    return from_signed(scaled.astype(np.int64), width)


def decode(x: Words, frac_bits: int, width: int) -> NDArray[np.float64]:
    """Inverse of `encode`: signed value / 2^frac_bits."""
    return np.ldexp(to_signed(x, width).astype(np.float64), -frac_bits)


def words_of(values: Sequence[int], shape: tuple[int, ...], width: int) -> Words:
    """Public Python integers (any sign) as words mod 2^width."""
    m = (1 << width) - 1
    return np.array([v & m for v in values], np.uint64).reshape(shape)
