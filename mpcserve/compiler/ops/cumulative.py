"""CumSum and CumProd: every element joins those before it in log2 n steps."""

from __future__ import annotations

from collections.abc import Callable

from mpcserve.compiler.builder import Builder, Operand, Ref
from mpcserve.compiler.functions import axis_of, ints_of, with_frac_bits
from mpcserve.compiler.products import fitting
from mpcserve.compiler.registry import lowers


@lowers("CumSum", since=11)
def cum_sum(b: Builder, x: Ref, axis: Operand, /, *, exclusive: int = 0, reverse: int = 0) -> Ref:
    """Running sum along an axis: local."""
    return _running(b, x, ints_of(axis, "axis")[0], bool(exclusive), bool(reverse), 0.0, b.add)


@lowers("CumProd", since=26)
def cum_prod(b: Builder, x: Ref, axis: Operand, /, *, exclusive: int = 0, reverse: int = 0) -> Ref:
    """Running product along an axis: ⌈log2 n⌉ rounds. Error: an ulp of every partial product."""

    def join(y: Ref, z: Ref) -> Ref:
        return fitting(b, [y, z])

    x = with_frac_bits(b, x, max(x.frac_bits, b.frac_bits))
    return _running(b, x, ints_of(axis, "axis")[0], bool(exclusive), bool(reverse), 1.0, join)


def _running(
    b: Builder,
    x: Ref,
    axis: int,
    exclusive: bool,
    reverse: bool,
    start: float,
    join: Callable[[Ref, Ref], Ref],
) -> Ref:
    axis = axis_of(axis, len(x.shape))
    n = x.shape[axis]
    x = b.gather(x, axis, range(n)[::-1]) if reverse else x
    if exclusive:
        before = [1 if a == axis else 0 for a in range(len(x.shape))]
        held = b.slice(x, axis, 0, n - 1)
        x = b.pad(held, before, [0] * len(x.shape), start)
    step = 1
    while step < n:
        joined = join(b.slice(x, axis, step, n), b.slice(x, axis, 0, n - step))
        head = with_frac_bits(b, b.slice(x, axis, 0, step), joined.frac_bits)
        x = b.concat([head, joined], axis)
        step *= 2
    return b.gather(x, axis, range(n)[::-1]) if reverse else x
