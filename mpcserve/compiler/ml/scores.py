"""What classifiers share: post transforms of scores, and labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpcserve.compiler.ml.rewrite import ML, Writer
from mpcserve.compiler.problems import Unsupported

ERF_INVERSE = 0.147
"""The constant of Winitzki's approximation, which onnxruntime uses."""


def transformed(w: Writer, scores: str, transform: str) -> str:
    """A post transform of a matrix of scores."""
    if transform == "NONE":
        return scores
    if transform == "LOGISTIC":
        return w.op("Sigmoid", scores)
    if transform == "SOFTMAX":
        return w.op("Softmax", scores, axis=1)
    if transform == "SOFTMAX_ZERO":
        return _softmax_zero(w, scores)
    if transform == "PROBIT":
        return probit(w, scores)
    raise Unsupported(f"post transform {transform!r} is unknown")


def of_targets(w: Writer, y: str, targets: int, transform: str) -> str:
    """A regressor's post transform: of a single target onnxruntime knows the probit alone."""
    return transformed(w, y, "NONE" if targets == 1 and transform != "PROBIT" else transform)


def _softmax_zero(w: Writer, scores: str) -> str:
    """A softmax over the scores that are not zero; those that are stay zero."""
    zero = w.constant(0.0)
    nonzero = w.cast(w.op("Not", w.op("Equal", scores, zero)), np.float32)
    shares = w.op("Mul", w.op("Softmax", scores, axis=1), nonzero)
    return w.op("Div", shares, w.reduce("ReduceSum", shares, 1))


def probit(w: Writer, p: str) -> str:
    """√2·erf⁻¹(2p − 1), by the approximation that onnxruntime uses.

    It ends in a root of what is nearly zero near p = ½, where rounding would be felt most: there a
    polynomial in (2p − 1)² that agrees to 1e-6 takes its place.
    """
    x = w.op("Sub", w.op("Mul", p, w.constant(2.0)), w.constant(1.0))
    u = w.op("Mul", x, x)
    log = w.op("Log", w.op("Sub", w.constant(1.0), u))
    v = w.op(
        "Add",
        w.op("Mul", log, w.constant(0.5)),
        w.constant(2.0 / (np.pi * ERF_INVERSE)),
    )
    square = w.op("Sub", w.op("Mul", v, v), w.op("Mul", log, w.constant(1.0 / ERF_INVERSE)))
    size = w.op("Sqrt", w.op("Sub", w.op("Sqrt", square), v))
    far = w.op("Mul", size, w.op("Sign", x))
    slope, *rest = _near_half()
    near = w.constant(slope)
    for c in rest:
        near = w.op("Add", w.op("Mul", near, u), w.constant(c))
    chosen = w.op("Where", w.op("Less", u, w.constant(NEAR_HALF)), w.op("Mul", near, x), far)
    return w.op("Mul", chosen, w.constant(np.sqrt(2.0)))


NEAR_HALF, DEGREE = 0.25, 4


def _near_half() -> list[float]:
    """erf⁻¹(x) / x as a polynomial in x² up to NEAR_HALF, highest power first."""
    u = np.linspace(1e-4, NEAR_HALF, 400)
    v = 2.0 / (np.pi * ERF_INVERSE) + 0.5 * np.log1p(-u)
    size = np.sqrt(np.sqrt(v * v - np.log1p(-u) / ERF_INVERSE) - v)
    return list(map(float, np.polyfit(u, size / np.sqrt(u), DEGREE)))


def label_of(w: Writer, index: str, ints: Sequence[int], strings: Sequence[str | bytes]) -> str:
    """The class of an index: itself where classes are 0, 1, …"""
    if strings:
        keys = list(range(len(strings)))
        return w.op("LabelEncoder", index, domain=ML, keys_int64s=keys, values_strings=strings)
    if list(ints) == list(range(len(ints))):
        return index
    keys = list(range(len(ints)))
    return w.op("LabelEncoder", index, domain=ML, keys_int64s=keys, values_int64s=list(ints))


def winner(w: Writer, scores: str) -> str:
    """Index of the largest score of each row; the first of equal ones."""
    return w.op("ArgMax", scores, axis=1, keepdims=0)


def above(w: Writer, score: str, threshold: float) -> str:
    """1 where the score of a single column is above the threshold, else 0; a vector."""
    rest = w.op("Sub", w.constant(2 * threshold), score)
    return winner(w, w.op("Concat", rest, score, axis=1))
