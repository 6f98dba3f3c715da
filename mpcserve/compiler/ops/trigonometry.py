"""Circular and hyperbolic functions: error at most 1e-3·max(1, |y|) (see `trigonometry`)."""

from __future__ import annotations

from mpcserve.compiler import trigonometry as of
from mpcserve.compiler.builder import Builder, Ref
from mpcserve.compiler.registry import lowers


@lowers("Tan", since=7)
def tan(b: Builder, x: Ref, /) -> Ref:
    """tan x: 1 round well inside ±π/2, else sine, cosine and a division of either sign."""
    return of.tangent(b, x)


@lowers("Asin", since=7)
def asin(b: Builder, x: Ref, /) -> Ref:
    """asin x for |x| ≤ 1. Error: 5e-4 next to ±1."""
    return of.arc_sine(b, x)


@lowers("Acos", since=7)
def acos(b: Builder, x: Ref, /) -> Ref:
    """acos x for |x| ≤ 1. Error: 5e-4 next to ±1."""
    return of.arc_cosine(b, x)


@lowers("Atan", since=7)
def atan(b: Builder, x: Ref, /) -> Ref:
    """atan x: 1 round on a moderate range, else a division."""
    return of.arc_tangent(b, x)


@lowers("Sinh", since=9)
def sinh(b: Builder, x: Ref, /) -> Ref:
    """sinh x for |x| ≤ 22: 1 round within ±4, else two exponentials."""
    return of.hyperbolic_sine(b, x)


@lowers("Cosh", since=9)
def cosh(b: Builder, x: Ref, /) -> Ref:
    """cosh x for |x| ≤ 22: 1 round within ±4, else two exponentials."""
    return of.hyperbolic_cosine(b, x)


@lowers("Asinh", since=9)
def asinh(b: Builder, x: Ref, /) -> Ref:
    """asinh x: 1 round on a moderate range, else a root and a logarithm."""
    return of.hyperbolic_arc_sine(b, x)


@lowers("Acosh", since=9)
def acosh(b: Builder, x: Ref, /) -> Ref:
    """acosh x for x ≥ 1: a root and a logarithm. Error: 5e-4 next to 1."""
    return of.hyperbolic_arc_cosine(b, x)


@lowers("Atanh", since=9)
def atanh(b: Builder, x: Ref, /) -> Ref:
    """atanh x for |x| < 1: two logarithms side by side."""
    return of.hyperbolic_arc_tangent(b, x)
