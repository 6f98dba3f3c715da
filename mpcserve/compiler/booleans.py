"""Secret booleans: comparisons make bits, logic joins them, a bit chooses between values.

A boolean is a bit, or a number that is 0 or 1 as a data owner's boolean input is; the lowest bit of
that is free. Constants of the model that are boolean are public structure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import numpy as np

from mpcserve.compiler.builder import Array, Builder, Operand, Ref
from mpcserve.compiler.functions import aligned
from mpcserve.plan.ops import BIT_MOVES


def bit_of(b: Builder, x: Operand) -> Ref:
    """A boolean operand as a bit: local."""
    if isinstance(x, Ref):
        if b.is_bit(x):
            return x
        return b.flip(zero(b, x)) if x.frac_bits else b.odd(x)
    return b.odd(b.constant(np.asarray(x, bool)))


def number_of(b: Builder, x: Ref) -> Ref:
    """A bit as 0 or 1: one round; a number stays as it is."""
    return b.number(x) if b.is_bit(x) else x


def certain(b: Builder, value: bool, shape: Sequence[int]) -> Ref:
    """A bit that is known before any input is."""
    return b.expand(bit_of(b, np.full((1,) * len(shape), value)), shape)


def known_bit(b: Builder, bit: Ref) -> bool | None:
    """What a bit is that `certain` made, however it was moved since; None for a secret one."""
    step = b.step(bit)
    while step.op in BIT_MOVES and len(step.inputs) == 1:
        bit = b.ref(step.inputs[0])
        step = b.step(bit)
    if step.op != "odd" or b.step(b.ref(step.inputs[0])).op != "constant":
        return None
    held = b.interval(b.ref(step.inputs[0]))
    return bool(held.least) if held.least == held.most else None


def negative(b: Builder, x: Ref) -> Ref:
    """The bit [x < 0]; costs nothing where the range already says it."""
    held = b.interval(x)
    if held.least >= 0 or held.most < 0:
        return certain(b, held.most < 0, x.shape)
    return b.sign(x)


def less(b: Builder, x: Operand, y: Operand) -> Ref:
    """The bit [x < y], exact on the grid of both. Cost: a sign, 2 rounds or 3."""
    return _beside_infinity(b, x, y, np.less, lambda v, w: negative(b, difference(b, v, w)))


def equal(b: Builder, x: Operand, y: Operand) -> Ref:
    """The bit [x = y], exact on the grid of both. Cost: two signs side by side."""
    return _beside_infinity(b, x, y, np.equal, lambda v, w: zero(b, difference(b, v, w)))


def _beside_infinity(
    b: Builder,
    x: Operand,
    y: Operand,
    known: Callable[[Array, Array], Array],
    compare: Callable[[Operand, Operand], Ref],
) -> Ref:
    """A comparison; where a constant is infinite, its result is known: no secret is infinite."""
    ends = [np.zeros(v.shape) if isinstance(v, Ref) else np.asarray(v, np.float64) for v in (x, y)]
    infinite = np.isinf(ends[0]) | np.isinf(ends[1])
    if not infinite.any():
        return compare(x, y)
    said = known(*(np.where(np.isinf(e), e, 0.0) for e in ends))
    if infinite.all():
        return bit_of(b, said)
    finite = [v if isinstance(v, Ref) else np.where(np.isinf(v), 0.0, v) for v in (x, y)]
    return where(b, infinite, said, compare(*finite))


def difference(b: Builder, x: Operand, y: Operand) -> Ref:
    """x − y at one scale; nothing is subtracted where a constant is all zero."""
    if _zero(y):
        assert isinstance(x, Ref)
        return b.expand(x, np.broadcast_shapes(x.shape, np.shape(_array(y))))
    if _zero(x):
        assert isinstance(y, Ref)
        return b.scale(b.expand(y, np.broadcast_shapes(y.shape, np.shape(_array(x)))), -1)
    return b.sub(*aligned(b, x, y))


def zero(b: Builder, x: Ref) -> Ref:
    """The bit [x = 0], exact on the grid: [x < 0] ⊕ [x < ulp]. Cost: two signs side by side."""
    return b.xor([negative(b, x), negative(b, b.offset(x, -(2.0**-x.frac_bits)))])


def every(b: Builder, bits: Sequence[Ref], when: Sequence[int]) -> Ref:
    """The bit [each bit equals its `when`], with broadcasting. Cost: 1 round up to 8 bits."""
    shape = np.broadcast_shapes(*(x.shape for x in bits))
    return b.all([b.expand(x, shape) for x in bits], when)


def where(b: Builder, condition: Operand, x: Operand, y: Operand) -> Ref:
    """x where the condition holds, else y. Cost: 1 round; none where the condition is public."""
    if not isinstance(condition, Ref):
        return _mixed(b, np.asarray(condition, bool), x, y)
    bit = bit_of(b, condition)
    if (known := known_bit(b, bit)) is not None:
        return _mixed(b, np.full(bit.shape, known), x, y)
    if are_booleans(b, x, y):
        one, other = bit_of(b, x), bit_of(b, y)
        return b.xor([other, every(b, [bit, b.xor([one, other])], [1, 1])])
    one, other = aligned(b, x, y)
    shape = np.broadcast_shapes(bit.shape, one.shape, other.shape)
    gap = b.expand(b.sub(one, other), shape)
    chosen = b.add(other, b.select(b.expand(bit, shape), gap, when=1))
    held = b.interval(one), b.interval(other)
    low = np.minimum(held[0].low, held[1].low)
    return b.within(chosen, low, np.maximum(held[0].high, held[1].high))


def _mixed(b: Builder, condition: Array, x: Operand, y: Operand) -> Ref:
    """Elements of x and y at public places: local."""
    if are_booleans(b, x, y):
        one, other = bit_of(b, x), bit_of(b, y)
    else:
        one, other = aligned(b, x, y)
    shape = np.broadcast_shapes(condition.shape, one.shape, other.shape)
    size = prod(shape)
    flat = [b.reshape(b.expand(v, shape), (size,)) for v in (one, other)]
    places = np.arange(size) + np.where(np.broadcast_to(condition, shape).ravel(), 0, size)
    return b.reshape(b.gather(b.concat(flat, 0), 0, places), shape)


def _zero(x: Operand) -> bool:
    return not isinstance(x, Ref) and not np.any(x)


def _array(x: Operand) -> Array:
    assert not isinstance(x, Ref)
    return np.asarray(x)


def _boolean(x: Operand) -> bool:
    return not isinstance(x, Ref) and x.dtype == np.bool_


def are_booleans(b: Builder, *xs: Operand) -> bool:
    """Whether any operand says that all are."""
    return any(_boolean(x) or (isinstance(x, Ref) and b.is_bit(x)) for x in xs)
