"""Add, Sub, Mul, Div, Neg, Sum, Abs, Max, Min and the piecewise linear activations."""

from __future__ import annotations

from functools import reduce

import numpy as np

from mpcserve.compiler import functions as f
from mpcserve.compiler.builder import Builder, Operand, Ref
from mpcserve.compiler.functions import aligned, secret, values_of
from mpcserve.compiler.problems import Unsupported
from mpcserve.compiler.registry import lowers


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
    """x / y by a constant y: one product with the secret 1 / y."""
    divisor = np.asarray(values_of(y, "divisor"), np.float64)
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


@lowers("Max", since=6)
def max_(b: Builder, *xs: Operand) -> Ref:
    """Elementwise maximum of any number of operands, broadcast."""
    return reduce(lambda x, y: f.maximum(b, x, y), xs[1:], secret(b, xs[0]))


@lowers("Min", since=6)
def min_(b: Builder, *xs: Operand) -> Ref:
    """Elementwise minimum of any number of operands, broadcast."""
    return reduce(lambda x, y: f.minimum(b, x, y), xs[1:], secret(b, xs[0]))


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


@lowers("LeakyRelu", since=6)
def leaky_relu(b: Builder, x: Ref, /, *, alpha: float = 0.01) -> Ref:
    """x or alpha·x with a public alpha: one comparison."""
    bent = f.relu(b, x)
    # alpha·x + (1 − alpha)·relu(x), as integers over one shift: exact for x ≥ 0.
    shift, factor = f.fraction(alpha, b.bound(x))
    scaled = b.add(b.scale(x, factor), b.scale(bent, (1 << shift) - factor))
    held = b.interval(x)
    ends = [e * np.where(e < 0, float(factor), 2.0**shift) for e in (held.low, held.high)]
    ends.append(np.clip(0.0, *ends) if factor >= 0 else np.zeros_like(ends[0]))
    b.within(scaled, np.minimum.reduce(ends), np.maximum.reduce(ends))
    return b.shift(scaled, shift, 0)


@lowers("PRelu", since=7)
def prelu(b: Builder, x: Ref, slope: Operand, /) -> Ref:
    """x or slope·x with a secret slope per channel or element: one comparison and one product."""
    positive = f.relu(b, x)
    negative = b.sub(x, positive)
    b.within(negative, np.minimum(b.interval(x).low, 0.0), np.minimum(b.interval(x).high, 0.0))
    bent = b.mul(negative, secret(b, slope))
    return b.add(*aligned(b, positive, bent))


@lowers("Identity", since=1)
def identity(b: Builder, x: Operand, /) -> Ref:
    """x."""
    return secret(b, x)
