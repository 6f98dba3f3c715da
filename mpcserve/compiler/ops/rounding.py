"""Floor, Ceil, Round, Mod: exact on the grid of fixed point."""

from __future__ import annotations

import numpy as np

from mpcserve.compiler import whole
from mpcserve.compiler.booleans import bit_of, negative, zero
from mpcserve.compiler.builder import Builder, Operand, Ref
from mpcserve.compiler.functions import absolute, aligned, with_frac_bits
from mpcserve.compiler.problems import Unsupported
from mpcserve.compiler.registry import lowers
from mpcserve.compiler.roots import divide


@lowers("Floor", since=6)
def floor(b: Builder, x: Ref, /) -> Ref:
    """⌊x⌋: a sign of the fraction and a select, 3 rounds."""
    return whole.floor(b, x)


@lowers("Ceil", since=6)
def ceil(b: Builder, x: Ref, /) -> Ref:
    """⌈x⌉: a sign of the fraction and a select, 3 rounds."""
    return b.scale(whole.floor(b, b.scale(x, -1)), -1)


@lowers("Round", since=11)
def round_(b: Builder, x: Ref, /) -> Ref:
    """The nearest whole number, of two the even one: 4 rounds."""
    return whole.rounded(b, x)


MOST_TURNS = 2.0**13
"""x may be this many times the divisor: its quotient then errs by less than one."""


@lowers("Mod", since=10)
def mod(b: Builder, x: Operand, y: Operand, /, *, fmod: int = 0) -> Ref:
    """The remainder of x / y, with the sign of x for `fmod`, else of y: a division and 8 rounds.

    Exact on the grid for |x / y| < 2^13. A power of two as a constant divisor takes 3 rounds.
    """
    if (bits := _power_of_two(x, y, fmod)) is not None:
        assert isinstance(x, Ref)
        return whole.remainder(b, x, bits)
    below: Ref
    if isinstance(y, Ref):
        below = negative(b, y)
    else:
        below, y = bit_of(b, y < 0), np.abs(y)
    x, y = (with_frac_bits(b, v, b.frac_bits) for v in aligned(b, x, y))
    size, step = absolute(b, x), absolute(b, y)
    turns = b.interval(size).most / max(b.interval(step).least, 2.0**-b.frac_bits)
    if b.interval(step).least <= 0 or turns > MOST_TURNS:
        raise Unsupported(
            f"its quotient may reach {turns:.3g}, expected at most {MOST_TURNS:g}",
            "calibrate with samples (--calibrate) or narrow --input-range",
        )
    count = whole.floor(b, divide(b, size, step))
    rest = b.sub(size, b.mul(count, step))
    # The quotient errs by less than one, so the remainder is off by one divisor at most.
    most = b.interval(step).high
    b.within(rest, -most, 2 * most)
    low, high = negative(b, rest), b.flip(negative(b, b.sub(rest, step)))
    shape = rest.shape
    gain = b.choose([low, high], [b.expand(step, shape), b.scale(b.expand(step, shape), -1)])
    rest = b.within(b.add(rest, gain), np.zeros_like(most), most)
    return _signed(b, rest, x, below, step, fmod)


def _signed(b: Builder, rest: Ref, x: Ref, under: Ref, step: Ref, fmod: int) -> Ref:
    """The remainder of the sizes, with the sign that is asked for."""
    shape = rest.shape
    below = b.expand(negative(b, x), shape)
    if fmod:
        return b.sub(rest, b.pick([below], [b.scale(rest, 2)]))
    # Of unlike signs the remainder is counted from the other side, if there is one.
    under = b.expand(under, shape)
    other = b.all([b.xor([below, under]), zero(b, rest)], [1, 0])
    far = b.sub(b.expand(step, shape), b.scale(rest, 2))
    rest = b.add(rest, b.pick([other], [far]))
    most = b.interval(step).high
    b.within(rest, np.zeros_like(most), most)
    return b.sub(rest, b.pick([under], [b.scale(rest, 2)]))


def _power_of_two(x: Operand, y: Operand, fmod: int) -> int | None:
    """log2 of a public positive divisor in ulps of x, where nothing but low bits are asked for."""
    if not isinstance(x, Ref) or isinstance(y, Ref) or np.size(y) != 1 or np.ndim(y) > len(x.shape):
        return None
    value = float(np.asarray(y).ravel()[0])
    mantissa, exponent = np.frexp(value)
    bits = int(exponent) - 1 + x.frac_bits
    return bits if mantissa == 0.5 and not fmod and bits >= 2 else None
