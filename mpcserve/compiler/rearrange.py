"""Public linear maps of secret values: elements moved, repeated, dropped, or summed with weights.

All of them are local: where an element goes and by what it is multiplied is structure, which the
plan shows. Nothing of a weight of the model may be used here.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, log2, prod

import numpy as np
from numpy.typing import NDArray

from mpcserve.compiler.builder import Array, Builder, Operand, Ref
from mpcserve.compiler.functions import ROUNDING_ULPS, with_frac_bits
from mpcserve.compiler.problems import TooWide
from mpcserve.compiler.values import WIDEST_BOUND

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

NOWHERE = -1
"""The position of an element that is zero."""

FINEST = 20
"""Weights of a sum need no more fraction bits: 2^-21 of the operand, a wider ring for nothing."""

COARSEST = 6
"""Weights with fewer are not worth the name."""


def positions_of(shape: Sequence[int]) -> Ints:
    """The flat position of every element."""
    return np.arange(prod(shape), dtype=np.int64).reshape(tuple(shape))


def picked(b: Builder, x: Operand, positions: Ints) -> Operand:
    """Elements at flat positions, in their shape; NOWHERE is zero. Exact, local."""
    if isinstance(x, np.ndarray):
        return np.append(x.ravel(), x.dtype.type(0))[positions]
    return taken(b, x, positions)


def taken(b: Builder, x: Ref, positions: Ints, keep: int = 0) -> Ref:
    """As `picked`, of a secret value: positions in x without its `keep` leading axes."""
    lead, count = x.shape[:keep], prod(x.shape[keep:])
    flat = b.reshape(x, (*lead, count))
    if positions.min(initial=0) == NOWHERE:
        flat = b.pad(flat, [0] * (keep + 1), [*[0] * keep, 1])
        positions = np.where(positions == NOWHERE, count, positions)
    return b.reshape(b.gather(flat, keep, positions.ravel()), (*lead, *positions.shape))


def assembled(b: Builder, parts: Sequence[Ref], positions: Ints) -> Ref:
    """Elements at flat positions in all parts, one behind the other."""
    flat = b.concat([b.reshape(x, (prod(x.shape),)) for x in parts], 0)
    return taken(b, flat, positions)


def transposed(b: Builder, x: Operand, perm: Sequence[int]) -> Operand:
    """Axes permuted, of a secret value or a constant."""
    return b.transpose(x, perm) if isinstance(x, Ref) else x.transpose(tuple(perm))


def shaped(b: Builder, x: Operand, shape: Sequence[int]) -> Operand:
    """Another shape, of a secret value or a constant."""
    return b.reshape(x, shape) if isinstance(x, Ref) else x.reshape(tuple(shape))


def windows(
    b: Builder,
    x: Ref,
    axis: int,
    count: int,
    window: tuple[int, int, int],
    before: int,
    value: float,
) -> Ref:
    """`axis` becomes two, kernel × count: element (k, o) is x[o·stride + k·dilation − before].

    `window`: (kernel, stride, dilation). Outside of x is the public `value`. Exact, local.
    """
    kernel, stride, dilation = window
    size = x.shape[axis]
    reach = (count - 1) * stride + (kernel - 1) * dilation + 1
    heads, tails = [0] * len(x.shape), [0] * len(x.shape)
    heads[axis], tails[axis] = max(before, 0), max(reach - before - size, 0)
    padded = b.pad(x, heads, tails, value)
    span = (count - 1) * stride + 1
    starts = [k * dilation + max(-before, 0) for k in range(kernel)]
    taken = b.concat([b.slice(padded, axis, s, s + span, stride) for s in starts], axis)
    return b.reshape(taken, (*x.shape[:axis], kernel, count, *x.shape[axis + 1 :]))


def mapped(b: Builder, x: Ref, axis: int, matrix: Floats) -> Ref:
    """matrix @ x along an axis, matrix: new length × old. Error and cost: as `combined`."""
    taps = int((matrix != 0).sum(axis=1).max())
    order = np.argsort(matrix == 0, axis=1, kind="stable")[:, : max(taps, 1)]
    weights = np.take_along_axis(matrix, order, axis=1)
    return combined(b, x, axis, order.T, weights.T)


def combined(b: Builder, x: Ref, axis: int, indices: Array, weights: Floats) -> Ref:
    """Σ_t weights[t, k]·x[indices[t, k]] along an axis, for public real weights.

    Error: none where the weights are whole numbers, else 1.75 ulp and Σ_t 2^-21·|x| at most.
    Cost: none, width only.
    """
    if x.frac_bits < b.frac_bits and np.any(weights != np.rint(weights)):
        x = with_frac_bits(b, x, b.frac_bits)
    shift, factors = scaled(weights, b.bound(x))
    if len(factors) == 1 and np.all(factors == 1):
        return b.gather(x, axis, indices[0])
    return b.shift(b.combine(x, axis, np.asarray(indices, np.int64), factors), shift, 0)


def scaled(weights: Floats, bound: int) -> tuple[int, Ints]:
    """(s, n): weights ≈ n / 2^s, fine enough for integers below 2^bound, taps × elements."""
    sums = float(np.abs(weights).sum(axis=0).max(initial=0.0))
    # The sum of 2^s·weight·x must stay below 2^62 before it is shifted.
    room = WIDEST_BOUND - 1 - bound - ceil(log2(max(sums, 1.0)))
    for s in range(min(FINEST, room) + 1):
        rounded = np.rint(np.ldexp(weights, s))
        off = float(np.abs(np.ldexp(weights, s) - rounded).sum(axis=0).max(initial=0.0))
        finest = s == min(FINEST, room) >= COARSEST
        if finest or np.ldexp(off, bound - s) <= ROUNDING_ULPS:
            return s, rounded.astype(np.int64)
    raise TooWide(
        f"its input needs {bound} bits, too many for weights that add up to {sums:g}",
        "calibrate the model with samples, or lower --frac-bits",
    )
