"""Convolutions with fewer products: 3×3 taps, stride 1, by patches of the image, exact mod 2^n.

A patch of (side + 2)² words of a channel gives side² outputs. It is spread to 36 words by sums with
small coefficients, and so is, once, the kernel. Their 36 products, added up over the channels, give
the outputs by sums again. In each dimension these are six products for three or four outputs of
three taps each, where the definition has nine or twelve.

Winograd's usual forms divide by 2, which has no inverse mod 2^n. KARATSUBA, the transpose of the
three-way Karatsuba product, divides by nothing: 4 products an output instead of 9, in every ring.
TOOM is the transpose of the product of a quadratic and a cubic by their values at 0, ∞, 1, −1, 2
and 1/2: two points of each class mod 2, so that each value is divided by 2 once and by odd numbers,
which have inverses. 2.25 products an output, and 4 times the output comes out: of a word all bits
but two are right.

Which is used, if any, follows from shapes and from the ring.
Sources: Karatsuba and Ofman, 1962; Toom, 1963; Winograd, "Arithmetic Complexity of Computations",
1980; Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from mpcserve.kernels.linear_image import Geometry
from mpcserve.ring import Words, word_type

TAPS, POINTS = 3, 6
PLANES = POINTS * POINTS
"""Products of a patch and a kernel."""

FEW_CHANNELS = 16
"""Of input or output: spreading and summing take longer than the products that are spared."""

Terms = Sequence[Any]


@dataclass(frozen=True, slots=True)
class Bilinear:
    """`side` outputs of three taps by six products: sums(spread(d) · weigh(g)) = 2^(spare / 2) · y.

    y_i = Σ_j g_j · d_(i+j). The three maps take and give words, arrays of words, or anything that
    is added, subtracted and multiplied by small integers. `spare`: bits lost in two dimensions. It
    pays from so many `patches` on, and from so much `work`: patches times channels.
    """

    name: str
    side: int
    spare: int
    patches: int
    work: int
    spread: Callable[[Terms], Terms]
    weigh: Callable[[Terms, int], Terms]
    sums: Callable[[Terms], Terms]

    @property
    def reach(self) -> int:
        """Words of a row of a patch."""
        return self.side + TAPS - 1


def _karatsuba_spread(d: Terms) -> Terms:
    d0, d1, d2, d3, d4 = d
    return d0 - (d1 + d2), d2 - (d1 + d3), d4 - (d2 + d3), d1, d2, d3


def _karatsuba_weigh(g: Terms, bits: int) -> Terms:
    g0, g1, g2 = g
    return g0, g1, g2, g0 + g1, g0 + g2, g1 + g2


def _karatsuba_sums(m: Terms) -> Terms:
    m0, m1, m2, m01, m02, m12 = m
    return m0 + m01 + m02, m1 + m01 + m12, m2 + m02 + m12


def _toom_spread(d: Terms) -> Terms:
    d0, d1, d2, d3, d4, d5 = d
    p, q = d1 - d3, d2 - d4
    less, more = q - p, q + p
    at_zero, at_infinity = 2 * (d0 - d4) - 5 * p, 2 * (d5 - d1) + 5 * q
    at_one, at_minus_one = 2 * less + (d2 + d3), 2 * more - 9 * (d2 - d3)
    return at_zero, at_one, at_minus_one, q + less, less - p, at_infinity


def _toom_weigh(g: Terms, bits: int) -> Terms:
    g0, g1, g2 = g
    by = -pow(9, -1, 1 << bits) % (1 << bits)
    at_one, at_minus_one = g0 + g1 + g2, by * (g0 - g1 + g2)
    return g0, at_one, at_minus_one, by * (g0 + 2 * g1 + 4 * g2), by * (4 * g0 + 2 * g1 + g2), g2


def _toom_sums(m: Terms) -> Terms:
    m0, m1, m2, m3, m4, m5 = m
    even, odd = m1 + m2, m1 - m2
    first, last = m0 + even + m3 + 8 * m4, odd + 8 * m3 + m4 + m5
    return first, odd + 2 * m3 + 4 * m4, even + 4 * m3 + 2 * m4, last


KARATSUBA = Bilinear(
    "karatsuba", 3, 0, 25, 2048, _karatsuba_spread, _karatsuba_weigh, _karatsuba_sums
)
TOOM = Bilinear("toom", 4, 2, 16, 512, _toom_spread, _toom_weigh, _toom_sums)


def weigh(w: Words, by: Bilinear) -> Words:
    """[O, C, 3, 3] → [PLANES, O, C]: kernels as they meet spread patches."""
    bits = 8 * w.itemsize
    across = by.weigh(list(np.ascontiguousarray(w.transpose(3, 2, 0, 1))), bits)
    planes = [by.weigh(list(column), bits) for column in across]
    return np.stack([planes[x][y] for y in range(POINTS) for x in range(POINTS)])


def bilinear_for(g: Geometry, ring: int) -> Bilinear | None:
    """What computes a convolution by a packed weight mod 2^ring in less time, if anything does.

    Where there are few patches, reading four times the words of a weight takes longer than the
    products that are spared; where there are few channels, spreading and summing do.
    """
    if (g.w_shape[2:], g.strides, g.dilations) != ((TAPS, TAPS), (1, 1), (1, 1)):
        return None
    by = TOOM if ring + TOOM.spare <= 8 * np.dtype(word_type(ring)).itemsize else KARATSUBA
    patches = prod(-(-size // by.side) for size in g.out_shape[2:])
    patches *= g.x_shape[0] if g.groups == 1 else 1
    few = min(g.w_shape[1], g.rows) < FEW_CHANNELS or patches < by.patches
    return None if few or patches * g.w_shape[1] < by.work else by
