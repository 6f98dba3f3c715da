"""Proved ranges: interval arithmetic over a draft, one rule per instruction.

Intervals speak of the very integers that the servers will hold (as reals: x / 2^frac_bits), with
weights as encoded and with every truncation's error, not of the ideal real function.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from mpcserve.compiler import interval as iv
from mpcserve.compiler.draft import Draft, Step, weakest
from mpcserve.compiler.interval import Interval
from mpcserve.plan.ops import OPS

PRODUCT_ULPS = 1.0
"""A product's stochastic truncation errs by less than one ulp of the result."""

SHIFT_ULPS = 1.5
"""A local shift rounds Δ and both mask shares separately: less than one and a half ulps."""

SPECTRAL_ERROR = 2.0**-12
"""More than the waves' and coefficients' rounding can add up to."""

Rule = Callable[[Step, Sequence[Step]], Interval]


def interval_of(step: Step, operands: Sequence[Step]) -> Interval:
    """What the operands' intervals prove of the step's value, before what is stated or sampled."""
    if step.op != "matmul":
        operands = [x if x.op != "weight" else _widened(x) for x in operands]
    return RULES[step.op](step, operands)


def _widened(weight: Step) -> Step:
    """The weight with an interval in float64."""
    held = iv.widest(weight.interval)
    return weight if held is weight.interval else replace(weight, interval=held)


def settle(step: Step, operands: Sequence[Step]) -> Step:
    """The step with its interval: proved, or sampled where that saves a bit.

    A step without operands brings its own interval and `known`.
    """
    if not operands:
        return step
    proved = interval_of(step, operands)
    if step.stated is not None:
        proved = iv.intersect(proved, step.stated)
    known = weakest([x.known for x in operands])
    if known == "exact" and not OPS[step.op].local:
        known = "proved"
    if step.sampled is not None:
        narrowed = iv.intersect(proved, step.sampled)
        if iv.bound_of(narrowed, step.frac_bits) < iv.bound_of(proved, step.frac_bits):
            return replace(step, interval=narrowed, known=weakest([known, "calibrated"]))
    return replace(step, interval=proved, known=known)


def settle_all(draft: Draft, changed: Collection[int] | None = None) -> Draft:
    """Intervals anew, of the steps that have `changed` and of what depends on them; or all."""
    steps: list[Step] = []
    moved = set(range(len(draft.steps)) if changed is None else changed)
    for id, step in enumerate(draft.steps):
        if id in moved or not moved.isdisjoint(step.inputs):
            new = settle(step, [steps[j] for j in step.inputs])
            if not _same(new, step):
                moved.add(id)
            step = new
        steps.append(step)
    return replace(draft, steps=tuple(steps))


def _same(x: Step, y: Step) -> bool:
    a, b = x.interval, y.interval
    equal = a is b or (np.array_equal(a.low, b.low) and np.array_equal(a.high, b.high))
    return equal and x.known == y.known


def spanned(weight: Step, low: float, high: float) -> Step:
    """A weight of which no more is to be known than that it lies in [low, high]."""
    held = iv.uniform(low, high, len(weight.shape))
    return replace(weight, interval=held, stated=held, known="proved")


def encoded(values: NDArray[np.floating], frac_bits: int) -> iv.Reals:
    """The reals that a weight becomes: rounded to `frac_bits`."""
    whole = in_ulps(values, frac_bits)
    return np.multiply(whole, whole.dtype.type(2.0**-frac_bits), out=whole)


def in_ulps(values: NDArray[np.floating], frac_bits: int) -> iv.Reals:
    """The whole numbers that a weight becomes, in the precision that it has.

    float32 is exact here as well: from 2^24 on, all its numbers are whole.
    """
    dtype = np.float32 if values.dtype == np.float32 else np.float64
    scaled: iv.Reals = np.asarray(np.multiply(values, dtype(2.0**frac_bits), dtype=dtype))
    return np.rint(scaled, out=scaled)


def rescaled(draft: Draft, step: Step, by: int) -> Step:
    """A weight with `by` more fraction bits; of another step, only its scale."""
    step = replace(step, frac_bits=step.frac_bits + by)
    if step.op != "weight" or step.stated is not None:
        return step
    values = encoded(draft.arrays[step.attrs["name"]], step.frac_bits)
    return replace(step, interval=iv.exactly(values))


def _ulp(step: Step) -> float:
    return 2.0**-step.frac_bits


def _aligned(step: Step, xs: Sequence[Step]) -> tuple[Interval, ...]:
    """Operand intervals with their ranks raised to the result's."""
    return tuple(_ranked(x.interval, len(step.shape)) for x in xs)


def _ranked(x: Interval, rank: int) -> Interval:
    lead = (1,) * (rank - x.low.ndim)
    if not lead:
        return x
    low = x.low.reshape(lead + x.low.shape)
    return Interval(low, low if x.known else x.high.reshape(lead + x.high.shape))


def _product(exact: Callable[[Step, Sequence[Step]], Interval]) -> Rule:
    def rule(step: Step, xs: Sequence[Step]) -> Interval:
        result = exact(step, xs)
        if len(xs) == 3:
            result = iv.add(result, _ranked(xs[2].interval, len(step.shape)))
        return iv.widen(result, PRODUCT_ULPS * _ulp(step)) if step.attrs["truncate"] else result

    return rule


def _mul(step: Step, xs: Sequence[Step]) -> Interval:
    if step.inputs[0] == step.inputs[1]:
        square = iv.mul(xs[0].interval, xs[0].interval)
        return Interval(np.maximum(square.low, 0.0), square.high)
    return iv.mul(*_aligned(step, xs[:2]))


def _matmul(step: Step, xs: Sequence[Step]) -> Interval:
    return iv.matmul(xs[0].shape[-1], *_aligned(step, xs[:2]))


def _conv(step: Step, xs: Sequence[Step]) -> Interval:
    return iv.conv(
        xs[0].interval, xs[1].interval, xs[1].shape, step.attrs["groups"], any(step.attrs["pads"])
    )


def _scale(step: Step, xs: Sequence[Step]) -> Interval:
    factor = np.ldexp(float(step.attrs["factor"]), xs[0].frac_bits - step.frac_bits)
    return iv.scale(xs[0].interval, float(factor))


def _shift(step: Step, xs: Sequence[Step]) -> Interval:
    factor = 2.0 ** (xs[0].frac_bits - step.attrs["bits"] - step.frac_bits)
    return iv.widen(iv.scale(xs[0].interval, factor), SHIFT_ULPS * _ulp(step))


def _offset(step: Step, xs: Sequence[Step]) -> Interval:
    by = float(np.ldexp(float(step.attrs["value"]), -step.frac_bits))
    return iv.add(xs[0].interval, iv.uniform(by, by, len(step.shape)))


def _slice(step: Step, xs: Sequence[Step]) -> Interval:
    found = xs[0].interval
    attrs = step.attrs
    for axis, bounds in enumerate(
        zip(attrs["starts"], attrs["stops"], attrs["steps"], strict=True)
    ):
        found = iv.take(found, axis, slice(*bounds))
    return found


def _transpose(step: Step, xs: Sequence[Step]) -> Interval:
    perm = step.attrs["perm"]
    return Interval(xs[0].interval.low.transpose(perm), xs[0].interval.high.transpose(perm))


def _pad(step: Step, xs: Sequence[Step]) -> Interval:
    attrs = step.attrs
    value = float(np.ldexp(float(attrs["value"]), -step.frac_bits))
    return iv.pad(xs[0].interval, attrs["before"], attrs["after"], value)


def _concat(step: Step, xs: Sequence[Step]) -> Interval:
    axis = step.attrs["axis"]
    return iv.concat([x.interval for x in xs], [x.shape[axis] for x in xs], axis)


def _combine(step: Step, xs: Sequence[Step]) -> Interval:
    indices, factors = combination(step)
    return iv.combine(xs[0].interval, step.attrs["axis"], indices, factors)


def combination(step: Step) -> tuple[NDArray[np.int64], iv.Reals]:
    """Indices and factors of a `combine`, taps × elements."""
    tables = (step.attrs[name] for name in ("indices", "factors"))
    indices, factors = (np.asarray(t).reshape(step.attrs["taps"], -1) for t in tables)
    return indices, factors.astype(np.float64)


def _select(step: Step, xs: Sequence[Step]) -> Interval:
    found = xs[1].interval
    if step.attrs.get("many"):
        return reduce(iv.add, (iv.hull(x.interval, 0.0) for x in xs[1::2]))
    for x in xs[3::2]:
        found = Interval(
            np.minimum(found.low, x.interval.low), np.maximum(found.high, x.interval.high)
        )
    if step.attrs["nonnegative"]:
        found = Interval(np.maximum(found.low, 0.0), found.high)
    return iv.hull(found, 0.0)


def _wrap(step: Step, xs: Sequence[Step]) -> Interval:
    """A bound of `bits` − 1: the lowest number of all is left out, as no reader minds it."""
    most = 2.0 ** (step.attrs["bits"] - 1 - step.frac_bits) - _ulp(step)
    held = xs[0].interval
    return held if held.magnitude <= most else iv.uniform(-most, most, len(step.shape))


def _tally(step: Step, xs: Sequence[Step]) -> Interval:
    values = np.ldexp(np.asarray(step.attrs["values"], np.float64), -step.frac_bits)
    low, high = np.minimum(values, 0.0).sum(), np.maximum(values, 0.0).sum()
    return iv.uniform(float(low), float(high), len(step.shape))


def _bit(step: Step, xs: Sequence[Step]) -> Interval:
    return iv.uniform(0.0, 1.0, len(step.shape))


def _spectral(step: Step, xs: Sequence[Step]) -> Interval:
    """No more than its coefficients together, whatever x is."""
    at = step.attrs
    size = np.hypot(*(np.asarray(at[name], np.float64) for name in ("sine", "cosine")))
    most = float(size.reshape(at["sums"], -1).sum(axis=1).max())
    most = most * 2.0 ** -at["bits"] + SPECTRAL_ERROR + _ulp(step)
    return iv.uniform(-most, most, len(step.shape))


RULES: Mapping[str, Rule] = {
    "add": lambda s, xs: iv.add(*_aligned(s, xs)),
    "sub": lambda s, xs: iv.sub(*_aligned(s, xs)),
    "scale": _scale,
    "offset": _offset,
    "shift": _shift,
    "reshape": lambda s, xs: iv.reshape(xs[0].interval, xs[0].shape, s.shape),
    "transpose": _transpose,
    "slice": _slice,
    "concat": _concat,
    "pad": _pad,
    "expand": lambda s, xs: _aligned(s, xs)[0],
    "gather": lambda s, xs: iv.take(
        xs[0].interval, s.attrs["axis"], np.asarray(s.attrs["indices"])
    ),
    "combine": _combine,
    "sum": lambda s, xs: iv.total(xs[0].interval, xs[0].shape, s.attrs["axes"]),
    "mul": _product(_mul),
    "matmul": _product(_matmul),
    "conv": _product(_conv),
    "wrap": _wrap,
    "odd": _bit,
    "xor": _bit,
    "sign": _bit,
    "all": _bit,
    "select": _select,
    "tally": _tally,
    "extend": lambda s, xs: xs[0].interval,
    "spectral": _spectral,
}
