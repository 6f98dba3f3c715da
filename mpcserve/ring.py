"""Z_2^n and fixed point: how a real number becomes a ring element and back.

A real v is the integer round(v · 2^frac_bits), taken mod 2^width, in a word whose bits above the
width are zero: a uint32 where 32 bits suffice, else a uint64. Unsigned words are a trap in NumPy (a
Python int or an int64 operand may promote), so every constant is made in the word's own type.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

U64 = np.uint64
Words = NDArray[np.unsignedinteger[Any]]
"""uint64, or uint32 for values of at most 32 bits."""

WORD_BITS = 64
HALF_BITS = 32


def word_type(width: int) -> type[np.uint32] | type[np.uint64]:
    """The word that holds `width` bits, 1 ≤ width ≤ 64."""
    assert 1 <= width <= WORD_BITS
    return np.uint32 if width <= HALF_BITS else np.uint64


def as_words(x: Words, width: int) -> Words:
    """x in words of `width` bits; high bits may be left over. Narrowing is mod 2^32."""
    return x.astype(word_type(width), copy=False)


def reduce(x: Words, width: int) -> Words:
    """x mod 2^width, in its word. Exact for any |x| < 2^(width − 1)."""
    assert x.dtype in (np.uint32, np.uint64)
    word = word_type(width)
    x = x.astype(word, copy=False)
    return x if width in (HALF_BITS, WORD_BITS) else x & word((1 << width) - 1)


def to_signed(x: Words, width: int) -> NDArray[np.int64]:
    """The representative in [−2^(width−1), 2^(width−1)) of words mod 2^width."""
    high = np.asarray(x.astype(np.uint64) << np.uint64(WORD_BITS - width))
    return np.asarray(high.view(np.int64) >> np.int64(WORD_BITS - width))


def from_signed(x: NDArray[np.int64], width: int) -> Words:
    """Two's complement: int64 → words mod 2^width."""
    assert x.dtype == np.int64
    return reduce(np.asarray(x, order="C").view(np.uint64), width)


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
    try:
        integers = np.asarray(values, np.int64)
    except OverflowError:  # beyond ±2^63, as factors of a ring of 64 bits may be
        integers = np.array([v & ((1 << WORD_BITS) - 1) for v in values], np.uint64)
    return reduce(integers.view(np.uint64), width).reshape(shape)
