"""Products of products: their range grows, so they give up fraction bits in time to fit 64 bits."""

from __future__ import annotations

from collections.abc import Sequence

from mpcserve.compiler.builder import Builder, Ref
from mpcserve.compiler.functions import with_frac_bits
from mpcserve.compiler.values import WIDEST_BOUND

FEWEST_BITS = 4
"""Partial products keep at least these; a range that leaves fewer does not fit."""


def fitting(b: Builder, pair: Sequence[Ref]) -> Ref:
    """The product of two values with as many fraction bits as fit."""
    whole = sum(b.bound(p) - p.frac_bits for p in pair)
    # Two factors of f bits before their product is truncated: whole + 2f bits.
    room = (WIDEST_BOUND - whole) // 2
    bits = max(min(room, *(p.frac_bits for p in pair)), FEWEST_BITS)
    x, y = (with_frac_bits(b, p, bits) for p in pair)
    return b.mul(x, y, to=bits)
