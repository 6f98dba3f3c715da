"""Softmax and its logarithm over one axis.

Where the range of x is narrow, no maximum is needed: e^(x − centre) is made by squaring a smaller
power, so that it is right relatively, however small. Else the maximum is subtracted first.
"""

from __future__ import annotations

from math import log

from mpcserve.compiler.builder import Builder, Ref
from mpcserve.compiler.functions import reduce_max, with_frac_bits
from mpcserve.compiler.roots import divide, logarithm
from mpcserve.compiler.smooth import SMALL_TOP, exp

NARROW = 16.5
"""Ranges up to here need no maximum."""

FINE_BITS = 22
"""Fraction bits of e^(x − centre), which may be as small as e^−8."""


def softmax(b: Builder, x: Ref, axis: int) -> Ref:
    """e^x / Σ e^x. Error: 1e-4. Rounds: 8 to 10 for a narrow range; else 8 and the maximum's."""
    powers, total, _ = _powers(b, x, axis)
    return b.within(divide(b, powers, total, ratio=1.0), -(2.0**-12), 1.0 + 2.0**-12)


def log_softmax(b: Builder, x: Ref, axis: int) -> Ref:
    """x − log Σ e^x. Error: 2e-4. Rounds: 7 to 9 for a narrow range; else 7 and the maximum's."""
    _, total, shifted = _powers(b, x, axis)
    y = b.sub(shifted, with_frac_bits(b, logarithm(b, total), shifted.frac_bits))
    held = b.interval(x)
    return b.within(y, -(held.most - held.least) - _log_count(x, axis) - 0.01, 0.01)


def log_sum_exp(b: Builder, x: Ref, axis: int) -> Ref:
    """log Σ e^x, the axis kept with length 1. Error: 2e-4. Rounds: as `log_softmax`."""
    x = with_frac_bits(b, x, b.frac_bits)
    _, total, shifted = _powers(b, x, axis)
    offset = b.sub(b.slice(x, axis, 0, 1), b.slice(shifted, axis, 0, 1))
    held = b.interval(x)
    y = b.add(logarithm(b, total), offset)
    return b.within(y, held.least - 0.01, held.most + _log_count(x, axis) + 0.01)


def _powers(b: Builder, x: Ref, axis: int) -> tuple[Ref, Ref, Ref]:
    """(e^t, Σ e^t, t) with t = x − centre, or x − its maximum."""
    x = with_frac_bits(b, x, b.frac_bits)
    held, count = b.interval(x), x.shape[axis]
    spread = held.most - held.least
    if spread <= NARROW:
        t = b.offset(x, -(held.most + held.least) / 2)
        powers = exp(b, t, max(FINE_BITS, b.frac_bits), direct=SMALL_TOP)
        return powers, _total(b, powers, axis), t
    highest = reduce_max(b, x, axis)
    t = b.within(b.sub(x, highest), -spread, 0.0)
    powers = exp(b, t)
    slack = count * 2.0 ** (2 - b.frac_bits)
    return powers, b.within(_total(b, powers, axis), 1.0 - slack, count + slack), t


def _total(b: Builder, x: Ref, axis: int) -> Ref:
    return b.reshape(b.sum(x, [axis]), [1 if i == axis else d for i, d in enumerate(x.shape)])


def _log_count(x: Ref, axis: int) -> float:
    return log(x.shape[axis])
