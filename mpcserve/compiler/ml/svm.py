"""Support vector machines: kernels, decisions between pairs of classes, Platt's probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from mpcserve.compiler.ml.rewrite import Writer, rewrites
from mpcserve.compiler.ml.scores import above, label_of, transformed, winner
from mpcserve.compiler.problems import Unsupported

Labels = tuple[Sequence[int], Sequence[str]]


@rewrites("SVMRegressor")
def svm_regressor(
    w: Writer,
    x: str,
    /,
    *,
    coefficients: Sequence[float],
    kernel_params: Sequence[float] = (),
    kernel_type: str = "LINEAR",
    n_supports: int = 0,
    one_class: int = 0,
    post_transform: str = "NONE",
    rho: Sequence[float] = (),
    support_vectors: Sequence[float] = (),
) -> str:
    """Σ coefficient · kernel(x, support vector) + rho; for one class, its sign.

    onnxruntime ignores the post transform.
    """
    if n_supports:
        vectors = np.reshape(support_vectors, (n_supports, -1))
        x = kernel(w, w.floats(x), vectors, kernel_type, kernel_params)
    else:
        x = w.floats(x)
    y = w.op("Gemm", x, w.constant(np.reshape(coefficients, (-1, 1))), w.constant(rho[:1]))
    if one_class:
        index = w.cast(w.reshape(above(w, y, 0.0), (-1, 1)), np.float32)
        return w.op("Sub", w.op("Mul", index, w.constant(2.0)), w.constant(1.0))
    return y


@rewrites("SVMClassifier")
def svm_classifier(
    w: Writer,
    x: str,
    /,
    *,
    classlabels_ints: Sequence[int] = (),
    classlabels_strings: Sequence[str] = (),
    coefficients: Sequence[float],
    kernel_params: Sequence[float] = (),
    kernel_type: str = "LINEAR",
    post_transform: str = "NONE",
    prob_a: Sequence[float] = (),
    prob_b: Sequence[float] = (),
    rho: Sequence[float] = (),
    support_vectors: Sequence[float] = (),
    vectors_per_class: Sequence[int] = (),
) -> tuple[str, ...]:
    """One decision per pair of classes; the class that wins most of them, the first of equals."""
    labels = (classlabels_ints, classlabels_strings)
    count = len(classlabels_strings) or len(classlabels_ints)
    x = w.floats(x)
    if not vectors_per_class:
        return _linear(w, x, np.reshape(coefficients, (count, -1)), rho, post_transform, labels)
    vectors = np.reshape(support_vectors, (sum(vectors_per_class), -1))
    similar = kernel(w, x, vectors, kernel_type, kernel_params)
    weights = pair_weights(np.reshape(coefficients, (count - 1, -1)), vectors_per_class)
    decisions = w.op("Gemm", similar, w.constant(weights), w.constant(rho))
    votes = label_of(w, winner(w, _votes(w, decisions, count)), *labels)
    if prob_a:
        return votes, platt(w, decisions, count, prob_a, prob_b)
    if count == 2:
        if post_transform not in ("NONE", "LOGISTIC"):
            raise Unsupported(
                f"has the post transform {post_transform} of two classes, which onnxruntime "
                "computes from something else than its scores",
                "export it with NONE or LOGISTIC",
            )
        decisions = w.op("Concat", w.op("Neg", decisions), decisions, axis=1)
    return votes, transformed(w, decisions, post_transform)


def _linear(
    w: Writer, x: str, coefficients: Any, rho: Sequence[float], transform: str, labels: Labels
) -> tuple[str, ...]:
    """One decision per class. Of two classes the second wins where any of them is positive."""
    scores = w.op("Gemm", x, w.constant(coefficients.T), w.constant(rho[:1]))
    if len(coefficients) != 2:
        return label_of(w, winner(w, scores), *labels), transformed(w, scores, transform)
    first, second = w.columns(scores, 0, 1), w.columns(scores, 1, 2)
    least = 0.5 if np.all(coefficients >= 0) else 0.0
    leads = w.op("Max", w.op("Sub", second, first), w.op("Sub", first, w.constant(least)))
    return label_of(w, above(w, leads, 0.0), *labels), transformed(w, scores, transform)


def kernel(w: Writer, x: str, vectors: Any, kind: str, params: Sequence[float]) -> str:
    """kernel(x, v) for each support vector v; `params`: gamma, coef0, degree."""
    gamma, offset, degree = (*params, *(0.0, 0.0, 3.0)[len(params) :])
    if kind == "LINEAR":
        return w.op("MatMul", x, w.constant(vectors.T))
    if kind == "RBF":
        return w.op("Exp", w.op("Neg", squared_distance(w, x, vectors, gamma)))
    inner = w.op("MatMul", x, w.constant(gamma * vectors.T))
    shifted = w.op("Add", inner, w.constant(offset)) if offset else inner
    return w.op("Tanh", shifted) if kind == "SIGMOID" else w.op("Pow", shifted, w.constant(degree))


FEW_SQUARES = 2048
"""Up to so many, squares cost less than a comparison for each support vector, and three rounds."""


def squared_distance(w: Writer, x: str, vectors: Any, gamma: float) -> str:
    """gamma · |x − v|², known not to be negative: a sum of squares, or of products and compared."""
    scaled = w.op("Mul", x, w.constant(np.full(vectors.shape[1], np.sqrt(gamma))))
    if vectors.size > FEW_SQUARES:
        own = w.reduce("ReduceSum", w.op("Mul", scaled, scaled), 1)
        offsets = w.constant(gamma * np.square(vectors).sum(axis=1))
        inner = w.op("Gemm", scaled, w.constant(-2 * np.sqrt(gamma) * vectors.T), offsets)
        return w.op("Relu", w.op("Add", inner, own))
    rows = w.op("Unsqueeze", scaled, w.constant([1], np.int64))
    gaps = w.op("Sub", rows, w.constant(np.sqrt(gamma) * vectors))
    total = w.reduce("ReduceSum", w.op("Mul", gaps, gaps), 2)
    return w.op("Squeeze", total, w.constant([2], np.int64))


def pair_weights(coefficients: Any, per_class: Sequence[int]) -> Any:
    """Support vectors × pairs of classes: libsvm keeps C − 1 coefficients of each vector."""
    stops = np.cumsum(per_class)
    spans = [slice(stop - n, stop) for stop, n in zip(stops, per_class, strict=True)]
    columns = []
    for i, j in combinations(range(len(per_class)), 2):
        column = np.zeros(coefficients.shape[1])
        column[spans[i]] = coefficients[j - 1, spans[i]]
        column[spans[j]] = coefficients[i, spans[j]]
        columns.append(column)
    return np.stack(columns, axis=1)


def _votes(w: Writer, decisions: str, count: int) -> str:
    """How many pairs each class wins: the first of a pair where its decision is positive."""
    pairs = list(combinations(range(count), 2))
    gain, start = np.zeros((len(pairs), count)), np.zeros(count)
    for k, (i, j) in enumerate(pairs):
        gain[k, i], gain[k, j] = 1.0, -1.0
        start[j] += 1.0
    flat = w.reshape(decisions, (-1, 1))
    won = w.cast(w.reshape(above(w, flat, 0.0), (-1, len(pairs))), np.float32)
    return w.op("Gemm", won, w.constant(gain), w.constant(start))


def platt(w: Writer, decisions: str, count: int, a: Sequence[float], b: Sequence[float]) -> str:
    """Probabilities of two or three classes that fit those of all pairs, 1 − σ(a·decision + b).

    For more classes they are the solution of a linear system, which is not computed here.
    """
    scaled = w.op("Mul", decisions, w.constant(a))
    second = w.op("Sigmoid", w.op("Add", scaled, w.constant(b)))
    first = w.op("Sub", w.constant(1.0), second)
    if count == 2:
        return w.op("Concat", first, second, axis=1)
    if count > 3:
        raise Unsupported(
            f"has probabilities of {count} classes, computed for up to 3",
            "train it with probability=False: classes and decisions come out",
        )
    return _coupled(w, first, second)


PAIRS = ((0, 1), (0, 2), (1, 2))


def _coupled(w: Writer, first: str, second: str) -> str:
    """Of three classes: p that minimises Σ (r_ji·p_i − r_ij·p_j)², whose sum is 1.

    With Q its matrix, p is proportional to adj(Q)·(1, 1, 1), also where Q has no inverse.
    Source: Wu, Lin, Weng, Probability estimates for multi-class classification, 2004.
    """
    r = {}
    for k, (i, j) in enumerate(PAIRS):
        r[i, j], r[j, i] = w.columns(first, k, k + 1), w.columns(second, k, k + 1)
    q = {(i, j): w.op("Mul", r[i, j], r[j, i]) for i, j in PAIRS}  # −Q off the diagonal
    q |= {(j, i): q[i, j] for i, j in PAIRS}
    for t in range(3):
        u, v = (s for s in range(3) if s != t)
        squares = (w.op("Mul", r[s, t], r[s, t]) for s in (u, v))
        q[t, t] = w.op("Add", *squares)
    adjugate = {}
    for i, j in PAIRS:
        k = 3 - i - j
        crossing = w.op("Mul", q[i, k], q[j, k])
        adjugate[i, j] = w.op("Add", crossing, w.op("Mul", q[i, j], q[k, k]))
        square = w.op("Mul", q[i, j], q[i, j])
        adjugate[k, k] = w.op("Sub", w.op("Mul", q[i, i], q[j, j]), square)
    rows = []
    for i in range(3):
        terms = [adjugate[min(i, j), max(i, j)] for j in range(3)]
        rows.append(w.op("Sum", *terms))
    weights = w.op("Concat", *rows, axis=1)
    return w.op("Div", weights, w.reduce("ReduceSum", weights, 1))
