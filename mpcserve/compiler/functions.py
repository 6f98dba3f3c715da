"""Functions that several operators share, as compositions of plan instructions.

Each is exact on integers unless its docstring states an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import frexp

import numpy as np

from mpcserve.compiler.builder import Array, Builder, Operand, Ref
from mpcserve.compiler.problems import TooWide, Unsupported
from mpcserve.compiler.values import WIDEST_BOUND

ROUNDING_ULPS = 0.25
"""How far an integer factor may bend a result, on top of the shift's own rounding."""


def secret(b: Builder, x: Operand, frac_bits: int | None = None) -> Ref:
    """A constant of the model becomes a secret weight; a secret value stays as it is."""
    return x if isinstance(x, Ref) else b.weight(x, frac_bits)


def values_of(x: Operand | None, what: str) -> Array:
    """The array of an input that must be constant. Raises: Unsupported naming `what`."""
    if x is None or isinstance(x, Ref):
        raise Unsupported(
            f"its input {what!r} is computed from a secret value, expected a constant",
            "export the model with this input fixed",
        )
    return x


def ints_of(x: Operand | None, what: str) -> list[int]:
    """As `values_of`, as a flat list of integers."""
    return [int(v) for v in np.asarray(values_of(x, what)).ravel()]


def axis_of(axis: int, rank: int) -> int:
    """A possibly negative axis as 0 … rank − 1."""
    return axis + rank if axis < 0 else axis


def with_frac_bits(b: Builder, x: Ref, frac_bits: int) -> Ref:
    """The same real numbers at another scale: exact when raised, Error: 1.5 ulp when lowered."""
    up = frac_bits - x.frac_bits
    return b.scale(x, 1 << up, up) if up >= 0 else b.shift(x, -up)


def aligned(b: Builder, *xs: Operand) -> list[Ref]:
    """All operands at one scale: the plan's, or the finest one where that is coarser and does.

    Whole numbers are exact at any scale, and take that of the others.
    """
    scales = {x.frac_bits for x in xs if isinstance(x, Ref)}
    whole = all(isinstance(x, np.ndarray) and x.dtype.kind in "iu" for x in xs)
    finest = max(scales, default=0 if whole else b.frac_bits)
    if not all(_on_grid(x, finest) for x in xs if not isinstance(x, Ref)):
        finest = max(finest, b.frac_bits)
        scales.add(finest)
    frac_bits = finest if len(scales - {0}) < 2 else min(finest, b.frac_bits)
    return [with_frac_bits(b, secret(b, x, frac_bits), frac_bits) for x in xs]


def fine_enough(b: Builder, x: Ref, *values: float) -> Ref:
    """x at a scale that holds the public `values`: whole numbers may have no fraction bits."""
    if x.frac_bits >= b.frac_bits or all(_on_grid(v, x.frac_bits) for v in values):
        return x
    return with_frac_bits(b, x, b.frac_bits)


def _on_grid(x: Array | float, frac_bits: int) -> bool:
    scaled = np.ldexp(np.asarray(x, np.float64), frac_bits)
    return bool(np.all(scaled == np.rint(scaled)))


def times(b: Builder, x: Ref, factor: float) -> Ref:
    """x · a public real number. Error: none for an integer, else 1.75 ulp where 64 bits suffice.

    Where x is too wide for that, the factor is rounded to what fits: an error relative to x.
    Cost: none, width only.
    """
    if float(factor).is_integer():
        return b.scale(x, int(factor))
    x = fine_enough(b, x, factor)
    shift, scaled = fraction(factor, b.bound(x))
    return b.shift(b.scale(x, scaled), shift, 0)


def fraction(factor: float, bound: int) -> tuple[int, int]:
    """(s, n): factor ≈ n / 2^s, to ROUNDING_ULPS for integers below 2^bound if 64 bits allow."""
    # |x · round(factor·2^s)| must stay below 2^62 before the shift.
    most = WIDEST_BOUND - 1 - bound - max(frexp(factor)[1], 0)
    if most < 1:
        raise TooWide(
            f"its input needs {bound} bits, too many to be multiplied by {factor:g}",
            "calibrate the model with samples, or lower --frac-bits",
        )
    for s in range(most):
        scaled = factor * 2.0**s
        if abs(scaled - round(scaled)) * 2.0 ** (bound - s) <= ROUNDING_ULPS:
            return s, round(scaled)
    return most, round(factor * 2.0**most)


def relu(b: Builder, x: Ref) -> Ref:
    """max(x, 0). Cost: sign and select, or `rectify`; none where the range tells the answer."""
    held = b.interval(x)
    if held.least >= 0:
        return x
    if held.most <= 0:
        return b.scale(x, 0)
    return b.select(b.sign(x), x, when=0, nonnegative=True)


def maximum(b: Builder, x: Operand, y: Operand) -> Ref:
    """max(x, y) = y + relu(x − y), with broadcasting."""
    x, y = aligned(b, x, y)
    highest = b.add(y, relu(b, b.sub(x, y)))
    xs, ys = b.interval(x), b.interval(y)
    return b.within(highest, np.maximum(xs.low, ys.low), np.maximum(xs.high, ys.high))


def minimum(b: Builder, x: Operand, y: Operand) -> Ref:
    """min(x, y) = x − relu(x − y), with broadcasting."""
    x, y = aligned(b, x, y)
    lowest = b.sub(x, relu(b, b.sub(x, y)))
    xs, ys = b.interval(x), b.interval(y)
    return b.within(lowest, np.minimum(xs.low, ys.low), np.minimum(xs.high, ys.high))


def clip(b: Builder, x: Ref, low: float | None, high: float | None) -> Ref:
    """min(max(x, low), high) for public ends.

    Cost: a comparison per end, side by side, and one select: 3 rounds.
    """
    held = b.interval(x)
    low = None if low is None or low <= held.least else low
    high = None if high is None or high >= held.most else high
    x = fine_enough(b, x, *(e for e in (low, high) if e is not None))
    low, high = (None if e is None else _rounded(e, x.frac_bits) for e in (low, high))
    if low is not None and high is not None and high < low:
        low = high  # ONNX: the upper end wins.
    if low is None and high is None:
        return x
    clipped = _clipped(b, x, low, high)
    ends = (-np.inf if low is None else low, np.inf if high is None else high)
    return b.within(clipped, np.clip(held.low, *ends), np.clip(held.high, *ends))


def _clipped(b: Builder, x: Ref, low: float | None, high: float | None) -> Ref:
    """As `clip`, with ends on the grid of x that its range goes beyond."""
    if low is None:
        assert high is not None
        return b.sub(x, relu(b, b.offset(x, -high)))
    over = b.offset(x, -low)
    if high is None:
        return b.offset(relu(b, over), low)
    above, beyond = b.flip(b.sign(over)), b.flip(b.sign(b.offset(x, -high)))
    most = b.expand(b.constant(np.full((1,) * len(x.shape), high - low), x.frac_bits), x.shape)
    within = b.xor([above, beyond])
    raised = b.choose([within, beyond], [over, most], nonnegative=True)
    return b.offset(b.within(raised, 0.0, high - low), low)


def absolute(b: Builder, x: Ref) -> Ref:
    """|x| = 2·relu(x) − x."""
    held = b.interval(x)
    if held.least >= 0:
        return x
    size = b.sub(b.scale(relu(b, x), 2), x)
    high = np.maximum(np.abs(held.low), np.abs(held.high))
    return b.within(size, np.zeros_like(high), high)


def reduce_max(b: Builder, x: Ref, axis: int) -> Ref:
    """Maximum along an axis, kept with length 1: a tournament of groups of the strategy's size.

    Of pairs: n − 1 comparisons, ⌈log2 n⌉ times three rounds.
    """
    while (n := x.shape[axis]) > 1:
        size = min(b.group, n)
        part = n // size
        best = maximum_of(b, [b.slice(x, axis, k * part, (k + 1) * part) for k in range(size)])
        rest = [b.slice(x, axis, size * part, n)] if n % size else []
        x = b.concat([best, *rest], axis)
    return x


def maximum_of(b: Builder, xs: Sequence[Ref]) -> Ref:
    """Maximum of a few values of one shape: every pair is compared at once.

    The first largest wins: it is not less than those behind it, and those before it are less.
    Cost: 4 rounds; 3 for two values.
    """
    if len(xs) == 2:
        return maximum(b, xs[0], xs[1])
    count, last = len(xs), xs[-1]
    less = {(i, j): b.sign(b.sub(xs[i], xs[j])) for i in range(count) for j in range(i + 1, count)}
    wins = []
    for i in range(count - 1):
        bits = [less[min(i, j), max(i, j)] for j in range(count) if j != i]
        wins.append(b.all(bits, [int(j < i) for j in range(count) if j != i]))
    gains = [b.sub(x, last) for x in xs[:-1]]
    highest = b.add(last, b.choose(wins, gains, nonnegative=True))
    held = [b.interval(x) for x in xs]
    low = np.maximum.reduce(np.broadcast_arrays(*(h.low for h in held)))
    return b.within(highest, low, np.maximum.reduce(np.broadcast_arrays(*(h.high for h in held))))


def add_all(b: Builder, xs: Sequence[Operand]) -> Ref:
    """Sum of any number of operands."""
    refs = aligned(b, *xs)
    return reduce(b.add, refs)


def _rounded(value: float, frac_bits: int) -> float:
    return float(np.ldexp(np.rint(np.ldexp(value, frac_bits)), -frac_bits))
