"""ArgMax, ArgMin, TopK, Hardmax: secret indices of the largest elements.

An index is a secret number: revealed where it is an output, or used to gather.
"""

from __future__ import annotations

import numpy as np

from mpcserve.compiler import order
from mpcserve.compiler.booleans import negative
from mpcserve.compiler.builder import Builder, Operand, Ref
from mpcserve.compiler.functions import axis_of, ints_of, values_of
from mpcserve.compiler.problems import Unsupported
from mpcserve.compiler.registry import lowers


@lowers("ArgMax", since=1)
def arg_max(
    b: Builder, x: Ref, /, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0
) -> Ref:
    """Index of the largest element: a tournament that carries the index, 3 rounds a level.

    Where rounds count more than bytes, by ranking: 5 rounds.
    """
    axis = axis_of(axis, len(x.shape))
    index = b.as_place(_largest(b, x, axis, bool(select_last_index)))
    shape = tuple(d for k, d in enumerate(x.shape) if k != axis)
    return index if keepdims else b.reshape(index, shape)


@lowers("ArgMin", since=1)
def arg_min(
    b: Builder, x: Ref, /, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0
) -> Ref:
    """Index of the smallest element: as ArgMax, of −x."""
    turned = b.scale(x, -1)
    return arg_max(b, turned, axis=axis, keepdims=keepdims, select_last_index=select_last_index)


@lowers("TopK", since=1)
def top_k_attribute(b: Builder, x: Ref, /, *, axis: int = -1, k: int) -> tuple[Ref, Ref]:
    """The k largest and their indices: by ranking, 5 rounds (see `order`)."""
    return _top(b, x, k, axis, True)


@lowers("TopK", since=10)
def top_k(
    b: Builder, x: Ref, k: Operand, /, *, axis: int = -1, largest: int = 1, sorted: int = 1
) -> tuple[Ref, Ref]:
    """The k largest or smallest and their indices, in order: by ranking, 5 rounds (see `order`)."""
    return _top(b, x, ints_of(k, "k")[0], axis, bool(largest))


def _top(b: Builder, x: Ref, k: int, axis: int, largest: bool) -> tuple[Ref, Ref]:
    axis = axis_of(axis, len(x.shape))
    if not 1 <= k <= x.shape[axis]:
        raise Unsupported(f"takes {k} of {x.shape[axis]} elements", "export it with another k")
    rows = order.axis_first(b, x if largest else b.scale(x, -1), axis)
    values, index = (order.axis_back(b, y, axis, x.shape) for y in order.top(b, rows, k))
    return values if largest else b.scale(values, -1), index


@lowers("Hardmax", since=13)
def hardmax(b: Builder, x: Ref, /, *, axis: int = -1) -> Ref:
    """1 at the first largest element, else 0: by ranking up to 16 elements, else an ArgMax."""
    return _hardmax(b, x, axis_of(axis, len(x.shape)))


@lowers("Hardmax", since=1)
def flat_hardmax(b: Builder, x: Ref, /, *, axis: int = 1) -> Ref:
    """1 at the first largest element of all axes from `axis` on, else 0."""
    head = int(np.prod(x.shape[: axis_of(axis, len(x.shape))]))
    return b.reshape(_hardmax(b, b.reshape(x, (head, int(np.prod(x.shape)) // head)), 1), x.shape)


RANKED = 16
"""Axes up to here are ranked rather than searched by a tournament."""


def _hardmax(b: Builder, x: Ref, axis: int) -> Ref:
    n = x.shape[axis]
    rows = order.axis_first(b, x, axis)
    if n <= RANKED:
        first = b.reshape(order.at_rank(b, rows, 1), rows.shape)
    else:
        index = b.expand(_largest(b, rows, 0, False), rows.shape)
        ends = b.expand(b.constant(np.arange(n).reshape(n, 1)), rows.shape)
        reached = negative(b, b.offset(b.sub(index, ends), -1.0))
        before = negative(b, b.sub(index, ends))
        first = b.xor([reached, before])
    return order.axis_back(b, b.number(first), axis, x.shape)


def _largest(b: Builder, x: Ref, axis: int, last: bool) -> Ref:
    """Index of the largest element, the axis kept with length 1."""
    n = x.shape[axis]
    if b.group > 2 and n > 2:
        rows = order.axis_first(b, x, axis)
        rows = b.gather(rows, 0, np.arange(n)[::-1]) if last else rows
        _, index = order.top(b, rows, 1)
        index = b.offset(b.scale(index, -1), n - 1.0) if last else index
        return order.axis_back(b, index, axis, x.shape)
    along = [n if i == axis else 1 for i in range(len(x.shape))]
    index = b.expand(b.constant(np.arange(n).reshape(along)), x.shape)
    while (n := x.shape[axis]) > 1:
        # Neighbours meet, so indices stay in order and ties are broken as ONNX asks.
        even = n - n % 2
        pairs = [[b.slice(t, axis, k, even, 2) for k in (0, 1)] for t in (x, index)]
        best, chosen = duel(b, last, *pairs[0], *pairs[1])
        rest = [[b.slice(t, axis, even, n)] if n > even else [] for t in (x, index)]
        x, index = b.concat([best, *rest[0]], axis), b.concat([chosen, *rest[1]], axis)
    return index


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


@lowers("OneHot", since=9)
def one_hot(b: Builder, index: Ref, depth: Operand, values: Operand, /, *, axis: int = -1) -> Ref:
    """The on-value at a secret index along a new axis, else the off-value: 2 or 3 rounds.

    A negative index counts from the end; one outside of [−depth, depth) finds no place.
    """
    count = ints_of(depth, "depth")[0]
    off, on = (float(v) for v in np.ravel(values_of(values, "values")))
    at = axis_of(axis, len(index.shape) + 1)
    shape = (*index.shape[:at], 1, *index.shape[at:])
    lowest = -count if b.interval(index).least < 0 else 0
    ends = np.arange(lowest, count + 1).reshape(-1, *[1] * (len(shape) - at - 1))
    places = b.constant(ends, index.frac_bits)
    below = negative(b, b.sub(b.reshape(index, shape), places))
    each = b.xor([b.slice(below, at, k, len(ends) - 1 + k) for k in range(2)])
    found = b.slice(each, at, len(ends) - 1 - count, len(ends) - 1)
    if lowest:
        found = b.xor([found, b.slice(each, at, 0, count)])
    frac_bits = 0 if off.is_integer() and on.is_integer() else b.frac_bits
    return b.offset(b.number(found, on - off, frac_bits), off)
