"""Linear models, scalings and what else is one matrix or one affine map."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpcserve.compiler.ml.rewrite import Writer, rewrites
from mpcserve.compiler.ml.scores import above, label_of, of_targets, probit, transformed, winner
from mpcserve.compiler.problems import Unsupported


@rewrites("Scaler")
def scaler(
    w: Writer, x: str, /, *, offset: Sequence[float] = (), scale: Sequence[float] = ()
) -> str:
    """(x − offset) · scale: both are secrets of the model."""
    shifted = w.op("Sub", w.floats(x), w.constant(offset)) if any(offset) else w.floats(x)
    return w.op("Mul", shifted, w.constant(scale))


@rewrites("LinearRegressor")
def linear_regressor(
    w: Writer,
    x: str,
    /,
    *,
    coefficients: Sequence[float],
    intercepts: Sequence[float] = (),
    post_transform: str = "NONE",
    targets: int = 1,
) -> str:
    """x @ coefficients + intercepts."""
    y = _scores(w, x, coefficients, intercepts, targets)
    return of_targets(w, y, targets, post_transform)


@rewrites("LinearClassifier")
def linear_classifier(
    w: Writer,
    x: str,
    /,
    *,
    coefficients: Sequence[float],
    intercepts: Sequence[float] = (),
    classlabels_ints: Sequence[int] = (),
    classlabels_strings: Sequence[str] = (),
    multi_class: int = 0,
    post_transform: str = "NONE",
) -> tuple[str, ...]:
    """Scores of all classes and the label of the largest."""
    count = len(classlabels_strings) or len(classlabels_ints)
    targets = len(intercepts) or count
    scores = _scores(w, x, coefficients, intercepts, targets)
    index = above(w, scores, 0.0) if targets == 1 else winner(w, scores)
    label = label_of(w, index, classlabels_ints if count == 2 else (), classlabels_strings)
    if targets > 1:
        label = label_of(w, index, classlabels_ints, classlabels_strings)
        return label, transformed(w, scores, post_transform)
    return label, _of_single(w, scores, post_transform, second=count == 2)


def _of_single(w: Writer, score: str, transform: str, second: bool) -> str:
    """What onnxruntime makes of a single score; it has no right answer for a second probit."""
    if transform == "PROBIT":
        if second:
            raise Unsupported(
                "makes a probit of a second class, which onnxruntime leaves undefined"
            )
        return probit(w, score)
    if transform == "LOGISTIC":
        score = w.op("Sigmoid", score)
    if not second:
        return score
    return w.op("Concat", w.op("Sub", w.constant(1.0), score), score, axis=1)


def _scores(
    w: Writer, x: str, coefficients: Sequence[float], intercepts: Sequence[float], targets: int
) -> str:
    matrix = w.constant(np.reshape(coefficients, (targets, -1)).T)
    bias = (w.constant(intercepts),) if len(intercepts) else ()
    return w.op("Gemm", w.floats(x), matrix, *bias)
