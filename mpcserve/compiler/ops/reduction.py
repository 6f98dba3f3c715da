"""Sums and means over axes, and the index of the largest element."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from mpcserve.compiler.builder import Builder, Operand, Ref
from mpcserve.compiler.functions import axis_of, ints_of, times
from mpcserve.compiler.registry import lowers


@lowers("ReduceSum", since=1)
def reduce_sum(
    b: Builder,
    x: Ref,
    axes_input: Operand | None = None,
    /,
    *,
    axes: Sequence[int] | None = None,
    keepdims: int = 1,
    noop_with_empty_axes: int = 0,
) -> Ref:
    """Sum over axes: local."""
    over = _axes(x, axes_input, axes, noop_with_empty_axes)
    return _kept(b, x, b.sum(x, over), over, keepdims)


@lowers("ReduceMean", since=1)
def reduce_mean(
    b: Builder,
    x: Ref,
    axes_input: Operand | None = None,
    /,
    *,
    axes: Sequence[int] | None = None,
    keepdims: int = 1,
    noop_with_empty_axes: int = 0,
) -> Ref:
    """Mean over axes: local. Error: 1.75 ulp."""
    over = _axes(x, axes_input, axes, noop_with_empty_axes)
    mean = times(b, b.sum(x, over), 1.0 / prod(x.shape[a] for a in over))
    return _kept(b, x, mean, over, keepdims)


@lowers("ArgMax", since=1)
def arg_max(
    b: Builder, x: Ref, /, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0
) -> Ref:
    """Index of the largest element: a tournament that carries the index."""
    axis = axis_of(axis, len(x.shape))
    n = x.shape[axis]
    along = [n if i == axis else 1 for i in range(len(x.shape))]
    index = b.expand(b.constant(np.arange(n).reshape(along)), x.shape)
    while (n := x.shape[axis]) > 1:
        # Neighbours meet, so indices stay in order and ties are broken as ONNX asks.
        even = n - n % 2
        pairs = [[b.slice(t, axis, k, even, 2) for k in (0, 1)] for t in (x, index)]
        best, chosen = duel(b, bool(select_last_index), *pairs[0], *pairs[1])
        rest = [[b.slice(t, axis, even, n)] if n > even else [] for t in (x, index)]
        x, index = b.concat([best, *rest[0]], axis), b.concat([chosen, *rest[1]], axis)
    shape = tuple(d for k, d in enumerate(x.shape) if k != axis)
    return index if keepdims else b.reshape(index, shape)


def duel(b: Builder, last: bool, a: Ref, later: Ref, i: Ref, j: Ref) -> tuple[Ref, Ref]:
    """(max(a, later), its index): a tie goes to the later one iff `last`. One comparison."""
    held = b.interval(a), b.interval(later)
    first, second = (a, later) if not last else (later, a)
    gap = b.sub(first, second)
    wins = b.sign(gap)
    # gap < 0: the second is strictly larger; a tie keeps the first.
    best = b.add(second, b.select(wins, gap, when=0, nonnegative=True))
    b.within(
        best,
        np.maximum(held[0].low, held[1].low),
        np.maximum(held[0].high, held[1].high),
    )
    here, there = (i, j) if not last else (j, i)
    chosen = b.add(here, b.select(wins, b.sub(there, here), when=1))
    low = np.minimum(b.interval(i).low, b.interval(j).low)
    high = np.maximum(b.interval(i).high, b.interval(j).high)
    return best, b.within(chosen, low, high)


def _axes(x: Ref, given: Operand | None, attribute: Sequence[int] | None, noop: int) -> list[int]:
    rank = len(x.shape)
    axes = ints_of(given, "axes") if given is not None else list(attribute or ())
    if not axes:
        return [] if noop else list(range(rank))
    return sorted({axis_of(a, rank) for a in axes})


def _kept(b: Builder, x: Ref, y: Ref, over: list[int], keepdims: int) -> Ref:
    if not keepdims:
        return y
    return b.reshape(y, [1 if a in over else d for a, d in enumerate(x.shape)])
