"""Sums, means, norms, products and extrema over axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import numpy as np

from mpcserve.compiler.builder import Builder, Operand, Ref
from mpcserve.compiler.functions import (
    absolute,
    axis_of,
    ints_of,
    times,
    with_frac_bits,
)
from mpcserve.compiler.functions import reduce_max as largest
from mpcserve.compiler.products import fitting
from mpcserve.compiler.registry import lowers
from mpcserve.compiler.roots import logarithm, root
from mpcserve.compiler.softmax import log_sum_exp

Core = Callable[[Builder, Ref, list[int]], Ref]
"""What becomes of x and the axes to reduce; none of them: each element by itself."""


def reduces(op: str) -> Callable[[Core], Callable[..., Ref]]:
    """The lowering of a Reduce operator, whose parameters are the same for all of them."""

    def wrapped(core: Core) -> Callable[..., Ref]:
        def reduce(
            b: Builder,
            x: Ref,
            axes_input: Operand | None = None,
            /,
            *,
            axes: Sequence[int] | None = None,
            keepdims: int = 1,
            noop_with_empty_axes: int = 0,
        ) -> Ref:
            over = _axes(x, axes_input, axes, noop_with_empty_axes)
            return _kept(b, x, core(b, x, over), over, keepdims)

        # Not functools.wraps: the parameters are those of `reduce`.
        reduce.__name__, reduce.__doc__ = core.__name__, core.__doc__
        return lowers(op, since=1)(reduce)

    return wrapped


@reduces("ReduceSum")
def reduce_sum(b: Builder, x: Ref, over: list[int]) -> Ref:
    """Sum over axes: local."""
    return b.sum(x, over)


@reduces("ReduceMean")
def reduce_mean(b: Builder, x: Ref, over: list[int]) -> Ref:
    """Mean over axes: local. Error: 1.75 ulp."""
    return times(b, b.sum(x, over), 1.0 / prod(x.shape[a] for a in over))


@reduces("ReduceMax")
def reduce_max(b: Builder, x: Ref, over: list[int]) -> Ref:
    """Maximum over axes: a tournament (see `functions.reduce_max`)."""
    return _extremum(b, x, over)


@reduces("ReduceMin")
def reduce_min(b: Builder, x: Ref, over: list[int]) -> Ref:
    """Minimum over axes: a tournament, as of −x."""
    return b.scale(_extremum(b, b.scale(x, -1), over), -1)


@reduces("ReduceProd")
def reduce_prod(b: Builder, x: Ref, over: list[int]) -> Ref:
    """Product over axes: ⌈log2 n⌉ rounds. Error: n ulp of each partial product, times the rest."""
    return _product(b, x, over)


@reduces("ReduceL1")
def reduce_l1(b: Builder, x: Ref, over: list[int]) -> Ref:
    """Σ |x|: a comparison per element, 3 rounds."""
    return b.sum(absolute(b, x), over)


@reduces("ReduceSumSquare")
def reduce_sum_square(b: Builder, x: Ref, over: list[int]) -> Ref:
    """Σ x²: one product per sum."""
    return _squares(b, x, over)


@reduces("ReduceL2")
def reduce_l2(b: Builder, x: Ref, over: list[int]) -> Ref:
    """√Σ x²: a product and a root, up to 8 rounds. Error: 2e-5 relative and 2 ulp."""
    if not over:
        return absolute(b, x)
    return root(b, _squares(b, x, over, FINE_BITS), b.frac_bits)


@reduces("ReduceLogSum")
def reduce_log_sum(b: Builder, x: Ref, over: list[int]) -> Ref:
    """log Σ x for a positive sum: up to 5 rounds. Error: 5e-5."""
    return logarithm(b, b.sum(x, over))


@reduces("ReduceLogSumExp")
def reduce_log_sum_exp(b: Builder, x: Ref, over: list[int]) -> Ref:
    """log Σ e^x over axes. Error: 3e-4."""
    if not over:
        return x
    flat = _flat(b, x, over)
    return b.reshape(log_sum_exp(b, flat, len(flat.shape) - 1), flat.shape[:-1])


FINE_BITS = 20
"""Fraction bits of a radicand, where the root of a small one is asked for."""


def _extremum(b: Builder, x: Ref, over: list[int]) -> Ref:
    flat = _flat(b, x, over)
    return b.reshape(largest(b, flat, len(flat.shape) - 1), flat.shape[:-1])


def _squares(b: Builder, x: Ref, over: list[int], to: int | None = None) -> Ref:
    """Σ x², each sum truncated once: a row times itself."""
    x = with_frac_bits(b, x, max(x.frac_bits, min(b.frac_bits, FINE_BITS)))
    if not over:
        return b.mul(x, x, to=to)
    flat = _flat(b, x, over)
    lead, n = flat.shape[:-1], flat.shape[-1]
    row, column = b.reshape(flat, (*lead, 1, n)), b.reshape(flat, (*lead, n, 1))
    y = b.reshape(b.matmul(row, column, to=to), lead)
    held, ulp = b.interval(flat), 2.0**-y.frac_bits
    most = np.square(np.maximum(np.abs(held.low), np.abs(held.high)))
    total = most.sum(axis=-1) * (n if most.shape[-1] == 1 else 1)
    return b.within(y, np.full_like(total, -ulp), total + ulp)


def _product(b: Builder, x: Ref, over: list[int]) -> Ref:
    """By halves; each partial product keeps as many fraction bits as the next one can hold."""
    if not over:
        return x
    flat = with_frac_bits(b, _flat(b, x, over), max(x.frac_bits, b.frac_bits))
    axis = len(flat.shape) - 1
    while (n := flat.shape[axis]) > 1:
        half = n // 2
        joined = fitting(b, [b.slice(flat, axis, k * half, (k + 1) * half) for k in range(2)])
        rest = [b.slice(flat, axis, 2 * half, n)] if n % 2 else []
        flat = b.concat([joined, *(with_frac_bits(b, r, joined.frac_bits) for r in rest)], axis)
    return b.reshape(flat, flat.shape[:-1])


def _flat(b: Builder, x: Ref, over: list[int]) -> Ref:
    """The axes `over` as one, the last."""
    rest = [a for a in range(len(x.shape)) if a not in over]
    moved = b.transpose(x, [*rest, *over])
    return b.reshape(moved, (*(x.shape[a] for a in rest), prod(x.shape[a] for a in over)))


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
