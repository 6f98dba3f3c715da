"""Circular and hyperbolic functions and their inverses.

Where waves fit a function on the whole range of x, it is one round. Beyond, a division, a root or a
logarithm brings it back. Domains are those of the real functions; outside, where only samples or
assumptions say that x does not go there, x is taken at the end of the domain.

Error: at most 1e-3·max(1, |y|), mostly below 1e-4.
"""

from __future__ import annotations

from math import ceil, log, log2, pi

import numpy as np
from numpy.typing import NDArray

from mpcserve.compiler import fourier
from mpcserve.compiler.booleans import less, negative
from mpcserve.compiler.builder import Builder, Ref
from mpcserve.compiler.ends import level
from mpcserve.compiler.fourier import Curve
from mpcserve.compiler.functions import absolute, clip, times, with_frac_bits
from mpcserve.compiler.problems import Unsupported
from mpcserve.compiler.roots import divide, logarithm, root
from mpcserve.compiler.smooth import (
    FEWEST_WAVE_BITS,
    GUARD_BITS,
    MOST_WAVE_BITS,
    exp,
    sine,
    spectral,
    stated,
)

Reals = NDArray[np.float64]

ACCEPTED = 4.0
"""A fit that errs by this many ulps is taken."""

FINE_BITS = 20
"""Fraction bits of the sine and cosine whose quotient is the tangent."""

FINE_SQUARE = 26
"""Fraction bits of a radicand that may be near zero, where a root is steep."""

ROOM = 58
"""Bits of a square and its fraction together."""

LIFT = 8
"""Ulps by which such a radicand is raised: roots of less are not to be had."""

NEAR_END = 15 / 16
"""Beyond, next to ±1, no waves fit a function that is steep there."""

SURE_COSINE = 2.0**-6
"""A cosine that is larger than this on the whole range is known to be positive."""


def arc_core(x: Reals) -> Reals:
    """acos(x) / √(1 − x), smooth on [0, 1]."""
    rest = np.maximum(1.0 - x, 1e-12)
    return np.asarray(np.arccos(1.0 - rest) / np.sqrt(rest))


def _direct(b: Builder, x: Ref, f: Curve) -> Ref | None:
    """f(x) by waves in 1 round, or None where none fit its range."""
    held, error = b.interval(x), 2.0**-b.frac_bits
    low, high = fourier.rounded_out(held.least, held.most)
    if high - low > 64.0 or high <= low:
        return None
    bits = min(max(int(b.frac_bits) + GUARD_BITS, FEWEST_WAVE_BITS), MOST_WAVE_BITS)
    fit = fourier.fitted(f, (), low, high, error, bits, b.frac_bits)
    if fit.error > ACCEPTED * error:
        return None
    return stated(b, x, spectral(b, x, f, held.least, held.most), f)


def _within_domain(b: Builder, x: Ref, low: float, high: float) -> Ref:
    """x, cut off at the ends of a domain. Raises: Unsupported where x is known to go beyond."""
    held = b.interval(x)
    slack = 2.0 ** (1 - x.frac_bits)
    outside = held.least < low - slack or held.most > high + slack
    sure = b.known(x) in ("exact", "proved") and b.is_tight(x)
    if (outside and sure) or held.most < low or held.least > high:
        raise Unsupported(
            f"its input lies in [{held.least:.4g}, {held.most:.4g}], expected [{low:g}, {high:g}]",
            "calibrate with samples (--calibrate) or declare --input-range",
        )
    if not outside:
        return x
    return clip(b, x, low, None if high == np.inf else high)


def tangent(b: Builder, x: Ref) -> Ref:
    """tan x. Rounds: 1 well inside ±π/2, else 8 to 12. Error near a pole: 1e-5·tan² x."""
    x = with_frac_bits(b, x, b.frac_bits)
    held = b.interval(x)
    inside = max(-held.least, held.most) < pi / 2 - SURE_COSINE
    if inside and (y := _direct(b, x, np.tan)) is not None:
        return y
    above, below = (sine(b, x, cosine=c, to=FINE_BITS) for c in (False, True))
    if inside:
        b.within(below, min(np.cos(held.least), np.cos(held.most)) - 2.0**-12, 1.0)
    return divide(b, above, below)


def arc_tangent(b: Builder, x: Ref) -> Ref:
    """atan x for every x. Rounds: 1 within about ±8, else 11. Error: 1e-4."""
    x = with_frac_bits(b, x, b.frac_bits)
    if (y := _direct(b, x, np.arctan)) is not None:
        return y
    # Beyond ±1 it is ±π/2 − atan(1 / x).
    bits = [less(b, level(b, x, 1.0), x), less(b, x, level(b, x, -1.0))]
    ends = [level(b, x, end) for end in (1.0, -1.0)]
    above = b.add(x, b.choose(bits, [b.sub(end, x) for end in ends]))
    b.within(above, -1.0, 1.0)
    one = level(b, x, 1.0)
    below = b.add(one, b.choose(bits, [b.sub(x, one), b.sub(b.scale(x, -1), one)]))
    b.within(below, 1.0, max(b.interval(x).magnitude, 1.0))
    turned = divide(b, above, below, ratio=1.0)
    w = spectral(b, turned, np.arctan, -1.0 - 2.0**-10, 1.0 + 2.0**-10)
    twice = b.scale(w, 2)
    far = [b.sub(level(b, w, end), twice) for end in (pi / 2, -pi / 2)]
    return stated(b, x, b.add(w, b.choose(bits, far)), np.arctan)


def arc_cosine(b: Builder, x: Ref) -> Ref:
    """acos x on [−1, 1]: √(1 − |x|) times a smooth function of |x|. Rounds: about 12."""
    return _arc(b, x, np.arccos)


def arc_sine(b: Builder, x: Ref) -> Ref:
    """asin x on [−1, 1]: π/2 − acos x. Rounds: 1 within about ±0.9, else about 12."""
    return _arc(b, x, np.arcsin)


def _arc(b: Builder, x: Ref, f: Curve) -> Ref:
    x = _within_domain(b, with_frac_bits(b, x, b.frac_bits), -1.0, 1.0)
    if b.interval(x).magnitude < NEAR_END and (y := _direct(b, x, f)) is not None:
        return y
    size = absolute(b, x)
    rest = b.offset(b.scale(size, -1), 1.0)
    b.within(rest, 0.0, 1.0)
    lift = LIFT * 2.0**-FINE_SQUARE
    fine = b.within(b.offset(with_frac_bits(b, rest, FINE_SQUARE), lift), lift, 1.0 + lift)
    steep = root(b, fine)
    arc = b.mul(steep, spectral(b, size, arc_core, 0.0, 1.0))
    b.within(arc, -0.01, pi / 2 + 0.01)
    # acos x = π − acos |x| and asin x = π/2 − acos x.
    below = negative(b, x)
    mirrored = b.sub(level(b, arc, pi), b.scale(arc, 2))
    y = b.add(arc, b.select(below, mirrored, when=1))
    if f is np.arcsin:
        y = b.offset(b.scale(y, -1), pi / 2)
    return stated(b, x, y, lambda v: f(np.clip(v, -1.0, 1.0)))


def hyperbolic_sine(b: Builder, x: Ref) -> Ref:
    """sinh x up to |x| = 22. Rounds: 1 within about ±4, else 4 to 6."""
    return _hyperbolic(b, x, np.sinh, -1)


def hyperbolic_cosine(b: Builder, x: Ref) -> Ref:
    """cosh x up to |x| = 22. Rounds: 1 within about ±4, else 4 to 6."""
    return _hyperbolic(b, x, np.cosh, 1)


def _hyperbolic(b: Builder, x: Ref, f: Curve, sign: int) -> Ref:
    x = with_frac_bits(b, x, b.frac_bits)
    if (y := _direct(b, x, f)) is not None:
        return y
    up, down = exp(b, x), exp(b, b.scale(x, -1))
    total = b.add(up, down) if sign > 0 else b.sub(up, down)
    return stated(b, x, times(b, total, 0.5), f)


def hyperbolic_arc_sine(b: Builder, x: Ref) -> Ref:
    """asinh x: ±log(|x| + √(x² + 1)). Rounds: 1 within about ±8, else about 18."""
    x = with_frac_bits(b, x, b.frac_bits)
    if (y := _direct(b, x, np.arcsinh)) is not None:
        return y
    size = absolute(b, x)
    most = b.interval(x).magnitude
    square = b.within(b.offset(b.mul(x, x), 1.0), 1.0, most * most + 2.0)
    total = b.within(b.add(size, root(b, square)), 1.0 - 2.0**-8, 2 * most + 2.0)
    y = logarithm(b, total)
    y = b.sub(y, b.pick([negative(b, x)], [b.scale(y, 2)]))
    return stated(b, x, y, np.arcsinh)


def hyperbolic_arc_cosine(b: Builder, x: Ref) -> Ref:
    """acosh x for x ≥ 1: log(x + √(x² − 1)). Rounds: about 14. Error: 5e-4 next to 1."""
    x = _within_domain(b, with_frac_bits(b, x, b.frac_bits), 1.0, np.inf)
    held = b.interval(x)
    low, high = max(held.least, 1.0), held.most
    to = max(min(FINE_SQUARE, ROOM - 2 * ceil(log2(high + 1))), b.frac_bits)
    ulp = 2.0**-to
    square = b.offset(b.mul(b.offset(x, -1.0), b.offset(x, 1.0), to=to), LIFT * ulp)
    b.within(square, low * low - 1.0 + (LIFT - 1) * ulp, high * high)
    total = b.within(b.add(x, root(b, square)), low, 2 * high + 0.01)
    y = logarithm(b, total)
    slack = 2.0**-8
    return b.within(y, np.arccosh(low) - slack, log(2 * high) + slack)


def hyperbolic_arc_tangent(b: Builder, x: Ref) -> Ref:
    """atanh x for |x| < 1: (log(1 + x) − log(1 − x)) / 2. Rounds: 1 within about ±0.9, else 5."""
    x = _within_domain(b, with_frac_bits(b, x, b.frac_bits), -1.0, 1.0)
    if b.interval(x).magnitude < NEAR_END and (y := _direct(b, x, np.arctanh)) is not None:
        return y
    up, down = (logarithm(b, b.offset(b.scale(x, s), 1.0)) for s in (1, -1))
    return times(b, b.sub(up, down), 0.5)
