"""Pooling: maxima as tournaments per axis, averages as local sums times a public fraction."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from mpcserve.compiler.builder import Builder, Ref
from mpcserve.compiler.functions import aligned, reduce_max, times
from mpcserve.compiler.problems import Unsupported
from mpcserve.compiler.registry import lowers
from mpcserve.compiler.windows import pads_of, pooled_size


@lowers("MaxPool", since=7)
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
) -> Ref:
    """Maximum of each window: one axis after the other, each a tournament.

    A window small enough to be compared all at once is one group instead.
    """
    if b.n_outputs > 1:
        raise Unsupported("its output Indices is used, supported is the maximum alone")
    axes = len(kernel_shape)
    steps, spread = list(strides or [1] * axes), list(dilations or [1] * axes)
    before, after = pads_of(auto_pad, pads, x.shape[2:], kernel_shape, steps, spread)
    held = b.interval(x)
    # Padding must never win, and must not widen the bound: no element is below −2^bound.
    lowest = 0.0 if held.least >= 0 else -float((1 << b.bound(x)) - 1) * 2.0**-x.frac_bits
    at_once = 2 < _count(kernel_shape) <= b.group
    for i in reversed(range(axes)):
        axis = i + 2
        window = (kernel_shape[i], steps[i], spread[i])
        count = pooled_size(x.shape[axis], *window, (before[i], after[i]), ceil_mode)
        _refuse_empty(x.shape[axis], count, *window, before[i])
        windows = _windows(b, x, axis, count, window, before[i], lowest)
        best = windows if at_once else reduce_max(b, windows, axis)
        x = best if at_once else b.reshape(best, (*x.shape[:axis], count, *x.shape[axis + 1 :]))
    return _joint_max(b, x, axes) if at_once else x


def _joint_max(b: Builder, x: Ref, axes: int) -> Ref:
    """N × C × (kernel × count per axis) → N × C × counts: the maximum over all kernel axes."""
    kernels, counts = list(range(2, 2 + 2 * axes, 2)), list(range(3, 3 + 2 * axes, 2))
    x = b.transpose(x, [0, 1, *kernels, *counts])
    sizes = x.shape[2 + axes :]
    x = b.reshape(x, (*x.shape[:2], _count(x.shape[2 : 2 + axes]), *sizes))
    return b.reshape(reduce_max(b, x, 2), (*x.shape[:2], *sizes))


@lowers("GlobalMaxPool", since=1)
def global_max_pool(b: Builder, x: Ref, /) -> Ref:
    """Maximum over space: one tournament over all positions."""
    flat = b.reshape(x, (*x.shape[:2], _count(x.shape[2:])))
    return b.reshape(reduce_max(b, flat, 2), (*x.shape[:2], *[1] * (len(x.shape) - 2)))


@lowers("AveragePool", since=7)
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
    axes = len(kernel_shape)
    steps, spread = list(strides or [1] * axes), list(dilations or [1] * axes)
    before, after = pads_of(auto_pad, pads, x.shape[2:], kernel_shape, steps, spread)
    counts = []
    for i in range(axes):
        axis, size = i + 2, x.shape[i + 2]
        shape = (kernel_shape[i], steps[i], spread[i])
        count = pooled_size(size, *shape, (before[i], after[i]), ceil_mode)
        _refuse_empty(size, count, *shape, before[i])
        low, high = (-before[i], size + after[i]) if count_include_pad else (0, size)
        counts.append(_members(count, shape, before[i], low, high))
        windows = _windows(b, x, axis, count, shape, before[i], 0.0)
        x = b.sum(windows, [axis])
    return _divided(b, x, counts, 2)


@lowers("GlobalAveragePool", since=1)
def global_average_pool(b: Builder, x: Ref, /) -> Ref:
    """Mean over space: local. Error: 1.75 ulp."""
    axes = list(range(2, len(x.shape)))
    mean = times(b, b.sum(x, axes), 1.0 / _count(x.shape[2:]))
    return b.reshape(mean, (*x.shape[:2], *[1] * len(axes)))


def _windows(
    b: Builder,
    x: Ref,
    axis: int,
    count: int,
    window: tuple[int, int, int],
    before: int,
    value: float,
) -> Ref:
    """`axis` of length n becomes two: kernel × count."""
    kernel, stride, dilation = window
    size = x.shape[axis]
    reach = (count - 1) * stride + (kernel - 1) * dilation + 1
    heads, tails = [0] * len(x.shape), [0] * len(x.shape)
    heads[axis], tails[axis] = before, max(reach - before - size, 0)
    padded = b.pad(x, heads, tails, value)
    indices = [o * stride + k * dilation for k in range(kernel) for o in range(count)]
    taken = b.gather(padded, axis, indices)
    return b.reshape(taken, (*x.shape[:axis], kernel, count, *x.shape[axis + 1 :]))


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


def _count(shape: Sequence[int]) -> int:
    total = 1
    for d in shape:
        total *= d
    return total
