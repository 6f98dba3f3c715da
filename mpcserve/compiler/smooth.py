"""Smooth functions of one secret value: a sum of waves inside a range, an asymptote outside.

A sum of waves repeats itself, so it is right on one range only. Where the interval of x is inside
of it, a function is one round. Otherwise two coarse comparisons, which need only a few high bits of
x, run beside the waves; one select then puts the asymptote in place of what lies beyond. Where a
comparison may be off by its coarseness, both answers are right.

Costs are per element at 16 fraction bits: rounds, bits each way, bits dealt. `range`: |x| ≤ 4 for
the cost inside, 64 for the cost with saturation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, floor, log, log2, pi
from math import erf as erf_of

import numpy as np
from numpy.typing import NDArray

from mpcserve.compiler import fourier
from mpcserve.compiler.builder import WAVE_BITS, Builder, Ref
from mpcserve.compiler.fourier import Curve
from mpcserve.compiler.functions import times, with_frac_bits
from mpcserve.compiler.problems import TooWide, Unsupported

Reals = NDArray[np.float64]

FINEST_ERROR = 2.0**-20
"""Waves of 24 bits allow no less."""

MOST_WAVE_BITS, FEWEST_WAVE_BITS, GUARD_BITS = 24, 12, 4

ONE_CHUNK = 250
"""A comparison of integers up to here is one round and one bit."""

COARSEST = 16
"""A comparison with an end is at least as fine as a 16th of that end."""

NEARLY = 1.25
"""A range that goes beyond an end by no more than this is fitted as a whole, not compared."""

TAIL_ULPS = 2
"""By how much a function may still differ from its asymptote where that takes over."""

FARTHEST = 4096.0
"""No asymptote is sought beyond."""


def spectral(
    b: Builder,
    x: Ref,
    f: Curve,
    low: float,
    high: float,
    args: tuple[float, ...] = (),
    error: float | None = None,
    to: int | None = None,
    bits: int | None = None,
) -> Ref:
    """f(x) for x within [low, high]; elsewhere a continuation, of which the interval is right.

    `error`: of the fit, one ulp by default; the truncation's ulp comes on top. `bits`: of
    the waves; more make them exact, fewer leave wide results room in 64 bits. Cost: 1 round.
    """
    to = b.frac_bits if to is None else to
    error = max(2.0**-to if error is None else error, FINEST_ERROR)
    bits = ceil(-log2(error)) + GUARD_BITS if bits is None else bits
    bits = min(max(bits, FEWEST_WAVE_BITS, (to + 1) // 2), MOST_WAVE_BITS)
    fit = fourier.fitted(f, args, *fourier.rounded_out(low, high), error, bits, to)
    fourier.refuse_inexact(fit, error)
    change = fourier.period_fits(fit.period_log2, x.frac_bits)
    x = b.scale(with_frac_bits(b, x, x.frac_bits + change), fit.factor)
    y = b.spectral(x, fit.period_log2 + x.frac_bits, fit.sine, fit.cosine, to, bits)
    return b.offset(b.within(y, fit.low - 2.0**-to, fit.high + 2.0**-to), fit.constant)


@dataclass(frozen=True, slots=True)
class End:
    """One end of a range: `bit` is set beyond it (None: x is never there); fit up to `reach`."""

    bit: Ref | None
    reach: float


def below(b: Builder, x: Ref, end: float, nearly: float = NEARLY) -> End:
    """The bit [x < about `end`]: set only below `end`, and always below `reach`.

    Cost: a comparison of the high bits of x alone.
    """
    held = b.interval(x)
    if held.least >= end - (nearly - 1) * abs(end):
        return End(None, held.least)
    wide = log2((held.magnitude + abs(end)) / ONE_CHUNK)
    grain = min(ceil(wide), floor(log2(max(abs(end), 2.0**-x.frac_bits) / COARSEST)))
    bits = min(max(-grain, 0), x.frac_bits)
    step = 2.0**-bits
    # The shift errs by less than 1.5 steps.
    threshold = floor(end / step - 0.5)
    coarse = b.offset(b.shift(x, x.frac_bits - bits), -threshold * step)
    return End(b.sign(coarse), max((threshold - 1.5) * step, held.least))


def above(b: Builder, x: Ref, end: float) -> End:
    """As `below`, of the upper end."""
    found = below(b, b.scale(x, -1), -end)
    return End(found.bit, -found.reach)


def replaced(b: Builder, y: Ref, ends: list[tuple[End, Callable[[], Ref]]]) -> Ref:
    """y, and beyond each end the value given there. Cost: one select, where there are ends.

    A select writes as many bits as its readers need; so y is selected too, unless that takes more
    values to choose from: else it would be widened on its own.
    """
    beyond = [(end.bit, value()) for end, value in ends if end.bit is not None]
    if not beyond:
        return y
    within = b.xor([bit for bit, _ in beyond], flip=1)
    some = [(bit, value) for bit, value in beyond if b.interval(value).magnitude > 0]
    if len(some) < len(beyond):
        chosen = b.choose([within, *(bit for bit, _ in some)], [y, *(value for _, value in some)])
        return b.within(chosen, *_hull(b, [y, *(value for _, value in beyond)]))
    gaps = [b.sub(value, y) for _, value in beyond]
    return b.add(y, b.choose([bit for bit, _ in beyond], gaps))


def _hull(b: Builder, xs: list[Ref]) -> tuple[float, float]:
    held = [b.interval(x) for x in xs]
    return min(h.least for h in held), max(h.most for h in held)


def level(b: Builder, like: Ref, value: float) -> Ref:
    """A public number in the shape and at the scale of `like`."""
    one = b.constant(np.full((1,) * len(like.shape), value), like.frac_bits)
    return b.expand(one, like.shape)


@dataclass(frozen=True, slots=True)
class Activation:
    """`curve`(x, *args) → `left` for x → −∞ and → `right`·x + `level` for x → ∞.

    `slope`: of a linear part that the waves need not make, 0 or ½.
    """

    curve: Curve
    args: tuple[float, ...] = ()
    slope: float = 0.0
    left: float = 0.0
    right: float = 0.0
    level: float = 0.0

    def core(self, x: Reals, *args: float) -> Reals:
        """What is left for the waves."""
        return self.curve(x, *args) - self.slope * x


def activation(b: Builder, x: Ref, a: Activation) -> Ref:
    """a(x) for every x. Error: about 2 ulp and the asymptote's ulp.

    Cost: 1 round inside the range; else 2 or 3.
    """
    x = with_frac_bits(b, x, b.frac_bits)
    error = TAIL_ULPS * 2.0**-b.frac_bits
    low = below(b, x, -_tail(a, error, -1))
    high = above(b, x, _tail(a, error, 1))
    reach = (min(low.reach, high.reach - 0.25), high.reach)
    y = spectral(b, x, a.core, *reach, args=a.args)
    if a.slope:
        y = b.add(y, b.shift(x, 1, 0))
    y = replaced(
        b,
        y,
        [
            (low, lambda: level(b, x, a.left)),
            (high, lambda: b.offset(x, a.level) if a.right else level(b, x, a.level)),
        ],
    )
    return stated(b, x, y, a.curve, a.args)


def stated(b: Builder, x: Ref, y: Ref, f: Curve, args: tuple[float, ...] = ()) -> Ref:
    """y with the range that f takes on the range of x, and a few ulps."""
    held, slack = b.interval(x), 8 * 2.0**-y.frac_bits
    low, high = fourier.image(f, args, held.least, held.most)
    return b.within(y, low - slack, high + slack)


def _tail(a: Activation, error: float, side: int) -> float:
    """Distance from zero beyond which the asymptote is right to `error`."""
    reach = 1.0
    while reach < FARTHEST:
        x = side * np.linspace(reach / 2, reach, 65)[1:]
        asymptote = a.right * x + a.level if side > 0 else np.full_like(x, a.left)
        near = np.abs(a.curve(x, *a.args) - asymptote) <= error
        if near.all() and reach > 1:
            return reach / 2
        if near[-1]:
            return float(abs(x[np.flatnonzero(~near)[-1] + 1])) if not near.all() else reach
        reach *= 2
    raise Unsupported("reaches its asymptote too slowly", "scale its parameters")


# curves


def sigmoid_curve(x: Reals, gain: float = 1.0) -> Reals:
    """1 / (1 + e^−gain·x)."""
    return np.asarray(0.5 + 0.5 * np.tanh(0.5 * gain * x))


def erf_curve(x: Reals) -> Reals:
    """The error function."""
    return np.array([erf_of(v) for v in np.ravel(x)]).reshape(np.shape(x))


def gelu_curve(x: Reals) -> Reals:
    """x·Φ(x)."""
    return np.asarray(x * 0.5 * (1 + erf_curve(x / np.sqrt(2))))


def tanh_gelu_curve(x: Reals) -> Reals:
    """Its approximation by tanh."""
    return np.asarray(x * 0.5 * (1 + np.tanh(np.sqrt(2 / pi) * (x + 0.044715 * x**3))))


def swish_curve(x: Reals, gain: float = 1.0) -> Reals:
    """x·sigmoid(gain·x)."""
    return np.asarray(x * sigmoid_curve(x, gain))


def softplus_curve(x: Reals) -> Reals:
    """log(1 + e^x)."""
    return np.logaddexp(0.0, x)


def log_sigmoid_curve(x: Reals) -> Reals:
    """log(1 / (1 + e^−x))."""
    return -softplus_curve(-x)


def mish_curve(x: Reals) -> Reals:
    """x·tanh(softplus(x))."""
    return np.asarray(x * np.tanh(softplus_curve(x)))


def exp_curve(x: Reals, factor: float = 1.0, top: float = 0.0) -> Reals:
    """e^(factor·x − top)."""
    return np.exp(factor * x - top)


def dip_curve(x: Reals, alpha: float, scale: float) -> Reals:
    """alpha·(e^(x / scale) − 1)."""
    return np.asarray(alpha * np.expm1(x / scale))


# functions


def sigmoid(b: Builder, x: Ref) -> Ref:
    """1 / (1 + e^−x) for every x. Error: 5e-5. Rounds: 1 within ±13; else 2, or 3 beyond ±100."""
    return activation(b, x, Activation(sigmoid_curve, level=1.0))


def tanh(b: Builder, x: Ref) -> Ref:
    """tanh x for every x. Error: 5e-5. Rounds: 1 within ±7; else 2, or 3 beyond ±50."""
    return activation(b, x, Activation(np.tanh, left=-1.0, level=1.0))


def erf(b: Builder, x: Ref) -> Ref:
    """The error function for every x. Error: 5e-5. Rounds: 1 within ±3.8; else 2, or 3."""
    return activation(b, x, Activation(erf_curve, left=-1.0, level=1.0))


def gelu(b: Builder, x: Ref, by_tanh: bool = False) -> Ref:
    """x·Φ(x), or its approximation by tanh, for every x. Error: 7e-5. Rounds: 1, else 2 or 3."""
    curve = tanh_gelu_curve if by_tanh else gelu_curve
    return activation(b, x, Activation(curve, slope=0.5, right=1.0))


def swish(b: Builder, x: Ref, gain: float = 1.0) -> Ref:
    """x·sigmoid(gain·x) for every x; SiLU for gain 1. Error: 7e-5. Rounds: 1, else 2 or 3."""
    if gain == 0:
        return b.shift(with_frac_bits(b, x, b.frac_bits), 1, 0)
    if gain < 0:
        x = with_frac_bits(b, x, b.frac_bits)
        return b.sub(x, swish(b, x, -gain))
    return activation(b, x, Activation(swish_curve, (gain,), slope=0.5, right=1.0))


def softplus(b: Builder, x: Ref) -> Ref:
    """log(1 + e^x) for every x. Error: 7e-5. Rounds: 1, else 2 or 3."""
    return activation(b, x, Activation(softplus_curve, slope=0.5, right=1.0))


def mish(b: Builder, x: Ref) -> Ref:
    """x·tanh(log(1 + e^x)) for every x. Error: 7e-5. Rounds: 1, else 2 or 3."""
    return activation(b, x, Activation(mish_curve, slope=0.5, right=1.0))


def elu(b: Builder, x: Ref, alpha: float = 1.0, scale: float = 1.0, gain: float = 1.0) -> Ref:
    """gain·x above zero, gain·alpha·(e^(x / scale) − 1) below. Error: 5e-5. Rounds: 3.

    ELU has scale 1 and gain 1, SELU a gain, CELU scale = alpha.
    """
    x = with_frac_bits(b, x, b.frac_bits)
    straight = x if gain == 1 else times(b, x, gain)
    held, dip = b.interval(x), gain * alpha
    if held.least >= 0:
        return straight
    depth = max(log(max(abs(dip), 2.0**-b.frac_bits) * 2.0**b.frac_bits), 1.0) * scale
    low = below(b, x, -depth)
    y = spectral(b, x, dip_curve, low.reach, 0.0, args=(dip, scale))
    positive = End(b.sign(b.scale(x, -1)) if held.most > 0 else None, 0.0)
    y = replaced(b, y, [(low, lambda: level(b, x, -dip)), (positive, lambda: straight)])
    slack = 8 * 2.0**-y.frac_bits
    ends = [dip * np.expm1(np.minimum(e, 0) / scale) + gain * np.maximum(e, 0)
            for e in (held.low, held.high, np.zeros_like(held.low))]  # fmt: skip
    ends = ends if dip < 0 else ends[:2]
    return b.within(y, np.minimum.reduce(ends) - slack, np.maximum.reduce(ends) + slack)


DIRECT_TOP, SMALL_TOP = 4.0, 2.0
"""e^4 is made by waves at once; above, a power up to e^2 is squared: right relatively, too."""

LARGEST_TOP = 22.0
"""e^22 has 32 bits before the point."""

SQUARE_BITS = 58

NEGLIGIBLE = 2.0**-10

EXTRA_BITS = 2
"""Fraction bits of intermediate values beyond those of the result."""


def exp(b: Builder, x: Ref, to: int | None = None, direct: float = DIRECT_TOP) -> Ref:
    """e^x for x up to the top of its range, at most 22; 0 far below.

    Error: 2e-5 up to a top of 0, 4e-5 up to 4; above, 2e-3 of e^x at most and 5e-5 of it near the
    top. Rounds: 1 on [−16, 0], 2 or 3 farther below; above a top of `direct` 4 and more.
    """
    to = b.frac_bits if to is None else to
    x = with_frac_bits(b, x, max(x.frac_bits, b.frac_bits))
    held = b.interval(x)
    top = max(held.most - NEGLIGIBLE, 0.0)
    squarings = max(ceil(log2(top / SMALL_TOP)), 0) if top > direct else 0
    if top > LARGEST_TOP:
        raise TooWide(
            f"the exponential of a value up to {held.most:g} does not fit 64 bits",
            "calibrate with samples (--calibrate) or narrow --input-range",
        )
    factor = 2.0**-squarings
    scale = ceil(top * factor / log(2.0))
    # A value that is squared must be narrow enough for its square to fit beside its truncation.
    inner = b.frac_bits + EXTRA_BITS if squarings else to
    # Waves make e^x / 2^scale, at most 1, at a finer scale.
    depth = (inner + 1) * log(2.0) / factor
    low = below(b, x, -depth, nearly=1.4)
    args = (factor, scale * log(2.0))
    error, bits = (2.0**-inner, inner + 2) if squarings else (2.0 ** -(inner + scale + 3), None)
    fine = min(inner + scale, MOST_WAVE_BITS + 2)
    y = spectral(
        b, x, exp_curve, low.reach, max(held.most, low.reach + 0.25), args, error, fine, bits
    )
    y = replaced(b, y, [(low, lambda: level(b, y, 0.0))])
    y = b.scale(y, 1, -scale)
    y = stated(b, x, y, exp_curve, (factor,))
    for k in range(squarings):
        factor *= 2
        # The square, before it is truncated, must fit a ring with room for what reads it.
        most = (SQUARE_BITS - ceil(top * factor / log(2.0))) // 2
        y = with_frac_bits(b, y, min(y.frac_bits, most))
        y = b.mul(y, y, to=to if k == squarings - 1 else inner + EXTRA_BITS)
        y = stated(b, x, y, exp_curve, (factor,))
    return y if squarings else with_frac_bits(b, y, to)


ANGLE_BITS = 22


def sine(b: Builder, x: Ref, cosine: bool = False, to: int | None = None) -> Ref:
    """sin x or cos x for every x: a whole turn becomes 2^22, and the ring takes it modulo that.

    Error: 3e-5. Rounds: 1.
    """
    per_unit = 2.0 ** (ANGLE_BITS - x.frac_bits) / (2 * pi)
    bits = b.bound(x)
    shift = min(bits + 2, 61 - bits - ceil(log2(per_unit)))
    if shift < 8:
        raise TooWide("its input has too large a range", "calibrate with samples")
    turned = b.shift(b.scale(x, round(per_unit * 2.0**shift)), shift, 0)
    waves = [0.0 if cosine else 1.0], [1.0 if cosine else 0.0]
    y = b.spectral(turned, ANGLE_BITS, *waves, to, MOST_WAVE_BITS if to else WAVE_BITS)
    slack = 4 * 2.0**-y.frac_bits
    return b.within(y, -1.0 - slack, 1.0 + slack)
