"""Smooth functions of each element: one round inside their range, two or three with saturation."""

from __future__ import annotations

from math import inf
from math import log as log_of

import numpy as np

from mpcserve.compiler import roots, smooth
from mpcserve.compiler.builder import Builder, Operand, Ref
from mpcserve.compiler.functions import absolute, clip, times, with_frac_bits
from mpcserve.compiler.problems import Unsupported
from mpcserve.compiler.registry import lowers, lowers_fused


@lowers("Sigmoid", since=6)
def sigmoid(b: Builder, x: Ref, /) -> Ref:
    """1 / (1 + e^−x). Error: 5e-5; 2e-4 of many elements."""
    return smooth.sigmoid(b, x)


@lowers("Tanh", since=6)
def tanh(b: Builder, x: Ref, /) -> Ref:
    """tanh x. Error: 5e-5; 2e-4 of many elements."""
    return smooth.tanh(b, x)


@lowers("Erf", since=9)
def erf(b: Builder, x: Ref, /) -> Ref:
    """The error function. Error: 5e-5; 2e-4 of many elements."""
    return smooth.erf(b, x)


@lowers("Gelu", since=20)
def gelu(b: Builder, x: Ref, /, *, approximate: str = "none") -> Ref:
    """x·Φ(x), exact or by tanh. Error: 7e-5; 2e-4 of many elements."""
    return smooth.gelu(b, x, approximate == "tanh")


@lowers_fused("Swish")
def swish(b: Builder, x: Ref, /, *, alpha: float = 1.0) -> Ref:
    """x·sigmoid(alpha·x). Error: 7e-5; 2e-4 of many elements."""
    return smooth.swish(b, x, alpha)


@lowers("Mish", since=18)
def mish(b: Builder, x: Ref, /) -> Ref:
    """x·tanh(softplus(x)). Error: 7e-5; 2e-4 of many elements."""
    return smooth.mish(b, x)


@lowers("Softplus", since=1)
def softplus(b: Builder, x: Ref, /) -> Ref:
    """log(1 + e^x). Error: 7e-5; 2e-4 of many elements."""
    return smooth.softplus(b, x)


@lowers_fused("LogSigmoid")
def log_sigmoid(b: Builder, x: Ref, /) -> Ref:
    """−log(1 + e^−x). Error: 7e-5, 2e-4 of many elements, however near zero the sigmoid is."""
    return b.scale(smooth.softplus(b, b.scale(x, -1)), -1)


@lowers("Elu", since=6)
def elu(b: Builder, x: Ref, /, *, alpha: float = 1.0) -> Ref:
    """x above zero, alpha·(e^x − 1) below. Error: 5e-5."""
    return smooth.elu(b, x, alpha)


@lowers("Selu", since=6)
def selu(
    b: Builder, x: Ref, /, *, alpha: float = 1.6732631921768188, gamma: float = 1.0507010221481323
) -> Ref:
    """gamma·ELU. Error: 5e-5."""
    return smooth.elu(b, x, alpha, gain=gamma)


@lowers("Celu", since=12)
def celu(b: Builder, x: Ref, /, *, alpha: float = 1.0) -> Ref:
    """x above zero, alpha·(e^(x / alpha) − 1) below. Error: 5e-5."""
    return smooth.elu(b, x, alpha, scale=alpha)


@lowers("HardSigmoid", since=6)
def hard_sigmoid(b: Builder, x: Ref, /, *, alpha: float = 0.2, beta: float = 0.5) -> Ref:
    """max(0, min(1, alpha·x + beta)): two comparisons. Error: 1.75 ulp."""
    x = with_frac_bits(b, x, b.frac_bits)
    return clip(b, b.offset(times(b, x, alpha), beta), 0.0, 1.0)


@lowers("HardSwish", since=14)
def hard_swish(b: Builder, x: Ref, /) -> Ref:
    """x·HardSigmoid(x) with slope ⅙: two comparisons and a product."""
    return b.mul(x, hard_sigmoid(b, x, alpha=1.0 / 6.0, beta=0.5))


@lowers("Softsign", since=1)
def softsign(b: Builder, x: Ref, /) -> Ref:
    """x / (1 + |x|): a comparison and a division."""
    x = with_frac_bits(b, x, b.frac_bits)
    return roots.divide(b, x, b.offset(absolute(b, x), 1.0), ratio=1.0)


@lowers("Exp", since=6)
def exp(b: Builder, x: Ref, /) -> Ref:
    """e^x: 0 far below; the top of its range must be known, or samples show that of e^x."""
    wide = b.interval(x).most > smooth.LARGEST_TOP and b.known(x) == "calibrated"
    # A bit of margin makes 24 of a value up to 12, but only 2·e^12 of its exponential.
    return smooth.exp(b, x, most=log_of(b.seen.high) if wide and b.seen else inf)


@lowers("Sin", since=7)
def sin(b: Builder, x: Ref, /) -> Ref:
    """sin x for every x: one round. Error: 3e-5."""
    return smooth.sine(b, x)


@lowers("Cos", since=7)
def cos(b: Builder, x: Ref, /) -> Ref:
    """cos x for every x: one round. Error: 3e-5."""
    return smooth.sine(b, x, cosine=True)


@lowers("Log", since=6)
def log(b: Builder, x: Ref, /) -> Ref:
    """log x for x > 0. Error: 5e-5."""
    return roots.logarithm(b, x)


@lowers("Sqrt", since=6)
def sqrt(b: Builder, x: Ref, /) -> Ref:
    """√x for x ≥ 0. Error: 2e-5 relative and 2 ulp."""
    return roots.root(b, x)


@lowers("Reciprocal", since=6)
def reciprocal(b: Builder, x: Ref, /) -> Ref:
    """1 / x for x of one sign. Error: 5e-5 relative and 1 ulp."""
    return roots.reciprocal(b, x)


@lowers("Pow", since=7)
def pow_(b: Builder, x: Operand, y: Operand, /) -> Ref:
    """x^y: products for a constant whole y, roots for ±½, else e^(y·log x) for x > 0."""
    if isinstance(y, Ref):
        if isinstance(x, Ref):
            return roots.secret_power(b, x, y)
        base = np.asarray(x, np.float64)
        if not np.all(base > 0):
            raise Unsupported("raises a base that is not positive to a secret power")
        return smooth.exp(b, b.mul(y, b.weight(np.log(base))))
    assert isinstance(x, Ref)
    exponents = np.asarray(y, np.float64)
    if exponents.size == 1:
        shape = np.broadcast_shapes(x.shape, exponents.shape)
        return b.reshape(roots.power(b, x, float(exponents.ravel()[0])), shape)
    return _powers(b, x, exponents)


def _powers(b: Builder, x: Ref, exponents: np.ndarray) -> Ref:
    """An exponent for each element: elements of one exponent together."""
    shape = np.broadcast_shapes(x.shape, exponents.shape)
    each = np.broadcast_to(exponents, shape).ravel()
    flat = b.reshape(b.expand(x, shape), (each.size,))
    parts, order = [], []
    for exponent in np.unique(each):
        where = np.flatnonzero(each == exponent)
        part = roots.power(b, b.gather(flat, 0, where.tolist()), float(exponent))
        parts.append(with_frac_bits(b, part, b.frac_bits))
        order.append(where)
    back = np.argsort(np.concatenate(order))
    return b.reshape(b.gather(b.concat(parts, 0), 0, back.tolist()), shape)
