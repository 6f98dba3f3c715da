"""Convolutions with fewer products: 3×3 taps, stride 1, on patches of the image, exact mod 2^n.

A patch of (side + 2)² words of a channel gives side² outputs. It is spread to 36 words by sums with
small coefficients, the taps of a filter likewise, once; the 36 products, summed over the channels,
give the outputs by sums again. In one dimension these are six products for three or four outputs
of three taps each, where the definition has nine or twelve.

Winograd's usual forms divide by 2, which has no inverse mod 2^n. KARATSUBA, the transpose of the
three-way Karatsuba product, divides by nothing: 4 products an output instead of 9, in every ring.
TOOM, the transpose of the product of a quadratic and a cubic by their values at 0, ∞, 1, −1, 2 and
1/2, two points of each class mod 2, divides by odd numbers, which have inverses, and once by 2 in
each dimension: 2.25 products an output. Its sums are 4 times the outputs, so that of a word all
bits but two are known.

Everything here follows from shapes and from the ring. It also says when this is worth its sums.
Sources: Karatsuba and Ofman, 1962; Toom, 1963; Winograd, "Arithmetic Complexity of Computations", 1980.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpcserve.ring import Words

TAPS, POINTS = 3, 6
PLANES = POINTS * POINTS
"""Products of a patch with a filter."""

Six = Sequence[Any]


@dataclass(frozen=True, slots=True)
class Filter:
    """side outputs of three taps by six products: sums(spread(d) · weigh(g)) = 2^(spare / 2) · y.

    y_i = Σ_j g_j · d_(i+j). The three maps take and give words, arrays of words, or anything that
    is added, subtracted and multiplied by small integers. `spare`: bits lost in two dimensions.
    """

    name: str
    side: int
    spare: int
    spread: Callable[[Six], Six]
    weigh: Callable[[Six, int], Six]
    sums: Callable[[Six], Six]

    @property
    def reach(self) -> int:
        """Words of a row of a patch."""
        return self.side + TAPS - 1


def _karatsuba_spread(d: Six) -> Six:
    d0, d1, d2, d3, d4 = d
    return d0 - (d1 + d2), d2 - (d1 + d3), d4 - (d2 + d3), d1, d2, d3


def _karatsuba_weigh(g: Six, bits: int) -> Six:
    g0, g1, g2 = g
    return g0, g1, g2, g0 + g1, g0 + g2, g1 + g2


def _karatsuba_sums(m: Six) -> Six:
    m0, m1, m2, m01, m02, m12 = m
    return m0 + m01 + m02, m1 + m01 + m12, m2 + m02 + m12


def _toom_spread(d: Six) -> Six:
    d0, d1, d2, d3, d4, d5 = d
    p, q = d1 - d3, d2 - d4
    less, more = q - p, q + p
    at_zero, at_infinity = 2 * (d0 - d4) - 5 * p, 2 * (d5 - d1) + 5 * q
    at_one, at_minus_one = 2 * less + (d2 + d3), 2 * more - 9 * (d2 - d3)
    return at_zero, at_one, at_minus_one, q + less, less - p, at_infinity


def _toom_weigh(g: Six, bits: int) -> Six:
    g0, g1, g2 = g
    by = -pow(9, -1, 1 << bits) % (1 << bits)
    at_one, at_minus_one = g0 + g1 + g2, by * (g0 - g1 + g2)
    return g0, at_one, at_minus_one, by * (g0 + 2 * g1 + 4 * g2), by * (4 * g0 + 2 * g1 + g2), g2


def _toom_sums(m: Six) -> Six:
    m0, m1, m2, m3, m4, m5 = m
    even, odd = m1 + m2, m1 - m2
    return (
        m0 + even + m3 + 8 * m4,
        odd + 2 * m3 + 4 * m4,
        even + 4 * m3 + 2 * m4,
        odd + 8 * m3 + m4 + m5,
    )


KARATSUBA = Filter("karatsuba", 3, 0, _karatsuba_spread, _karatsuba_weigh, _karatsuba_sums)
TOOM = Filter("toom", 4, 2, _toom_spread, _toom_weigh, _toom_sums)


def weigh(w: Words, by: Filter) -> Words:
    """[O, C, 3, 3] → [PLANES, O, C]: the filters as they meet patches."""
    bits = 8 * w.itemsize
    columns = by.weigh(np.ascontiguousarray(w.transpose(3, 2, 0, 1)), bits)
    planes = [by.weigh(column, bits) for column in columns]
    return np.stack([planes[x][y] for y in range(POINTS) for x in range(POINTS)])
