"""The largest elements of an axis, in order, by ranking: every pair is compared at once.

The rank of an element is the number of elements that beat it. Ranks are compared with 0 … k − 1,
and the bits choose what has each rank. So an axis of n takes 5 rounds, whatever n and k are, and
n(n − 1)/2 comparisons side by side; a sorting network would take 3·log²n / 2 rounds. Where k is
much smaller than n, the largest of groups come first: fewer comparisons, 5 more rounds each time.

Ties go to the lower index, as ONNX asks. Shapes: the axis comes first, all others are one.
"""

from __future__ import annotations

from math import prod

import numpy as np

from mpcserve.compiler.booleans import bit_of, certain, negative
from mpcserve.compiler.builder import Builder, Ref

GROUP_FACTOR, SMALLEST_GROUP = 8, 16
"""Groups hold this many times k elements, and at least so many."""


def ranks(b: Builder, x: Ref) -> Ref:
    """How many elements of the first axis beat each one. Cost: 3 rounds, n(n − 1)/2 signs."""
    n = x.shape[0]
    first, second = np.triu_indices(n, 1)
    loses = negative(b, b.sub(b.gather(x, 0, first), b.gather(x, 0, second)))
    pair = np.zeros((n, n), np.int64)
    pair[first, second] = pair[second, first] = np.arange(len(first))
    other = np.array([[j for j in range(n) if j != i] for i in range(n)]).T
    mine = np.broadcast_to(np.arange(n), other.shape)
    bits = b.gather(loses, 0, pair[mine, other].ravel())
    # The later element of a pair is beaten where the earlier one is not.
    later = bit_of(b, (other < mine).reshape(-1, 1))
    bits = b.xor([bits, later])
    return b.tally(b.reshape(bits, (n - 1, n, *x.shape[1:])), [1] * (n - 1))


def at_rank(b: Builder, x: Ref, k: int) -> Ref:
    """The bits [element i has rank p], p < k. Shapes: [n, k, rest]. Cost: 4 rounds or 5."""
    n, rest = x.shape
    if n == 1:
        return certain(b, True, (1, 1, rest))
    place = b.expand(b.reshape(ranks(b, x), (n, 1, rest)), (n, k, rest))
    ends = b.constant(np.arange(1, k + 1).reshape(1, k, 1))
    up_to = negative(b, b.sub(place, ends))
    if k == 1:
        return up_to
    before = b.concat([certain(b, False, (n, 1, rest)), b.slice(up_to, 1, 0, k - 1)], 1)
    return b.xor([up_to, before])


def top(b: Builder, x: Ref, k: int) -> tuple[Ref, Ref]:
    """(the k largest, their indices) of the first axis, in order. Shapes: [n, rest] → [k, rest]."""
    index: Ref | None = None
    size = max(GROUP_FACTOR * k, SMALLEST_GROUP)
    while x.shape[0] > 2 * size:
        x, index = _of_groups(b, x, index, k, size)
    return _top(b, x, index, k)


def _top(b: Builder, x: Ref, index: Ref | None, k: int) -> tuple[Ref, Ref]:
    n = x.shape[0]
    bits = at_rank(b, x, k)
    values = _chosen(b, bits, x)
    if index is None:
        index = b.as_place(b.within(b.tally(bits, range(n)), 0.0, n - 1.0))
        b.found[index.id] = bits  # should it read a table
        return values, index
    return values, b.as_place(_chosen(b, bits, index))


def _chosen(b: Builder, bits: Ref, x: Ref) -> Ref:
    """The element of x at each rank. Cost: 1 round."""
    n, k, rest = bits.shape
    if n == 1:
        return b.expand(x, (k, rest))
    flags = [b.reshape(b.slice(bits, 0, i, i + 1), (k, rest)) for i in range(n)]
    y = b.choose(flags, [b.expand(b.slice(x, 0, i, i + 1), (k, rest)) for i in range(n)])
    held = b.interval(x)
    low, high = (e(axis=0, keepdims=True) for e in (held.low.min, held.high.max))
    return b.within(y, low, high)


def _of_groups(b: Builder, x: Ref, index: Ref | None, k: int, size: int) -> tuple[Ref, Ref]:
    """The k largest of each group of neighbours, and what is left; indices still go up in ties."""
    n, rest = x.shape
    groups = n // size
    whole = groups * size

    def split(v: Ref) -> Ref:
        parts = b.reshape(b.slice(v, 0, 0, whole), (groups, size, rest))
        return b.reshape(b.transpose(parts, [1, 0, 2]), (size, groups * rest))

    values, places = _top(b, split(x), None if index is None else split(index), k)
    if index is None:
        starts = np.repeat(np.arange(groups) * size, rest).reshape(1, -1)
        places = b.add(places, b.constant(starts))
        index = b.expand(b.constant(np.arange(n).reshape(n, 1)), (n, rest))
    joined = []
    for found, all_ in ((values, x), (places, index)):
        parts = b.transpose(b.reshape(found, (k, groups, rest)), [1, 0, 2])
        left = [b.slice(all_, 0, whole, n)] if n > whole else []
        joined.append(b.concat([b.reshape(parts, (groups * k, rest)), *left], 0))
    return joined[0], joined[1]


def axis_first(b: Builder, x: Ref, axis: int) -> Ref:
    """x with `axis` first and all others as one."""
    moved = b.transpose(x, [axis, *(a for a in range(len(x.shape)) if a != axis)])
    return b.reshape(moved, (x.shape[axis], prod(moved.shape[1:])))


def axis_back(b: Builder, y: Ref, axis: int, shape: tuple[int, ...]) -> Ref:
    """Inverse of `axis_first`: `shape` is that of the whole, of any length along `axis`."""
    rest = [d for a, d in enumerate(shape) if a != axis]
    order = [a + 1 if a < axis else 0 if a == axis else a for a in range(len(shape))]
    return b.transpose(b.reshape(y, (y.shape[0], *rest)), order)
