"""Real intervals [low, high] per element: what is known of a value before any input is seen.

Arrays are float64 and *compact*: an axis along which the interval does not vary has length 1, so a
batch or a picture costs no more than its channels. Rules are conservative: sums of float64 products
are widened by their own rounding error, and a truncation by the ulps that it may add.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from math import frexp
from typing import Any

import numpy as np
from numpy.typing import NDArray

Reals = NDArray[np.float64]
Shape = tuple[int, ...]

EPSILON = 2.0**-50
"""Relative slack of a float64 result; a dot product of n terms takes n times it."""


LARGE = 1 << 20
"""Elements of a matrix from which on its memory is felt."""


@dataclass(frozen=True)
class Interval:
    """low ≤ x ≤ high, elementwise; both arrays have the value's rank and broadcast to its shape.

    Of known numbers, weights above all, both are the same array.
    """

    low: Reals
    high: Reals

    @property
    def known(self) -> bool:
        """Whether every element is one number."""
        return self.low is self.high

    @cached_property
    def magnitude(self) -> float:
        """max |x|."""
        if self.low.size == 0:
            return 0.0
        if self.known:
            return float(max(-self.low.min(), self.high.max()))
        return float(max(-self.low.min(), self.high.max(), self.low.max(), -self.high.min(), 0.0))

    @property
    def least(self) -> float:
        """Lower end of the hull of all elements."""
        return float(self.low.min(initial=0.0) if self.low.size == 0 else self.low.min())

    @property
    def most(self) -> float:
        """Upper end of the hull of all elements."""
        return float(self.high.max(initial=0.0) if self.high.size == 0 else self.high.max())


def uniform(low: float, high: float, rank: int) -> Interval:
    """The same interval for every element."""
    shape = (1,) * rank
    return Interval(np.full(shape, low, np.float64), np.full(shape, high, np.float64))


def exactly(x: NDArray[np.floating] | NDArray[np.int64]) -> Interval:
    """The interval of known numbers: large matrices stay in float32 if they are."""
    large = x.ndim == 2 and x.size >= LARGE and x.dtype == np.float32
    reals: NDArray[Any] = x if large else np.asarray(x, np.float64)
    return Interval(reals, reals)


def bound_of(interval: Interval, frac_bits: int) -> int:
    """Least b ≥ 1 with |x| < 2^b ulp: the only trace of the interval that the plan shows."""
    magnitude = interval.magnitude
    if not np.isfinite(magnitude):
        return 1 << 20
    if magnitude == 0:
        return 1
    _, exponent = frexp(magnitude * (1 + 4 * EPSILON))
    return max(exponent + frac_bits, 1)


def widen(x: Interval, by: float) -> Interval:
    """[low − by, high + by]."""
    return Interval(x.low - by, x.high + by)


def intersect(x: Interval, y: Interval) -> Interval:
    """The common part; where rounding has left none, the nearer end of `x`."""
    low, high = np.maximum(x.low, y.low), np.minimum(x.high, y.high)
    return Interval(np.minimum(low, x.high), np.maximum(high, np.minimum(low, x.high)))


def hull(x: Interval, value: float) -> Interval:
    """The smallest interval that holds x and `value`."""
    return Interval(np.minimum(x.low, value), np.maximum(x.high, value))


def add(x: Interval, y: Interval) -> Interval:
    """x + y."""
    return _rounded(x.low + y.low, x.high + y.high)


def sub(x: Interval, y: Interval) -> Interval:
    """x − y."""
    return _rounded(x.low - y.high, x.high - y.low)


def scale(x: Interval, factor: float | Reals) -> Interval:
    """x · factor."""
    ends = (x.low * factor, x.high * factor)
    return Interval(np.minimum(*ends), np.maximum(*ends))


def mul(x: Interval, y: Interval) -> Interval:
    """x · y, elementwise with broadcasting."""
    ends = [x.low * y.low, x.low * y.high, x.high * y.low, x.high * y.high]
    return _rounded(np.minimum.reduce(ends), np.maximum.reduce(ends))


def matmul(inner: int, x: Interval, y: Interval) -> Interval:
    """x @ y over `inner` terms, by centres and radii: tight when either side is exact."""
    a, b = _spread(x, -1, inner), _spread(y, -2, inner)
    terms = max(BLOCK // b.low.shape[-1], 1)
    parts = [_block(a, b, slice(k, k + terms)) for k in range(0, inner, terms)]
    centre, radius, size = (sum(values[1:], values[0]) for values in zip(*parts, strict=True))
    slack = (inner + 4) * EPSILON * (size + radius)
    return Interval(centre - radius - slack, centre + radius + slack)


BLOCK = 1 << 18
"""Elements of a large matrix that are worked on at once: no copy of the whole is made, and the
parts stay in the processor's cache."""


def _block(a: Interval, b: Interval, terms: slice) -> tuple[Reals, Reals, Reals]:
    """Centre and radius of what some terms add to a product, and the size of what was added."""
    a = Interval(*_both(a, a.low[..., terms], a.high[..., terms]))
    b = Interval(*_both(b, b.low[..., terms, :], b.high[..., terms, :]))
    ac, bc = _centre(a), _centre(b)
    size, sizes = np.abs(ac), np.abs(bc)
    centre, added = ac @ bc, size @ sizes
    radius = np.zeros_like(centre)
    if not a.known:
        radius += _radius(a) @ sizes
    if not b.known:
        radius += (size if a.known else size + _radius(a)) @ _radius(b)
    return centre, radius, added


def _both(x: Interval, low: Reals, high: Reals) -> tuple[Reals, Reals]:
    """Parts of an interval in float64; of known numbers one array."""
    low = low.astype(np.float64, copy=False)
    return low, low if x.known else high.astype(np.float64, copy=False)


def widest(x: Interval) -> Interval:
    """The same in float64: what holds for matrices that `exactly` has halved."""
    return x if x.low.dtype == np.float64 else Interval(*_both(x, x.low, x.high))


def reshape(x: Interval, old: Shape, new: Shape) -> Interval:
    """Axes that do not vary stay compact, unless they are joined with or cut from some that do."""
    held: list[int] = []
    made: list[int] = []
    for before, after in _joints(old, new):
        varies = any(n > 1 for n in x.low.shape[before])
        held += old[before] if varies else [1] * len(old[before])
        made += new[after] if varies else [1] * len(new[after])
    return Interval(*(np.broadcast_to(e, held).reshape(made) for e in (x.low, x.high)))


def _joints(old: Shape, new: Shape) -> list[tuple[slice, slice]]:
    """The finest runs of axes that hold equally many elements in both shapes."""
    ends = [
        {n: k for k, n in enumerate(accumulate(s, operator.mul, initial=1))} for s in (old, new)
    ]
    cuts = [(0, 0), *((ends[0][n], ends[1][n]) for n in ends[0] if n in ends[1])]
    return [(slice(a, c), slice(b, d)) for (a, b), (c, d) in pairwise(cuts)]


def pad(x: Interval, before: Sequence[int], after: Sequence[int], value: float) -> Interval:
    """Full axes are padded; along compact ones the interval takes `value` in."""
    pads = [(b, a) if n > 1 else (0, 0) for n, b, a in zip(x.low.shape, before, after, strict=True)]
    low = np.pad(x.low, pads, constant_values=value)
    high = np.pad(x.high, pads, constant_values=value)
    grown = any(b + a and n == 1 for n, b, a in zip(x.low.shape, before, after, strict=True))
    return hull(Interval(low, high), value) if grown else Interval(low, high)


def take(x: Interval, axis: int, indices: NDArray[np.int64] | slice) -> Interval:
    """Elements along an axis; a compact axis stays compact."""
    if x.low.shape[axis] == 1:
        return x
    index = (slice(None),) * axis + (indices,)
    return Interval(x.low[index], x.high[index])


def combine(x: Interval, axis: int, indices: NDArray[np.int64], factors: Reals) -> Interval:
    """Σ_t factors[t, k]·x[indices[t, k]] along an axis; a compact axis takes one hull of all k."""
    if x.low.shape[axis] == 1:
        up, down = (np.clip(f, 0, None).sum(axis=0) for f in (factors, -factors))
        rank = x.low.ndim
        raised, lowered = (mul(x, uniform(s.min(), s.max(), rank)) for s in (up, down))
        found = Interval(raised.low - lowered.high, raised.high - lowered.low)
    else:
        along = (-1, *[1] * (x.low.ndim - 1 - axis))
        shape = (*x.low.shape[:axis], indices.shape[1], *x.low.shape[axis + 1 :])
        found = Interval(np.zeros(shape), np.zeros(shape))
        for index, factor in zip(indices, factors, strict=True):
            part = scale(take(x, axis, index), factor.reshape(along))
            found = Interval(found.low + part.low, found.high + part.high)
    most = float(np.abs(factors).sum(axis=0).max(initial=0.0))
    return widen(found, (len(factors) + 4) * EPSILON * most * x.magnitude)


def concat(xs: Sequence[Interval], sizes: Sequence[int], axis: int) -> Interval:
    """Along `axis` every part is spread to its full size; other axes broadcast."""
    ends = []
    rank = xs[0].low.ndim
    common = list(np.broadcast_shapes(*(_without(x.low.shape, axis) for x in xs)))
    for side in ("low", "high"):
        parts = []
        for x, size in zip(xs, sizes, strict=True):
            shape = [*common[:axis], size, *common[axis : rank - 1]]
            parts.append(np.broadcast_to(getattr(x, side), shape))
        ends.append(np.concatenate(parts, axis))
    return Interval(ends[0], ends[1])


def total(x: Interval, shape: Shape, axes: Sequence[int]) -> Interval:
    """Sum over `axes`, which are dropped."""
    count = 1
    for a in axes:
        count *= shape[a] if x.low.shape[a] == 1 else 1
    low, high = x.low.sum(axis=tuple(axes)) * count, x.high.sum(axis=tuple(axes)) * count
    terms = int(np.prod([shape[a] for a in axes]))
    slack = (terms + 4) * EPSILON * terms * x.magnitude
    return Interval(np.asarray(low) - slack, np.asarray(high) + slack)


def conv(x: Interval, w: Interval, shape_w: Shape, groups: int, padded: bool) -> Interval:
    """Per output channel: x: N×C×·×·, w: O×C/groups×kh×kw. Space is taken as one hull."""
    low, high = x.low.min(axis=(2, 3)), x.high.max(axis=(2, 3))
    if padded:
        low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    outputs, per_group, kh, kw = shape_w
    if w.low.shape != shape_w:
        low_w = np.broadcast_to(w.low, shape_w)
        w = Interval(low_w, low_w if w.known else np.broadcast_to(w.high, shape_w))
    shape = (low.shape[0], groups * per_group)
    each = Interval(np.broadcast_to(low, shape), np.broadcast_to(high, shape))
    wc = _centre(w)
    # The centre is the same for every tap, so the taps' weights add up; the radii do not cancel.
    weight, spread = wc.sum(axis=(2, 3)), np.abs(wc).sum(axis=(2, 3))
    error = np.zeros_like(weight) if w.known else _radius(w).sum(axis=(2, 3))
    spread = spread + error
    lows, highs = [], []
    for g in range(groups):
        xs = slice(g * per_group, (g + 1) * per_group)
        os = slice(g * (outputs // groups), (g + 1) * (outputs // groups))
        ac, ar = _centre(each)[:, xs], _radius(each)[:, xs]
        centre = ac @ weight[os].T
        radius = ar @ spread[os].T + np.abs(ac) @ error[os].T
        slack = (per_group * kh * kw + 4) * EPSILON * (np.abs(ac) @ spread[os].T + radius)
        lows.append(centre - radius - slack)
        highs.append(centre + radius + slack)
    ends = [np.concatenate(e, axis=1)[:, :, None, None] for e in (lows, highs)]
    return Interval(ends[0], ends[1])


def _rounded(low: Reals, high: Reals) -> Interval:
    return Interval(low - EPSILON * np.abs(low), high + EPSILON * np.abs(high))


def _centre(x: Interval) -> Reals:
    return x.low if x.low is x.high else (x.low + x.high) / 2


def _radius(x: Interval) -> Reals:
    return np.zeros_like(x.low) if x.low is x.high else (x.high - x.low) / 2


def _spread(x: Interval, axis: int, size: int) -> Interval:
    if x.low.shape[axis] == size:
        return x
    shape = list(x.low.shape)
    shape[axis] = size
    low = np.broadcast_to(x.low, shape)
    return Interval(low, low if x.known else np.broadcast_to(x.high, shape))


def _without(shape: Shape, axis: int) -> Shape:
    return shape[:axis] + shape[axis + 1 :]
