"""Arithmetic, extrema and the piecewise linear activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mpcserve.compiler import functions as f
from mpcserve.compiler.booleans import negative
from mpcserve.compiler.builder import Builder, Operand, Ref
from mpcserve.compiler.functions import aligned, secret, times, values_of
from mpcserve.compiler.problems import Unsupported
from mpcserve.compiler.registry import lowers, lowers_fused
from mpcserve.compiler.roots import divide


@lowers("Add", since=7)
def add(b: Builder, x: Operand, y: Operand, /) -> Ref:
    """x + y, local."""
    return b.add(*aligned(b, x, y))


@lowers("Sub", since=7)
def sub(b: Builder, x: Operand, y: Operand, /) -> Ref:
    """x − y, local."""
    return b.sub(*aligned(b, x, y))


@lowers("Mul", since=7)
def mul(b: Builder, x: Operand, y: Operand, /) -> Ref:
    """x · y, one product; a constant operand is a secret weight."""
    return b.mul(secret(b, x), secret(b, y))


@lowers("Div", since=7)
def div(b: Builder, x: Operand, y: Operand, /) -> Ref:
    """x / y: one product with the secret 1 / y of a constant; of a secret y, 2 to 9 rounds."""
    if isinstance(y, Ref):
        return divide(b, secret(b, x), y)
    divisor = np.asarray(y, np.float64)
    if not np.all(divisor):
        raise Unsupported("divides by a constant that holds zero")
    return b.mul(secret(b, x), b.weight(1.0 / divisor))


@lowers("Neg", since=6)
def neg(b: Builder, x: Ref, /) -> Ref:
    """−x, local."""
    return b.scale(x, -1)


@lowers("Sum", since=6)
def sum_(b: Builder, *xs: Operand) -> Ref:
    """Sum of any number of operands, local."""
    return f.add_all(b, xs)


@lowers("Mean", since=6)
def mean(b: Builder, *xs: Operand) -> Ref:
    """Mean of any number of operands, local. Error: 1.75 ulp."""
    return times(b, f.add_all(b, xs), 1.0 / len(xs))


@lowers("Max", since=6)
def max_(b: Builder, *xs: Operand) -> Ref:
    """Elementwise maximum of any number of operands, by pairs: 3 rounds a level."""
    return _by_pairs(b, xs, f.maximum)


@lowers("Min", since=6)
def min_(b: Builder, *xs: Operand) -> Ref:
    """Elementwise minimum of any number of operands, by pairs: 3 rounds a level."""
    return _by_pairs(b, xs, f.minimum)


def _by_pairs(b: Builder, xs: Sequence[Operand], join: Callable[..., Ref]) -> Ref:
    left = [*xs]
    while len(left) > 1:
        joined: list[Operand] = [join(b, *left[k : k + 2]) for k in range(0, len(left) - 1, 2)]
        left = joined + left[len(left) // 2 * 2 :]
    return secret(b, left[0])


@lowers("Sign", since=9)
def sign(b: Builder, x: Ref, /) -> Ref:
    """−1, 0 or 1: two comparisons side by side, 3 rounds."""
    bits = [negative(b, b.scale(x, -1)), negative(b, x)]
    return b.weighted(bits, [1.0, -1.0], 0)


@lowers("ThresholdedRelu", since=10)
def thresholded_relu(b: Builder, x: Ref, /, *, alpha: float = 1.0) -> Ref:
    """x where x > alpha, else 0: one comparison."""
    x = f.fine_enough(b, x, alpha)
    held = b.interval(x)
    y = b.pick([negative(b, b.offset(b.scale(x, -1), alpha))], [x])
    return b.within(y, np.minimum(held.low.clip(alpha), 0.0), np.maximum(held.high, 0.0))


@lowers("Shrink", since=9)
def shrink(b: Builder, x: Ref, /, *, bias: float = 0.0, lambd: float = 0.5) -> Ref:
    """x + bias below −lambd, x − bias above lambd, else 0: two comparisons side by side."""
    x = f.fine_enough(b, x, bias, lambd)
    below, above = negative(b, b.offset(x, lambd)), negative(b, b.offset(b.scale(x, -1), lambd))
    return b.pick([below, above], [b.offset(x, bias), b.offset(x, -bias)])


@lowers("Abs", since=6)
def abs_(b: Builder, x: Ref, /) -> Ref:
    """|x|: one comparison."""
    return f.absolute(b, x)


@lowers("Relu", since=6)
def relu(b: Builder, x: Ref, /) -> Ref:
    """max(x, 0): one comparison."""
    return f.relu(b, x)


@lowers("Clip", since=6)
def clip_attributes(
    b: Builder,
    x: Ref,
    /,
    *,
    max: float = float(np.finfo(np.float32).max),
    min: float = float(np.finfo(np.float32).min),
) -> Ref:
    """x between two public ends: a comparison per end, side by side."""
    return f.clip(b, x, min, max)


@lowers("Clip", since=11)
def clip(b: Builder, x: Ref, low: Operand | None = None, high: Operand | None = None, /) -> Ref:
    """x between two public ends: a comparison per end, side by side."""
    ends = [
        None if e is None else float(np.asarray(values_of(e, name)).ravel()[0])
        for e, name in ((low, "min"), (high, "max"))
    ]
    return f.clip(b, x, *ends)


@lowers_fused("Clip")
def clip_run(b: Builder, x: Ref, /, *, low: float, high: float) -> Ref:
    """x between what several nodes, one after the other, limit it to."""
    return f.clip(b, x, None if np.isinf(low) else low, None if np.isinf(high) else high)


@lowers("LeakyRelu", since=6)
def leaky_relu(b: Builder, x: Ref, /, *, alpha: float = 0.01) -> Ref:
    """x or alpha·x with a public alpha: one comparison. Error: 1.75 ulp."""
    if alpha == 0:
        return f.relu(b, x)
    x = f.fine_enough(b, x, alpha)
    # x + (alpha − 1)·min(x, 0): only the negative part must be wide enough for the fraction.
    bent = b.add(x, times(b, _negative(b, x), alpha - 1))
    held, ulp = b.interval(x), 2.0**-x.frac_bits
    ends = [e * np.where(e < 0, alpha, 1.0) for e in (held.low, held.high)]
    ends.append(np.clip(0.0, held.low, held.high) if alpha < 0 else ends[0])
    return b.within(bent, np.minimum.reduce(ends) - 2 * ulp, np.maximum.reduce(ends) + 2 * ulp)


@lowers("PRelu", since=7)
def prelu(b: Builder, x: Ref, slope: Operand, /) -> Ref:
    """x or slope·x with a secret slope per channel or element: one comparison and one product."""
    if len(slope.shape) == 1 and len(x.shape) > 1 and slope.shape[0] not in (1, x.shape[-1]):
        shape = (-1, *[1] * (len(x.shape) - 2))  # as opset 6 meant it: one per channel
        slope = (
            b.reshape(slope, (slope.shape[0], *shape[1:]))
            if isinstance(slope, Ref)
            else (slope.reshape(shape))
        )
    steeper = b.offset(slope, -1) if isinstance(slope, Ref) else b.weight(slope - 1.0)
    return b.add(*aligned(b, x, b.mul(_negative(b, x), steeper)))


def _negative(b: Builder, x: Ref) -> Ref:
    """min(x, 0)."""
    held = b.interval(x)
    if held.least >= 0:
        return b.scale(x, 0)
    part = b.select(b.sign(x), x, when=1)
    return b.within(part, np.minimum(held.low, 0.0), np.minimum(held.high, 0.0))


@lowers("Identity", since=1)
def identity(b: Builder, x: Operand, /) -> Ref:
    """x."""
    return secret(b, x)
