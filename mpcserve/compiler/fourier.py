"""Smooth functions as sums of waves: least squares on a range inside a longer period.

A function on [low, high] continues in many ways to a period longer than the range, and a smooth
continuation needs few waves. Least squares finds one; what it does outside the range is free. A
ridge of the size of the waves' own rounding keeps coefficients, and with them that rounding, small.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil, floor, frexp, inf, log2, sqrt
from typing import Any, NamedTuple

import numpy as np

from mpcserve.compiler.leastsquares import CHECKED, FITTED, Kinds, Reals, Waves, combined, waves_of
from mpcserve.compiler.problems import TooWide
from mpcserve.plan.verify import MAX_HARMONICS, MAX_PERIOD, MAX_WAVE_BITS, MIN_PERIOD

Curve = Callable[..., Reals]
"""f(x, *args) on arrays."""

ROOM, MOST_ROOM = 1.08, 4.4
"""A period is this many times the range: a continuation needs room to turn round."""

FACTORS = {1: 0, 3: 2, 5: 3}
"""x may be multiplied by these before: periods of 2^j, 2^j / 3, 2^j / 5. Bits that it widens x."""

DEALT, WIDEST = 1 / 8, 40
"""What dealing a bit costs, in bits of opening x; bits of a wave where they are to leave readers
room in 64: then it is their number that counts."""

LARGEST = 200.0
"""Coefficients stay below; a plan allows 256."""

SIGMAS = 3.0
"""Standard deviations of the waves' rounding that count as error."""

SETTLED = 1.25
"""Where no fit is as exact as asked, the fewest waves that are nearly as exact as any."""

NEARLY_AS_LONG = 1.06
"""By this factor a range may be shorter than that of a fit that is used again."""

FIRST_BITS, AGAIN_BITS = 6, 5
"""Significant bits of the ends of the first range of a function, and of all further ones."""

COARSEST_WAVE = 2
"""Bits of the coarsest waves."""


class Period(NamedTuple):
    """2^log2 / factor, in reals."""

    log2: int
    factor: int

    @property
    def angle(self) -> float:
        """Of one unit of x."""
        return 2 * np.pi * 2.0**-self.log2 * self.factor


@dataclass(frozen=True, slots=True)
class Fit:
    """f(x) ≈ constant + Σ_k sine[k]·sin((k + 1)ωx) + cosine[k]·cos((k + 1)ωx) on the range.

    The period is 2^`period_log2` / `factor` in reals. `waves`: bits of each harmonic's waves.
    `low`, `high`: the sum's range over a whole period, constant excluded. `error`: largest on the
    range, waves' rounding included.
    """

    period_log2: int
    factor: int
    constant: float
    sine: tuple[float, ...]
    cosine: tuple[float, ...]
    waves: tuple[int, ...]
    low: float
    high: float
    error: float


@dataclass(frozen=True, slots=True)
class _Problem:
    """What to fit. `even`, `odd`: whether cosines are needed, and sines; else as in `fitted`."""

    f: Curve
    args: tuple[float, ...]
    low: float
    high: float
    bits: int
    to: int
    most: int
    even: bool
    odd: bool

    @property
    def kinds(self) -> Kinds:
        """The waves that it takes."""
        return (np.cos,) * (self.even or not self.odd) + (np.sin,) * self.odd


class _Sum(NamedTuple):
    """A constant and coefficients, cosines first, with their largest error."""

    period: Period
    harmonics: int
    constant: float
    coefficients: Reals
    error: float


@lru_cache(maxsize=256)
def fitted(
    f: Curve,
    args: tuple[float, ...],
    low: float,
    high: float,
    error: float,
    bits: int,
    to: int,
    most: int = MAX_WAVE_BITS,
) -> Fit:
    """The fit of fewest waves that errs by at most `error`; else nearly the most exact one.

    `bits`: of coefficients, and of waves that have a coefficient of 1; `most`: of any waves;
    `to`: fraction bits of the constant.
    """
    problem = _Problem(f, args, low, high, bits, to, most, *_parity(f, args, low, high))
    best: tuple[float, _Sum] | None = None
    closest: _Sum | None = None
    for factor, widened in FACTORS.items():
        first = ceil(log2(ROOM * (high - low) * factor))
        last = floor(log2(MOST_ROOM * (high - low) * factor))
        for period_log2 in range(first, last + 1):
            limit = best[1].harmonics + 1 if best else MAX_HARMONICS
            found = _fewest(problem, Period(period_log2, factor), error, limit)
            cost = DEALT * _dealt(problem, found) + widened + period_log2 - first
            if found.error <= error and (best is None or cost < best[0]):
                best = cost, found
            if closest is None or found.error < closest.error:
                closest = found
    assert closest is not None
    if best is None and error < SETTLED * closest.error < inf:
        return fitted(f, args, low, high, SETTLED * closest.error, bits, to, most)
    return _finished(problem, best[1] if best else closest)


def _fewest(problem: _Problem, period: Period, error: float, most: int) -> _Sum:
    """Of the fewest harmonics that suffice; the closest where none up to `most` do."""
    ridge = FITTED / 12 / 4.0**problem.bits
    waves = Waves(problem.low, problem.high, period.angle, problem.kinds, ridge)
    few, many, closest = 0, 1, _fit(problem, waves, period, 1)
    while closest.error > error and many < most:
        few, many = many, min(many + 1 + many // 2, most)
        closest = min(closest, _fit(problem, waves, period, many), key=lambda c: c.error)
    while closest.error <= error and many - few > 1:
        middle = (few + many) // 2
        tried = _fit(problem, waves, period, middle)
        if tried.error <= error:
            many, closest = middle, tried
        else:
            few = middle
    return closest


def period_fits(period_log2: int, frac_bits: int) -> int:
    """By how many bits an operand's scale must rise (negative: fall) for the period to fit."""
    bits = period_log2 + frac_bits
    return max(MIN_PERIOD - bits, 0) - max(bits - MAX_PERIOD, 0)


def rounded_out(low: float, high: float, bits: int = 6) -> tuple[float, float]:
    """A slightly larger range with short ends: a plan then tells little of what samples showed."""
    step = 2.0 ** (frexp(max(high - low, 2.0**-20))[1] - bits)
    first, last = float(np.floor(low / step)), float(np.ceil(high / step))
    return first * step, max(last, first + 1) * step


@dataclass
class Fits:
    """What was fitted: a range that is nearly an earlier one is given the fit of that.

    A recurrent layer has a range of its own at every time step, and few fits do for all.
    """

    made: dict[tuple[Any, ...], list[tuple[float, float, Fit]]] = field(default_factory=dict)

    def of(self, f: Curve, args: tuple[float, ...], low: float, high: float, *how: Any) -> Fit:
        """As `fitted`, on a range that has this one in it."""
        known = self.made.setdefault((f, args, *how), [])
        for least, most, fit in known:
            if least <= low and high <= most and most - least <= NEARLY_AS_LONG * (high - low):
                return fit
        ends = rounded_out(low, high, AGAIN_BITS if known else FIRST_BITS)
        known.append((*ends, fitted(f, args, *ends, *how)))
        return known[-1][2]


def image(f: Curve, args: tuple[float, ...], low: float, high: float) -> tuple[float, float]:
    """Least and largest value on a range, sampled densely."""
    y = f(np.linspace(low, high, CHECKED + 1), *args)
    return float(y.min()), float(y.max())


def _parity(f: Curve, args: tuple[float, ...], low: float, high: float) -> tuple[bool, bool]:
    """(whether cosines are needed, whether sines are)."""
    if low != -high:
        return True, True
    x = np.linspace(low, high, 65)
    y, mirrored = f(x, *args), f(-x, *args)
    scale = 2.0**-40 * float(np.abs(y).max())
    return bool(np.abs(y + mirrored).max() > scale), bool(np.abs(y - mirrored).max() > scale)


def _fit(problem: _Problem, waves: Waves, period: Period, harmonics: int) -> _Sum:
    one, unit = 2.0**problem.bits, 2.0**problem.to
    target = problem.f(waves.points, *problem.args)
    # The constant is rounded to the result's scale; the waves make up for that.
    constant = float(np.rint(waves.fitted(target, harmonics, True)[0] * unit) / unit)
    found = waves.fitted(target - constant, harmonics, False)
    by_turns = np.rint(found * one) / one
    sums = constant + waves.checked(by_turns)
    error = float(np.abs(sums - problem.f(waves.dense, *problem.args)).max())
    coefficients = by_turns.reshape(harmonics, -1).T.ravel()
    # A wave's rounding is multiplied by its coefficient, a coefficient's by both waves, of size 1.
    size = _sizes(coefficients, harmonics)
    units = size * 2.0 ** (problem.bits - np.array(_wave_bits(size, problem)))
    error += SIGMAS * sqrt((np.square(units).sum() + harmonics) / 12) / one
    error = error if np.abs(coefficients).max() <= LARGEST else inf
    return _Sum(period, harmonics, constant, coefficients, error)


def _sizes(coefficients: Reals, harmonics: int) -> Reals:
    """√(a² + b²) of each harmonic."""
    squares: Reals = np.square(coefficients).reshape(-1, harmonics).sum(axis=0)
    return np.sqrt(squares)


def _wave_bits(size: Reals, problem: _Problem) -> tuple[int, ...]:
    """Of each harmonic's waves: as many fewer as its coefficients are small."""
    wished = problem.bits + np.ceil(np.log2(np.maximum(size, 2.0**-problem.bits)))
    # Together with a coefficient's, the finest must have the result's bits.
    wished += max(problem.to - problem.bits - wished.max(), 0.0)
    return tuple(int(w) for w in np.clip(wished, COARSEST_WAVE, problem.most))


def _dealt(problem: _Problem, found: _Sum) -> float:
    """Bits dealt of the waves, but for what readers add: a sum that is large takes more."""
    if problem.most <= problem.bits:
        return 2.0 * WIDEST * found.harmonics
    size = _sizes(found.coefficients, found.harmonics)
    extent = log2(max(float(size.sum()), 2.0**-problem.to))
    return 2 * sum(w + problem.bits + extent for w in _wave_bits(size, problem))


def _finished(problem: _Problem, found: _Sum) -> Fit:
    count, values = found.harmonics, found.coefficients
    turns = np.linspace(0, 2 * np.pi, 64 * count + 1)
    whole = combined(waves_of(problem.kinds, turns, 1, count), values.reshape(-1, count).T.ravel())
    # Between 64 points per shortest wave a sum may exceed them by a little.
    slack = 0.01 * float(np.abs(whole).max()) + min(found.error, 1.0)
    zeros = np.zeros(count)
    cosine = values[:count] if problem.even else zeros
    sine = values[-count:] if problem.odd else zeros
    ends = float(whole.min()) - slack, float(whole.max()) + slack
    bits = _wave_bits(_sizes(values, count), problem)
    waves = tuple(map(float, sine)), tuple(map(float, cosine))
    return Fit(*found.period, found.constant, *waves, bits, *ends, found.error)


def refuse_inexact(fit: Fit, error: float) -> None:
    """Raises: Unsupported where even the closest fit is far from what was asked."""
    if fit.error > 64 * error:
        raise TooWide(
            "its input has too large a range to be approximated",
            "calibrate with samples (--calibrate) or narrow --input-range",
        )
