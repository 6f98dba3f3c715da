"""Comparisons, logic and choices: their results are secret bits.

Comparing is exact on the grid of fixed point: numbers that differ by less than half an ulp are
equal. Costs are per element of m bits: a sign is 2 rounds (1 for m ≤ 9, 3 for m > 36) and
2(J − 1) + 1 bits each way.
"""

from __future__ import annotations

from mpcserve.compiler import booleans as of
from mpcserve.compiler.builder import Builder, Operand, Ref
from mpcserve.compiler.registry import lowers


@lowers("Less", since=7)
def less(b: Builder, x: Operand, y: Operand, /) -> Ref:
    """x < y: a sign."""
    return of.less(b, x, y)


@lowers("Greater", since=7)
def greater(b: Builder, x: Operand, y: Operand, /) -> Ref:
    """x > y: a sign."""
    return of.less(b, y, x)


@lowers("LessOrEqual", since=12)
def less_or_equal(b: Builder, x: Operand, y: Operand, /) -> Ref:
    """x ≤ y: a sign."""
    return b.flip(of.less(b, y, x))


@lowers("GreaterOrEqual", since=12)
def greater_or_equal(b: Builder, x: Operand, y: Operand, /) -> Ref:
    """x ≥ y: a sign."""
    return b.flip(of.less(b, x, y))


@lowers("Equal", since=7)
def equal(b: Builder, x: Operand, y: Operand, /) -> Ref:
    """x = y on the grid: two signs side by side; of booleans local."""
    if of.are_booleans(b, x, y):
        return b.xor([of.bit_of(b, x), of.bit_of(b, y)], 1)
    return of.equal(b, x, y)


@lowers("And", since=7)
def and_(b: Builder, x: Operand, y: Operand, /) -> Ref:
    """x ∧ y: 1 round, 1 bit."""
    return of.every(b, [of.bit_of(b, x), of.bit_of(b, y)], [1, 1])


@lowers("Or", since=7)
def or_(b: Builder, x: Operand, y: Operand, /) -> Ref:
    """x ∨ y: 1 round, 1 bit."""
    return b.flip(of.every(b, [of.bit_of(b, x), of.bit_of(b, y)], [0, 0]))


@lowers("Xor", since=7)
def xor(b: Builder, x: Operand, y: Operand, /) -> Ref:
    """x ≠ y of booleans: local."""
    return b.xor([of.bit_of(b, x), of.bit_of(b, y)])


@lowers("Not", since=1)
def not_(b: Builder, x: Ref, /) -> Ref:
    """¬x: local."""
    return b.flip(of.bit_of(b, x))


@lowers("Where", since=9)
def where(b: Builder, condition: Operand, x: Operand, y: Operand, /) -> Ref:
    """x where the condition holds, else y: 1 round; local where the condition is constant."""
    return of.where(b, condition, x, y)


@lowers("IsNaN", since=9)
def is_nan(b: Builder, x: Ref, /) -> Ref:
    """False: fixed point holds no NaN."""
    return of.certain(b, False, x.shape)


@lowers("IsInf", since=10)
def is_inf(b: Builder, x: Ref, /, *, detect_negative: int = 1, detect_positive: int = 1) -> Ref:
    """False: fixed point holds no infinity."""
    return of.certain(b, False, x.shape)
