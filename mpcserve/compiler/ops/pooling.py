"""Pooling over any number of axes: maxima axis by axis, means and powers as local sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import ceil, log2, prod
from typing import Any

import numpy as np

from mpcserve.compiler.builder import Builder, Ref
from mpcserve.compiler.functions import absolute, aligned, maximum, reduce_max, times
from mpcserve.compiler.ops.ordering import duel
from mpcserve.compiler.problems import Unsupported
from mpcserve.compiler.rearrange import windows
from mpcserve.compiler.registry import lowers
from mpcserve.compiler.roots import power, root
from mpcserve.compiler.smooth import Reals, spectral
from mpcserve.compiler.windows import pads_of, pooled_size


@dataclass(frozen=True, slots=True)
class Pool:
    """Windows along one axis; `count` of them, the first begins `before` elements outside."""

    count: int
    kernel: int
    stride: int
    dilation: int
    before: int
    after: int

    @property
    def window(self) -> tuple[int, int, int]:
        """(kernel, stride, dilation)."""
        return self.kernel, self.stride, self.dilation


def pools_of(
    x: Ref,
    kernel: Sequence[int],
    strides: Sequence[int] | None,
    dilations: Sequence[int] | None,
    pads: tuple[str, Sequence[int] | None],
    ceil_mode: int,
) -> list[Pool]:
    """Windows per axis of space. `pads`: auto_pad and the explicit ones."""
    axes = len(kernel)
    steps, spread = list(strides or [1] * axes), list(dilations or [1] * axes)
    before, after = pads_of(*pads, x.shape[2:], kernel, steps, spread)
    found = []
    for i, size in enumerate(x.shape[2:]):
        window = (kernel[i], steps[i], spread[i])
        count = pooled_size(size, *window, (before[i], after[i]), ceil_mode)
        _refuse_empty(size, count, *window, before[i])
        found.append(Pool(count, *window, before[i], after[i]))
    return found


@lowers("MaxPool", since=1)
def max_pool(
    b: Builder,
    x: Ref,
    /,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    kernel_shape: Sequence[int] = (),
    pads: Sequence[int] | None = None,
    storage_order: int = 0,
    strides: Sequence[int] | None = None,
) -> Ref | tuple[Ref, Ref]:
    """Maximum of each window: one axis after the other, each a tournament.

    A window small enough to be compared all at once is one group instead. Indices, where they are
    asked for, are carried through the tournament.
    """
    pools = pools_of(x, kernel_shape, strides, dilations, (auto_pad, pads), ceil_mode)
    if b.n_outputs > 1:
        return _max_with_places(b, x, pools, storage_order)
    lowest, axes = _lowest(b, x), len(pools)
    if 2 < prod(kernel_shape) <= b.group:
        for i in reversed(range(axes)):
            pool = pools[i]
            x = windows(b, x, i + 2, pool.count, pool.window, pool.before, lowest)
        return _joint_max(b, x, axes)
    for i in reversed(range(axes)):
        x = _axis_max(b, x, i + 2, pools[i], lowest)
    return x


def _lowest(b: Builder, x: Ref) -> float:
    """What pads: it must never win, and must not widen the bound; no element is below −2^bound."""
    least = b.interval(x).least
    return 0.0 if least >= 0 else -float((1 << b.bound(x)) - 1) * 2.0**-x.frac_bits


def _axis_max(b: Builder, x: Ref, axis: int, pool: Pool, lowest: float) -> Ref:
    """Maximum of the windows along an axis, by whichever way compares fewer elements."""
    reach = (pool.count - 1) * pool.stride + (pool.kernel - 1) * pool.dilation + 1
    apart = (pool.kernel - 1) * pool.count
    if b.group > 2 or ceil(log2(pool.kernel)) * reach >= apart:
        each = windows(b, x, axis, pool.count, pool.window, pool.before, lowest)
        best = reduce_max(b, each, axis)
        return b.reshape(best, (*x.shape[:axis], pool.count, *x.shape[axis + 1 :]))
    return _doubled_max(b, x, axis, pool, reach, lowest)


def _doubled_max(b: Builder, x: Ref, axis: int, pool: Pool, reach: int, lowest: float) -> Ref:
    """Windows that overlap share their comparisons: maxima of 2, 4, 8 … neighbours."""
    heads, tails = [0] * len(x.shape), [0] * len(x.shape)
    heads[axis], tails[axis] = pool.before, max(reach - pool.before - x.shape[axis], 0)
    x = b.slice(b.pad(x, heads, tails, lowest), axis, 0, reach)
    covered = 1
    while covered < pool.kernel:
        step = min(covered, pool.kernel - covered)
        far = step * pool.dilation
        ends = b.slice(x, axis, 0, x.shape[axis] - far), b.slice(x, axis, far, x.shape[axis])
        x, covered = maximum(b, *ends), covered + step
    return b.slice(x, axis, 0, x.shape[axis], pool.stride)


def _max_with_places(b: Builder, x: Ref, pools: list[Pool], storage_order: int) -> tuple[Ref, Ref]:
    """Maxima and their flat positions in x; of equal elements the first.

    What the tournament carries is the distance from the window's first element, in few bits.
    """
    space, lowest = x.shape[2:], _lowest(b, x)
    order = reversed(range(len(space))) if storage_order == 0 else range(len(space))
    steps, step = [0] * len(space), 1
    for i in order:
        steps[i], step = step, step * space[i]
    place: Ref | None = None
    for i in reversed(range(len(space))):
        axis, pool = i + 2, pools[i]
        x = windows(b, x, axis, pool.count, pool.window, pool.before, lowest)
        own = _along(np.arange(pool.kernel) * pool.dilation * steps[i], axis, len(x.shape))
        far = b.expand(b.constant(own), x.shape)
        if place is not None:
            carried = windows(b, place, axis, pool.count, pool.window, pool.before, 0.0)
            far = b.add(far, carried)
        x, place = _tournament(b, x, far, axis)
    assert place is not None
    for i, pool in enumerate(pools):
        first = (np.arange(pool.count) * pool.stride - pool.before) * steps[i]
        place = b.add(place, b.constant(_along(first, i + 2, len(x.shape))))
    planes = np.arange(prod(x.shape[:2])) * prod(space)
    return x, b.add(place, b.constant(planes.reshape((*x.shape[:2], *[1] * len(space)))))


def _along(values: np.ndarray[Any, Any], axis: int, rank: int) -> np.ndarray[Any, Any]:
    return values.reshape([-1 if i == axis else 1 for i in range(rank)])


def _tournament(b: Builder, x: Ref, index: Ref, axis: int) -> tuple[Ref, Ref]:
    """(maximum, its index) along an axis, which is dropped. Of equal ones the first wins."""
    while (n := x.shape[axis]) > 1:
        even = n - n % 2
        pairs = [[b.slice(t, axis, k, even, 2) for k in (0, 1)] for t in (x, index)]
        best = duel(b, False, *pairs[0], *pairs[1])
        rest = [[b.slice(t, axis, even, n)] if n > even else [] for t in (x, index)]
        x, index = (b.concat([t, *r], axis) for t, r in zip(best, rest, strict=True))
    shape = (*x.shape[:axis], *x.shape[axis + 1 :])
    return b.reshape(x, shape), b.reshape(index, shape)


def _joint_max(b: Builder, x: Ref, axes: int) -> Ref:
    """N × C × (kernel × count per axis) → N × C × counts: the maximum over all kernel axes."""
    kernels, counts = list(range(2, 2 + 2 * axes, 2)), list(range(3, 3 + 2 * axes, 2))
    x = b.transpose(x, [0, 1, *kernels, *counts])
    sizes = x.shape[2 + axes :]
    x = b.reshape(x, (*x.shape[:2], prod(x.shape[2 : 2 + axes]), *sizes))
    return b.reshape(reduce_max(b, x, 2), (*x.shape[:2], *sizes))


@lowers("GlobalMaxPool", since=1)
def global_max_pool(b: Builder, x: Ref, /) -> Ref:
    """Maximum over space: one tournament over all positions."""
    flat = b.reshape(x, (*x.shape[:2], prod(x.shape[2:])))
    return b.reshape(reduce_max(b, flat, 2), (*x.shape[:2], *[1] * (len(x.shape) - 2)))


@lowers("AveragePool", since=1)
def average_pool(
    b: Builder,
    x: Ref,
    /,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Sequence[int] | None = None,
    kernel_shape: Sequence[int] = (),
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Ref:
    """Mean of each window: local. Error: 1.75 ulp."""
    pools = pools_of(x, kernel_shape, strides, dilations, (auto_pad, pads), ceil_mode)
    counts = []
    for pool, size in zip(pools, x.shape[2:], strict=True):
        low, high = (-pool.before, size + pool.after) if count_include_pad else (0, size)
        counts.append(_members(pool.count, pool.window, pool.before, low, high))
    return _divided(b, _summed(b, x, pools), counts, 2)


def _summed(b: Builder, x: Ref, pools: list[Pool]) -> Ref:
    """Sum of each window, axis by axis."""
    for axis, pool in enumerate(pools, 2):
        x = b.sum(windows(b, x, axis, pool.count, pool.window, pool.before, 0.0), [axis])
    return x


@lowers("GlobalAveragePool", since=1)
def global_average_pool(b: Builder, x: Ref, /) -> Ref:
    """Mean over space: local. Error: 1.75 ulp."""
    axes = list(range(2, len(x.shape)))
    mean = times(b, b.sum(x, axes), 1.0 / prod(x.shape[2:]))
    return b.reshape(mean, (*x.shape[:2], *[1] * len(axes)))


@lowers("LpPool", since=2)
def lp_pool(
    b: Builder,
    x: Ref,
    /,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    kernel_shape: Sequence[int] = (),
    p: int = 2,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Ref:
    """(Σ |x|^p)^(1/p) of each window: comparisons for odd p, a root for p > 1."""
    pools = pools_of(x, kernel_shape, strides, dilations, (auto_pad, pads), ceil_mode)
    return _rooted(b, _summed(b, _powered(b, x, p), pools), p)


@lowers("GlobalLpPool", since=2)
def global_lp_pool(b: Builder, x: Ref, /, *, p: int = 2) -> Ref:
    """(Σ |x|^p)^(1/p) over space: comparisons for odd p, a root for p > 1."""
    axes = list(range(2, len(x.shape)))
    total = _rooted(b, b.sum(_powered(b, x, p), axes), p)
    return b.reshape(total, (*x.shape[:2], *[1] * len(axes)))


ROOT_BITS = 10
"""By how many bits powers are finer: a root makes large errors of small ones near zero."""


def _powered(b: Builder, x: Ref, p: int) -> Ref:
    """|x|^p, finer than usual."""
    if p == 1:
        return absolute(b, x)
    to = b.frac_bits + ROOT_BITS
    square = b.mul(x, x, to=min(to, 2 * x.frac_bits))
    if p <= 3:
        return square if p == 2 else b.mul(absolute(b, x), square, to=to)
    return b.mul(_powered(b, x, p - p // 2), _powered(b, x, p // 2), to=to)


def _rooted(b: Builder, x: Ref, p: int) -> Ref:
    """x^(1/p)."""
    while p % 2 == 0:
        x, p = root(b, x, b.frac_bits + (ROOT_BITS if p > 2 else 0)), p // 2
    return x if p == 1 else power(b, x, 1.0 / p)


NARROW = 4.0
"""A power of what varies by no more than this is one sum of waves."""


def power_curve(x: Reals, exponent: float) -> Reals:
    """x^exponent."""
    return np.asarray(x**exponent)


@lowers("LRN", since=1)
def lrn(
    b: Builder,
    x: Ref,
    /,
    *,
    size: int,
    alpha: float = 0.0001,
    beta: float = 0.75,
    bias: float = 1.0,
) -> Ref:
    """x / (bias + alpha / size · Σ x²)^beta over neighbouring channels.

    Rounds: 3 where the sum is at most four times the bias, else the power's and 2.
    """
    pool = Pool(x.shape[1], size, 1, 1, (size - 1) // 2, size // 2)
    near = windows(b, b.mul(x, x), 1, pool.count, pool.window, pool.before, 0.0)
    total = b.offset(times(b, b.sum(near, [1]), alpha / size), bias)
    held = b.interval(total)
    low = max(held.least, bias / 2)
    if held.most <= NARROW * low:
        scale = spectral(b, total, power_curve, low, held.most, (-beta,))
    else:
        scale = power(b, total, -beta)
    return b.mul(x, scale)


def _members(
    count: int, window: tuple[int, int, int], before: int, low: int, high: int
) -> list[int]:
    """How many positions of each window lie in [low, high)."""
    kernel, stride, dilation = window
    return [
        sum(low <= o * stride - before + k * dilation < high for k in range(kernel))
        for o in range(count)
    ]


def _divided(b: Builder, x: Ref, counts: list[list[int]], axis: int, by: int = 1) -> Ref:
    """x over the product of its windows' counts, by regions of equal counts."""
    if not counts:
        return times(b, x, 1.0 / by)
    parts, start = [], 0
    for members, run in groupby(counts[0]):
        stop = start + len(list(run))
        part = b.slice(x, axis, start, stop)
        parts.append(_divided(b, part, counts[1:], axis + 1, by * members))
        start = stop
    return b.concat(aligned(b, *parts), axis)


def _refuse_empty(
    size: int, count: int, kernel: int, stride: int, dilation: int, before: int
) -> None:
    inside = _members(count, (kernel, stride, dilation), before, 0, size)
    if count < 1 or min(inside) < 1:
        raise Unsupported("a window lies wholly in the padding", "use smaller pads")
