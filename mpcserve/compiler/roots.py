"""Functions with a pole or a branch at zero: 1/x, x/y, 1/√x, √x, log x, powers.

A positive x is brought into [1, 4] by a power of four that comparisons find: x is held against
every threshold t·4^j of its range at once, coarsely, so that both answers are right near a
threshold; the factor is a weighted sum of those bits. Waves do the rest on [1, 4].

Domain: x must be positive. Where its range is not, but is only assumed, calibrated or computed from
several values that may depend on each other, x is taken to be at least 2^FLOOR_BITS ulp, or what
the caller says; below that one more comparison lifts it to a few times as much, never garbage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor, frexp, log, log2

import numpy as np
from numpy.typing import NDArray

from mpcserve.compiler.builder import Builder, Ref
from mpcserve.compiler.fourier import Curve
from mpcserve.compiler.functions import aligned, clip, times, with_frac_bits
from mpcserve.compiler.problems import TooWide
from mpcserve.compiler.smooth import exp, spectral, stated

Reals = NDArray[np.float64]
Spread = Callable[[Builder, Ref], Ref]

FLOOR_BITS = 2
"""A value that is not known to be larger is taken to be at least 2^2 ulp."""

STEPS = 16
"""A threshold is 16 or 17 steps of its comparison: it may be off by an eighth."""

UNIT_LOW, UNIT_HIGH = 15.0 / STEPS, 4 * 18.0 / STEPS
"""What [1, 4] becomes when thresholds are coarse."""

SURELY_ABOVE = 17.5 / STEPS
"""A shift errs by less than 1.5 steps: no value from here on is taken to be below a threshold that
lies a step lower."""

UNIT_BITS = 20
"""Fraction bits of a value in [1, 4]."""

LIFT = 2.0
"""What is added to a value below [1, 4]: then it is there, be it a few ulp below zero."""

PART_BITS = 2
"""Fraction bits, beyond the result's, of the two factors that make it."""

FINEST_BITS = 6
"""Further ones that a finer result may ask of its mantissa: what it adds is its exponent."""


def inverse_curve(x: Reals, scale: float = 1.0) -> Reals:
    """scale / x."""
    return np.asarray(scale / x)


def inverse_root_curve(x: Reals, scale: float = 1.0) -> Reals:
    """scale / √x."""
    return np.asarray(scale / np.sqrt(x))


def log_curve(x: Reals, scale: float = 1.0) -> Reals:
    """log(scale·x)."""
    return np.log(scale * x)


@dataclass(frozen=True, slots=True)
class Scaled:
    """x · factor lies in [1, 4], a little wider, for factor = 4^−j / base and j set bits.

    `bits`: [x ≥ base·4^j], j = 1 …; none where one factor does for all x. `low`: [x < base], where
    that may be: then x · factor lies below 1.
    """

    x: Ref
    base: float
    bits: tuple[Ref, ...]
    low: Ref | None = None

    def weights(self, b: Builder, f: Callable[[float], float], frac_bits: int) -> Ref | float:
        """Σ over set bits: f(base·4^j) for the largest j whose bit is set. Cost: 1 round."""
        values = [f(self.base * 4.0**j) for j in range(len(self.bits) + 1)]
        if not self.bits:
            return values[0]
        steps = [after - before for before, after in pairwise(values)]
        chosen = b.offset(b.weighted(self.bits, steps, frac_bits), values[0])
        return b.within(chosen, min(values), max(values))

    def times_factor(
        self,
        b: Builder,
        y: Ref,
        power: float = 1.0,
        to: int | None = None,
        spread: Spread | None = None,
    ) -> Ref:
        """y · factor^power. Cost: 1 round after that of the weights; none for one factor."""
        smallest = self.base * 4.0 ** len(self.bits)
        bits = max(ceil(power * log2(smallest)), 0)
        factor = self.weights(b, lambda t: t**-power, bits)
        if isinstance(factor, float):
            return _times_power_of_two(b, y, factor, y.frac_bits if to is None else to)
        factor = spread(b, factor) if spread else factor
        return b.mul(y, factor, to=y.frac_bits if to is None else to)

    def unit(self, b: Builder) -> Ref:
        """x · factor, lifted where x is low: within [1, 4]."""
        found = self.times_factor(b, self.x, to=max(UNIT_BITS, b.frac_bits))
        if self.low is not None:
            found = b.within(found, -LIFT / 2, UNIT_HIGH)
            found = b.add(found, b.weighted([self.low], [LIFT], found.frac_bits))
        return b.within(found, UNIT_LOW, UNIT_HIGH)


def _times_power_of_two(b: Builder, y: Ref, factor: float, to: int) -> Ref:
    """y · 2^k at another scale: local."""
    k = round(log2(factor))
    return with_frac_bits(b, b.scale(y, 1, -k) if k else y, to)


def scaled(b: Builder, x: Ref, what: str, power: int = 2, least: float = 0.0) -> Scaled:
    """x with the comparisons that bring it into [1, 4]. Raises: Unsupported where x may be ≤ 0.

    `power`: base is a power of 2^power. `least`: of what is smaller nothing need be told apart.
    Cost: 1 to 3 rounds, where comparisons are needed.
    """
    low, high = _positive_range(b, x, what, least)
    may_be_low = b.one_side(x)[0] < low
    coarse = log2(STEPS / low) < x.frac_bits - 1
    lowest = SURELY_ABOVE if may_be_low and coarse else UNIT_LOW
    base = 2.0 ** (power * floor(log2(low / lowest) / power))
    count = max(ceil(log2(high / (base * UNIT_HIGH)) / 2), 0)
    bits = tuple(_at_least(b, x, base * 4.0 ** (j + 1)) for j in range(count))
    if not may_be_low:
        return Scaled(x, base, bits)
    return Scaled(x, base, bits, b.xor([_at_least(b, x, base, before=1)], flip=1))


def _at_least(b: Builder, x: Ref, threshold: float, before: int = 0) -> Ref:
    """[x > threshold], off by at most an eighth of it. `before`: so many steps lower."""
    bits = min(round(log2(STEPS / threshold)), x.frac_bits)
    coarse = b.shift(x, x.frac_bits - bits)
    return b.sign(b.offset(b.scale(coarse, -1), threshold - before * 2.0**-bits))


def _positive_range(b: Builder, x: Ref, what: str, floor: float = 0.0) -> tuple[float, float]:
    (low, high), least = b.one_side(x), 2.0 ** (FLOOR_BITS - x.frac_bits)
    sure = b.known(x) in ("exact", "proved") and b.is_tight(x)
    if high <= least or (low < -16 * least and sure):
        raise TooWide(
            f"{what} lies in [{low:.4g}, {high:.4g}], expected to be positive",
            "calibrate with samples (--calibrate), declare a positive --input-range, or add a "
            "small constant to it",
        )
    return max(low, least, min(floor, high)), high


def of_either_sign(b: Builder, x: Ref) -> bool:
    """Whether a divisor may be negative by more than errors of values that are positive."""
    (low, high), sure = b.one_side(x), b.known(x) in ("exact", "proved") and b.is_tight(x)
    slack = 16 * 2.0 ** (FLOOR_BITS - x.frac_bits)
    return low < -slack and (sure or low < -high / MOSTLY)


MOSTLY = 64
"""A range that goes this much farther up than down is that of a positive value with errors."""


def _size(b: Builder, x: Ref, below: Ref) -> Ref:
    """|x|, given the bit [x < 0]."""
    size = b.sub(x, b.pick([below], [b.scale(x, 2)]))
    return b.within(size, 0.0, b.interval(x).magnitude)


def _with_fraction(b: Builder, x: Ref) -> Ref:
    """x; whole numbers at the plan's scale, where they are far from its smallest ones."""
    return x if x.frac_bits else with_frac_bits(b, x, b.frac_bits)


def reciprocal(b: Builder, x: Ref, to: int | None = None) -> Ref:
    """1 / x. Error: 1e-5 relative and 1 ulp. Rounds: 1 to 6; 4 more for x of either sign.

    Cost:
        on [1, 2]: 1 round, 21 bits each way, 330 dealt
        on [0.01, 100]: 6 rounds, 132 bits each way, 1750 dealt
    """
    x = _with_fraction(b, x)
    if b.one_side(x)[1] <= 0:
        return b.scale(reciprocal(b, b.scale(x, -1), to), -1)
    if of_either_sign(b, x):
        below = b.sign(x)
        y = reciprocal(b, _size(b, x, below), to)
        return b.sub(y, b.pick([below], [b.scale(y, 2)]))
    found = scaled(b, x, "its divisor", 1)
    r = _inverse(b, found, b.frac_bits + PART_BITS)
    y = found.times_factor(b, r, to=b.frac_bits if to is None else to)
    return _stated_inverse(b, x, y, inverse_curve)


def divide(
    b: Builder, x: Ref, y: Ref, ratio: float | None = None, spread: Spread | None = None
) -> Ref:
    """x / y with broadcasting. Error: 1e-5 relative and 2 ulp.

    Rounds: 2 to 6; 3 more for y of either sign, whose |y| is taken to be 4 ulp at least. x is
    scaled while y is, so that no small 1 / y is ever rounded. `ratio`: a bound of |x / y| that
    intervals cannot see. `spread`: brings what is computed per divisor to the shape of x, where
    that is not by broadcasting.
    """
    y = _with_fraction(b, y)
    if b.one_side(y)[1] <= 0:
        return b.scale(divide(b, x, b.scale(y, -1), ratio, spread), -1)
    if of_either_sign(b, y):
        below = b.sign(y)
        shape = x.shape if spread else np.broadcast_shapes(x.shape, y.shape)
        wide = b.expand(spread(b, below) if spread else below, shape)
        turned = b.scale(b.expand(x, shape), 2)
        reach = b.interval(turned).magnitude / 2
        x = b.within(b.sub(b.expand(x, shape), b.pick([wide], [turned])), -reach, reach)
        return divide(b, x, _size(b, y, below), ratio, spread)
    found = scaled(b, y, "its divisor", 1)
    held, (low, _) = b.interval(x), _positive_range(b, y, "its divisor")
    top = held.magnitude / low if ratio is None else ratio
    part = found.times_factor(b, x, to=b.frac_bits + PART_BITS, spread=spread)
    most = min(top * UNIT_HIGH, b.interval(part).magnitude)
    b.within(part, -most if held.least < 0 else 0.0, most)
    inverse = _inverse(b, found, b.frac_bits + PART_BITS)
    z = b.mul(part, spread(b, inverse) if spread else inverse)
    slack = 4 * 2.0**-b.frac_bits + top * 2.0**-14
    return b.within(z, -top - slack if held.least < 0 else -slack, top + slack)


def _inverse(b: Builder, found: Scaled, to: int) -> Ref:
    """1 / (x · factor), within [¼, 1]."""
    return _of_unit(b, found, inverse_curve, to)


def _of_unit(b: Builder, found: Scaled, f: Curve, to: int, scale: float = 1.0) -> Ref:
    """f(x · factor, scale). Cost: 2 rounds after that of the factor."""
    unit = found.unit(b)
    held = b.interval(unit)
    error, bits = 2.0 ** -(to - 1), to + 2
    y = spectral(b, unit, f, held.least, held.most, (scale,), error, to, bits)
    return stated(b, unit, y, f, (scale,))


def inverse_root(
    b: Builder, x: Ref, to: int | None = None, scale: float = 1.0, least: float = 0.0
) -> Ref:
    """scale / √x for x > 0, and for x below `least` about scale / √least.

    Error: 1e-5 relative and 1 ulp. Rounds: 1 to 6.

    Cost:
        on [0.01, 100]: 6 rounds, 151 bits each way, 1547 dealt
    """
    to = b.frac_bits if to is None else to
    mantissa, exponent = frexp(scale)
    x = _with_fraction(b, x)
    found = scaled(b, x, "its radicand", least=least)
    finer = b.frac_bits + PART_BITS
    r = _of_unit(b, found, inverse_root_curve, min(max(to, finer), finer + FINEST_BITS), mantissa)
    y = found.times_factor(b, r, 0.5, to + exponent)
    y = b.scale(y, 1, -exponent) if exponent else y
    return _stated_inverse(b, x, y, inverse_root_curve, scale, least)


def root(b: Builder, x: Ref, to: int | None = None) -> Ref:
    """√x for x ≥ 0. Error: 1e-5 relative and 2 ulp; 2^−7 below 4 ulp. Rounds: 2 to 7.

    Cost:
        on [0.01, 100]: 6 rounds, 222 bits each way, 1936 dealt
    """
    x = with_frac_bits(b, x, max(x.frac_bits, b.frac_bits))
    found = scaled(b, x, "its radicand")
    # √x = (x·√factor) · 1/√(x·factor): x is scaled while the waves are made.
    part = found.times_factor(b, x, 0.5, b.frac_bits + PART_BITS)
    most = b.interval(x).most ** 0.5
    b.within(part, b.interval(part).least, 2.2 * most)
    r = _of_unit(b, found, inverse_root_curve, b.frac_bits + PART_BITS)
    y = b.mul(part, r, to=b.frac_bits if to is None else to)
    slack = 4 * 2.0**-y.frac_bits
    low = max(b.interval(x).least, 0.0) ** 0.5
    return b.within(y, low - slack if low else -slack, most * (1 + 2.0**-12) + slack)


def logarithm(b: Builder, x: Ref) -> Ref:
    """log x for x > 0. Error: 4e-5. Rounds: 1 to 5.

    Cost:
        on [1, 2]: 1 round, 18 bits each way, 300 dealt
        on [0.01, 100]: 5 rounds, 121 bits each way, 1384 dealt
    """
    x = _with_fraction(b, x)
    found = scaled(b, x, "its argument")
    unit = found.unit(b)
    held, (low, high) = b.interval(unit), _positive_range(b, x, "its argument")
    y = spectral(b, unit, log_curve, held.least, held.most)
    whole = found.weights(b, log, b.frac_bits)
    y = b.offset(y, whole) if isinstance(whole, float) else b.add(y, whole)
    slack = 8 * 2.0**-b.frac_bits
    return b.within(y, log(low) - 0.5 - slack, log(high) + slack)


def _stated_inverse(
    b: Builder, x: Ref, y: Ref, f: Curve, scale: float = 1.0, least: float = 0.0
) -> Ref:
    low, high = _positive_range(b, x, "its argument", least)
    ends = f(np.array([high, low]), scale)
    slack = 4 * 2.0**-y.frac_bits
    return b.within(y, float(ends[0]) * (1 - 2.0**-12) - slack, float(ends[1]) * 1.25 + slack)


def power(b: Builder, x: Ref, exponent: float) -> Ref:
    """x^exponent: products for whole numbers, roots for ±½, else e^(exponent · log x) for x > 0."""
    if exponent == 0.5:
        return root(b, x)
    if exponent == -0.5:
        return inverse_root(b, x)
    if float(exponent).is_integer() and abs(exponent) <= 64:
        y = whole_power(b, x, int(abs(exponent)))
        return y if exponent >= 0 else reciprocal(b, y)
    logs = times(b, logarithm(b, x), exponent)
    if exponent < 0 and b.interval(logs).most > HIGHEST_POWER:
        # Next to zero, where a negative power has no end, it stays at e^20.
        logs = clip(b, logs, None, HIGHEST_POWER)
    return exp(b, logs)


HIGHEST_POWER = 20.0
"""Negative powers of numbers near zero reach e^20 and no more."""


def whole_power(b: Builder, x: Ref, n: int) -> Ref:
    """x^n by repeated squaring: about log2 n rounds. Error: n ulp of the intermediate values."""
    x = with_frac_bits(b, x, b.frac_bits)
    if n == 0:
        return b.offset(b.scale(x, 0), 1.0)
    y: Ref | None = None
    square = x
    while True:
        if n & 1:
            y = square if y is None else b.mul(y, square)
        n >>= 1
        if not n:
            break
        square = b.mul(square, square)
    assert y is not None
    return y


def secret_power(b: Builder, x: Ref, y: Ref) -> Ref:
    """x^y for a secret exponent and x > 0: e^(y · log x)."""
    exponent, logs = aligned(b, y, logarithm(b, x))
    return exp(b, b.mul(exponent, logs))
