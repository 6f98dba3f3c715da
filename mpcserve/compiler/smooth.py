"""Smooth functions of one secret value: a sum of waves inside a range, an asymptote outside.

A sum of waves repeats itself, so it is right on one range only. Where the interval of x is inside
of it, a function is one round. Otherwise two coarse comparisons, which need only a few high bits of
x, run beside the waves; one select then puts the asymptote in place of what lies beyond. Where a
comparison may be off by its coarseness, both answers are right.

Costs are per element at 16 fraction bits: rounds, bits each way, bits dealt. `many` stands for
elements of which fewer bytes dealt are worth more rounds (see `Builder.halve_from`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf, log, log2, pi, prod

import numpy as np
from numpy.typing import NDArray

from mpcserve.compiler import fourier
from mpcserve.compiler.builder import WAVE_BITS, Builder, Ref
from mpcserve.compiler.curves import (
    dip_curve,
    erf_curve,
    exp_curve,
    gelu_curve,
    mish_curve,
    sigmoid_curve,
    softplus_curve,
    swish_curve,
    tanh_gelu_curve,
)
from mpcserve.compiler.ends import End, above, below, level, replaced
from mpcserve.compiler.fourier import Curve, Fit
from mpcserve.compiler.functions import times, with_frac_bits
from mpcserve.compiler.problems import TooWide, Unsupported

Reals = NDArray[np.float64]

FINEST_ERROR = 2.0**-20
"""Waves of 24 bits allow no less."""

MOST_WAVE_BITS, FEWEST_WAVE_BITS, GUARD_BITS = 24, 12, 3

TAIL_ERRORS = 2
"""By how much a function may still differ from its asymptote where that takes over, over the error
of its fit."""

FINE = 64
"""Parts of an end in which a comparison with it is as fine as bytes dealt ask for."""

COARSE_ULPS = 5
"""Error of a fit where there are many elements: as much as rounding of weights does to the results
of a layer, of which it makes its own, and not felt beside that."""

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
    fit, bits = _fitted(b, f, low, high, args, error, to, bits)
    waves = np.array(fit.sine), np.array(fit.cosine)
    y = b.spectral(*_turned(b, x, fit), *waves, to, bits, fit.waves)
    return b.offset(b.within(y, fit.low - 2.0**-to, fit.high + 2.0**-to), fit.constant)


def _fitted(
    b: Builder,
    f: Curve,
    low: float,
    high: float,
    args: tuple[float, ...],
    error: float | None,
    to: int,
    bits: int | None = None,
) -> tuple[Fit, int]:
    """The fit, and bits of its coefficients."""
    error = max(2.0**-to if error is None else error, FINEST_ERROR)
    given, bits = bits, ceil(-log2(error)) + GUARD_BITS if bits is None else bits
    bits = min(max(bits, FEWEST_WAVE_BITS, (to + 1) // 2), MOST_WAVE_BITS)
    most = MOST_WAVE_BITS if given is None else bits
    fit = b.fits.of(f, args, low, high, error, bits, to, most)
    fourier.refuse_inexact(fit, error)
    return fit, bits


def _turned(b: Builder, x: Ref, fit: Fit) -> tuple[Ref, int]:
    """x at a scale that fits the period, and the bits of a turn."""
    change = fourier.period_fits(fit.period_log2, x.frac_bits)
    x = b.scale(with_frac_bits(b, x, x.frac_bits + change), fit.factor)
    return x, fit.period_log2 + x.frac_bits


@dataclass(frozen=True, slots=True)
class Rest:
    """`sign`·curve(x) − `slope`·x + `level`; equal to any other of the same."""

    curve: Curve
    sign: float
    slope: float
    level: float = 0.0

    def __call__(self, x: Reals, *args: float) -> Reals:
        """At the points x."""
        return np.asarray(self.sign * self.curve(x, *args) - self.slope * x + self.level)


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

    @property
    def core(self) -> Rest:
        """What is left for the waves."""
        return Rest(self.curve, 1.0, self.slope)

    @property
    def distance(self) -> Rest:
        """From the right asymptote."""
        return Rest(self.curve, -1.0, -self.right, self.level)


def activation(b: Builder, x: Ref, a: Activation) -> Ref:
    """a(x) for every x. Error: about 2 ulp and the asymptote's ulp.

    Cost: 1 round inside the range; else 2 or 3.
    """
    many = prod(x.shape) >= b.halve_from
    error = (COARSE_ULPS if many else 1) * 2.0**-b.frac_bits
    x = with_frac_bits(b, x, b.frac_bits)
    left, right = (_tail(a, TAIL_ERRORS * error, side) for side in (-1, 1))
    grain = min(left, right) / FINE if many else None
    low, high = below(b, x, -left, grain=grain), above(b, x, right, grain)
    reach = (min(low.reach, high.reach - 0.25), high.reach)
    if many and (mirror := _mirror(a)) and _in_halves(reach):
        whole, _ = _fitted(b, a.core, *reach, a.args, error, b.frac_bits)
        if len(whole.waves) >= MANY_WAVES:
            y = _halved(b, x, a, low, high, mirror, error)
            return stated(b, x, y, a.curve, a.args)
    y = spectral(b, x, a.core, *reach, args=a.args, error=error)
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


MANY_WAVES = 14
"""From here on, two halves take fewer dealt bytes than the whole."""

LOPSIDED = 0.4
"""Neither side of what is made in halves may be shorter than this part of the other."""


def _in_halves(reach: tuple[float, float]) -> bool:
    """Whether a range is much longer than either of its sides."""
    shorter, longer = sorted((-reach[0], reach[1]))
    return shorter >= LOPSIDED * longer


def _mirror(a: Activation) -> int:
    """±1 if a(−x) is as far from its asymptote as a(x) is, on the same (−1) or the other side."""
    t = np.linspace(0.0, 8.0, 65)
    right = a.right * t + a.level - a.curve(t, *a.args)
    left = a.curve(-t, *a.args) - a.left
    return next((m for m in (1, -1) if np.abs(left - m * right).max() < 2.0**-40), 0)


def _halved(
    b: Builder, x: Ref, a: Activation, low: End, high: End, mirror: int, error: float
) -> Ref:
    """a(x) by its distance from the asymptotes, h(x) on the right and ±h(−x) on the left.

    h is smooth and small, and half as long as the whole: few and coarse waves make it, and both
    sides share what is dealt of them. Cost: 3 rounds.
    """
    reach = max(-low.reach, high.reach)
    middle = below(b, x, 0.0, grain=reach / FINE)
    assert middle.bit is not None

    to = min(ceil(-log2(error)) + 1, b.frac_bits)
    fit, bits = _fitted(b, a.distance, middle.reach, reach, a.args, error, to)
    sine, cosine = np.array(fit.sine), np.array(fit.cosine)
    rows = np.stack([-sine, -mirror * sine]), np.stack([-cosine, mirror * cosine])
    y = b.spectral(*_turned(b, x, fit), *rows, to, bits, fit.waves)
    most = max(-fit.low, fit.high) + 2.0**-to
    y = with_frac_bits(b, b.within(y, -most, most), b.frac_bits)
    axis = len(x.shape)
    right, left = (b.reshape(b.slice(y, axis, k, k + 1), x.shape) for k in range(2))
    right, left = b.offset(right, -fit.constant), b.offset(left, mirror * fit.constant + a.left)
    positive = b.flip(middle.bit)
    straight = b.offset(x, a.level) if a.right else level(b, x, a.level)
    pairs = [(_without(b, middle.bit, low.bit), left)]
    if high.bit is None:
        pairs.append((positive, b.add(straight, right)))
    else:
        pairs += [(b.xor([positive, high.bit]), right), (positive, straight)]
    if low.bit is not None and a.left:
        pairs.append((low.bit, level(b, x, a.left)))
    return b.pick([bit for bit, _ in pairs], [value for _, value in pairs])


def _without(b: Builder, bit: Ref, part: Ref | None) -> Ref:
    """The bit, cleared where a part of it is set."""
    return bit if part is None else b.xor([bit, part])


def stated(
    b: Builder, x: Ref, y: Ref, f: Curve, args: tuple[float, ...] = (), most: float = inf
) -> Ref:
    """y with the range that f takes on the range of x, or up to `most`, and a few ulps."""
    held, slack = b.interval(x), 8 * 2.0**-y.frac_bits
    low, high = fourier.image(f, args, np.minimum(held.least, most), np.minimum(held.most, most))
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


# functions


def sigmoid(b: Builder, x: Ref) -> Ref:
    """1 / (1 + e^−x). Domain: every x. Error: 5e-5; 2e-4 of many elements.

    Cost:
        on [−8, 8]: 1 round, 17 bits each way, 880 dealt
        on [−64, 64]: 2 rounds, 40 bits each way, 1784 dealt
        many on [−64, 64]: 3 rounds, 44 bits each way, 890 dealt
    """
    return activation(b, x, Activation(sigmoid_curve, level=1.0))


def tanh(b: Builder, x: Ref) -> Ref:
    """tanh x. Domain: every x. Error: 5e-5; 2e-4 of many elements.

    Cost:
        on [−5, 5]: 1 round, 18 bits each way, 1302 dealt
        on [−64, 64]: 3 rounds, 46 bits each way, 1414 dealt
        many on [−64, 64]: 3 rounds, 50 bits each way, 1024 dealt
    """
    return activation(b, x, Activation(np.tanh, left=-1.0, level=1.0))


def erf(b: Builder, x: Ref) -> Ref:
    """The error function. Domain: every x. Error: 5e-5; 2e-4 of many elements.

    Cost:
        on [−3, 3]: 1 round, 18 bits each way, 538 dealt
        on [−64, 64]: 3 rounds, 46 bits each way, 868 dealt
        many on [−64, 64]: 3 rounds, 50 bits each way, 662 dealt
    """
    return activation(b, x, Activation(erf_curve, left=-1.0, level=1.0))


def gelu(b: Builder, x: Ref, by_tanh: bool = False) -> Ref:
    """x·Φ(x), or its approximation by tanh. Domain: every x. Error: 7e-5; 2e-4 of many elements.

    Cost:
        on [−4, 4]: 1 round, 20 bits each way, 574 dealt
        on [−64, 64]: 3 rounds, 55 bits each way, 929 dealt
        many on [−64, 64]: 3 rounds, 59 bits each way, 717 dealt
    """
    curve = tanh_gelu_curve if by_tanh else gelu_curve
    return activation(b, x, Activation(curve, slope=0.5, right=1.0))


def swish(b: Builder, x: Ref, gain: float = 1.0) -> Ref:
    """x·sigmoid(gain·x); SiLU for gain 1. Domain: every x. Error: 7e-5; 2e-4 of many elements.

    Cost:
        on [−8, 8]: 1 round, 20 bits each way, 906 dealt
        on [−64, 64]: 2 rounds, 51 bits each way, 2651 dealt
        many on [−64, 64]: 3 rounds, 74 bits each way, 942 dealt
    """
    if gain == 0:
        return b.shift(with_frac_bits(b, x, b.frac_bits), 1, 0)
    if gain < 0:
        x = with_frac_bits(b, x, b.frac_bits)
        return b.sub(x, swish(b, x, -gain))
    return activation(b, x, Activation(swish_curve, (gain,), slope=0.5, right=1.0))


def softplus(b: Builder, x: Ref) -> Ref:
    """log(1 + e^x). Domain: every x. Error: 7e-5; 2e-4 of many elements.

    Cost:
        on [−8, 8]: 1 round, 21 bits each way, 838 dealt
        on [−64, 64]: 2 rounds, 51 bits each way, 1851 dealt
        many on [−64, 64]: 3 rounds, 55 bits each way, 939 dealt
    """
    return activation(b, x, Activation(softplus_curve, slope=0.5, right=1.0))


def mish(b: Builder, x: Ref) -> Ref:
    """x·tanh(log(1 + e^x)). Domain: every x. Error: 7e-5; 2e-4 of many elements.

    Cost:
        on [−8, 8]: 1 round, 21 bits each way, 1200 dealt
        on [−64, 64]: 3 rounds, 53 bits each way, 2415 dealt
        many on [−64, 64]: 3 rounds, 59 bits each way, 1503 dealt
    """
    return activation(b, x, Activation(mish_curve, slope=0.5, right=1.0))


def elu(b: Builder, x: Ref, alpha: float = 1.0, scale: float = 1.0, gain: float = 1.0) -> Ref:
    """gain·x above zero, gain·alpha·(e^(x / scale) − 1) below. Error: 5e-5.

    ELU has scale 1 and gain 1, SELU a gain, CELU scale = alpha.

    Cost:
        on [−64, 64]: 3 rounds, 60 bits each way, 1365 dealt
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


def exp(
    b: Builder, x: Ref, to: int | None = None, direct: float = DIRECT_TOP, most: float = inf
) -> Ref:
    """e^x for x up to the top of its range, or up to `most`, at most 22; 0 far below.

    Error: 2e-5 up to a top of 0, 4e-5 up to 4; above, 2e-3 of e^x at most and 5e-5 of it near the
    top. Rounds: 1 on [−16, 0], 2 or 3 farther below; above a top of `direct` 4 and more.

    Cost:
        on [−16, 0]: 1 round, 22 bits each way, 1414 dealt
        on [−100, 0]: 2 rounds, 47 bits each way, 1494 dealt
        on [−5, 3]: 1 round, 27 bits each way, 910 dealt
    """
    to = b.frac_bits if to is None else to
    x = with_frac_bits(b, x, max(x.frac_bits, b.frac_bits))
    most = min(b.interval(x).most, most)
    top = max(most - NEGLIGIBLE, 0.0)
    squarings = max(ceil(log2(top / SMALL_TOP)), 0) if top > direct else 0
    if top > LARGEST_TOP:
        raise TooWide(
            f"the exponential of a value up to {most:g} does not fit 64 bits: "
            f"{ceil((top - LARGEST_TOP) / log(2.0))} bits short",
            _way_out(b, x),
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
    y = spectral(b, x, exp_curve, low.reach, max(most, low.reach + 0.25), args, error, fine, bits)
    y = replaced(b, y, [(low, lambda: level(b, y, 0.0))])
    y = b.scale(y, 1, -scale)
    y = stated(b, x, y, exp_curve, (factor,), most)
    for k in range(squarings):
        factor *= 2
        # The square, before it is truncated, must fit a ring with room for what reads it.
        room = (SQUARE_BITS - ceil(top * factor / log(2.0))) // 2
        y = with_frac_bits(b, y, min(y.frac_bits, room))
        y = b.mul(y, y, to=to if k == squarings - 1 else inner + EXTRA_BITS)
        y = stated(b, x, y, exp_curve, (factor,), most)
    return y if squarings else with_frac_bits(b, y, to)


def _way_out(b: Builder, x: Ref) -> str:
    """What there is to do about an exponential that is too large."""
    if b.known(x) == "calibrated":
        return "samples reach that far: calibrate with typical ones, or subtract a constant before"
    return "calibrate with samples (--calibrate) or narrow --input-range"


ANGLE_BITS = 22


def sine(b: Builder, x: Ref, cosine: bool = False, to: int | None = None) -> Ref:
    """sin x or cos x for every x: a whole turn becomes 2^22, and the ring takes it modulo that.

    Error: 3e-5.

    Cost:
        on [−1000, 1000]: 1 round, 18 bits each way, 84 dealt
    """
    per_unit = 2.0 ** (ANGLE_BITS - x.frac_bits) / (2 * pi)
    bits = b.bound(x)
    shift = min(bits + 2, 61 - bits - ceil(log2(per_unit)))
    if shift < 8:
        raise TooWide("its input has too large a range", "calibrate with samples")
    turned = b.shift(b.scale(x, round(per_unit * 2.0**shift)), shift, 0)
    waves = np.array([0.0 if cosine else 1.0]), np.array([1.0 if cosine else 0.0])
    y = b.spectral(turned, ANGLE_BITS, *waves, to, MOST_WAVE_BITS if to else WAVE_BITS)
    slack = 4 * 2.0**-y.frac_bits
    return b.within(y, -1.0 - slack, 1.0 + slack)
