"""Softmax and its relatives."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from mpcserve.compiler import softmax as of
from mpcserve.compiler.builder import Builder, Operand, Ref
from mpcserve.compiler.functions import axis_of, ints_of
from mpcserve.compiler.registry import lowers


@lowers("Softmax", since=13)
def softmax(b: Builder, x: Ref, /, *, axis: int = -1) -> Ref:
    """e^x / Σ e^x over an axis. Error: 2e-4."""
    return of.softmax(b, x, axis_of(axis, len(x.shape)))


@lowers("LogSoftmax", since=13)
def log_softmax(b: Builder, x: Ref, /, *, axis: int = -1) -> Ref:
    """x − log Σ e^x over an axis. Error: 3e-4."""
    return of.log_softmax(b, x, axis_of(axis, len(x.shape)))


@lowers("Softmax", since=1)
def flat_softmax(b: Builder, x: Ref, /, *, axis: int = 1) -> Ref:
    """e^x / Σ e^x over all axes from `axis` on. Error: 2e-4."""
    return b.reshape(of.softmax(b, _flat(b, x, axis), 1), x.shape)


@lowers("LogSoftmax", since=1)
def flat_log_softmax(b: Builder, x: Ref, /, *, axis: int = 1) -> Ref:
    """x − log Σ e^x over all axes from `axis` on. Error: 3e-4."""
    return b.reshape(of.log_softmax(b, _flat(b, x, axis), 1), x.shape)


@lowers("ReduceLogSumExp", since=1)
def reduce_log_sum_exp(
    b: Builder,
    x: Ref,
    axes_input: Operand | None = None,
    /,
    *,
    axes: Sequence[int] | None = None,
    keepdims: int = 1,
    noop_with_empty_axes: int = 0,
) -> Ref:
    """log Σ e^x over axes. Error: 3e-4."""
    rank = len(x.shape)
    given = list(axes or ()) if axes_input is None else ints_of(axes_input, "axes")
    if not given and noop_with_empty_axes:
        return x
    over = sorted({axis_of(a, rank) for a in given} or range(rank))
    rest = [a for a in range(rank) if a not in over]
    moved = b.transpose(x, [*rest, *over])
    flat = b.reshape(moved, (*(x.shape[a] for a in rest), prod(x.shape[a] for a in over)))
    y = of.log_sum_exp(b, flat, len(rest))
    kept = [1 if a in over else d for a, d in enumerate(x.shape)]
    return b.reshape(y, kept if keepdims else [x.shape[a] for a in rest])


def _flat(b: Builder, x: Ref, axis: int) -> Ref:
    head = prod(x.shape[: axis_of(axis, len(x.shape))])
    return b.reshape(x, (head, prod(x.shape) // head))
