"""Whole numbers of fixed point: floor, rounding, remainders. Exact on the grid.

The low f bits of x are x mod 2^f: free, but without a bit to spare. Their highest bit, a sign, says
which half they are in; a select promised to be positive then reads them in either half.

Cost, of f + 1 bits: 3 rounds, a sign of f bits, and twice the result's width each way.
"""

from __future__ import annotations

import numpy as np

from mpcserve.compiler.booleans import negative
from mpcserve.compiler.builder import Builder, Ref


def remainder(b: Builder, x: Ref, bits: int) -> Ref:
    """x mod 2^bits ulp, in [0, 2^bits) ulp. Cost: 3 rounds."""
    unit = 2.0 ** (bits - x.frac_bits)
    if b.bound(x) < bits:
        top = negative(b, x)
        rest = b.add(x, b.number(top, unit, x.frac_bits))
    else:
        low = b.wrap(x, bits)
        high = b.wrap(b.offset(x, -unit / 2), bits)
        top = b.sign(low)
        rest = b.pick([b.flip(top), top], [low, high], nonnegative=True)
        rest = b.add(rest, b.number(top, unit / 2, x.frac_bits))
    return b.within(rest, 0.0, unit - 2.0**-x.frac_bits)


def floor(b: Builder, x: Ref) -> Ref:
    """The greatest whole number that is not above x. Cost: 3 rounds."""
    if not x.frac_bits:
        return x
    held = b.interval(x)
    return b.within(b.sub(x, remainder(b, x, x.frac_bits)), np.floor(held.low), np.floor(held.high))


def truncated(b: Builder, x: Ref) -> Ref:
    """The whole number next to x towards zero. Cost: 3 rounds for x ≥ 0, else 4."""
    if not x.frac_bits:
        return x
    held = b.interval(x)
    if held.least >= 0:
        return floor(b, x)
    if held.most <= 0:
        return b.scale(floor(b, b.scale(x, -1)), -1)
    # Below zero one more, unless x is whole: its low bits and theirs negated are then both zero.
    bits = x.frac_bits
    below, low = b.sign(x), b.sign(b.wrap(x, bits))
    mirrored = b.sign(b.wrap(b.scale(x, -1), bits))
    fraction = b.xor([b.all([below, low], [1, 1]), b.all([below, low, mirrored], [1, 0, 1])])
    whole = b.add(b.sub(x, remainder(b, x, bits)), b.number(fraction, 1.0, bits))
    return b.within(whole, np.trunc(held.low), np.trunc(held.high))


def rounded(b: Builder, x: Ref) -> Ref:
    """The nearest whole number, of two the even one. Cost: 4 rounds."""
    if not x.frac_bits:
        return x
    held, bits = b.interval(x), x.frac_bits
    up = b.offset(x, 0.5)
    # A tie went up to an odd number: x + ½ is 1 mod 2, so it is 0 after taking 1 away.
    odd = b.offset(up, -1.0)
    tie = b.all([b.sign(b.wrap(odd, bits + 1)), b.sign(b.wrap(b.scale(odd, -1), bits + 1))], [0, 0])
    whole = b.sub(b.sub(up, remainder(b, up, bits)), b.number(tie, 1.0, bits))
    return b.within(whole, np.rint(held.low), np.rint(held.high))
