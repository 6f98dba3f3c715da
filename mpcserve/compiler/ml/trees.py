"""Classifiers by trees: a regressor with a target per class, and what is made of its scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mpcserve.compiler.ml.rewrite import ML, Writer, rewrites
from mpcserve.compiler.ml.scores import above, label_of, of_targets, transformed, winner
from mpcserve.compiler.problems import Unsupported

TRANSFORMS = ("NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO", "PROBIT")
"""In the order of their numbers in TreeEnsemble."""


@rewrites("TreeEnsembleRegressor")
def tree_ensemble_regressor(
    w: Writer, x: str, /, *, post_transform: str = "NONE", **attrs: Any
) -> str:
    """The post transform becomes an operator of its own."""
    y = w.op("TreeEnsembleRegressor", w.floats(x), domain=ML, **_single_precision(attrs))
    return of_targets(w, y, attrs.get("n_targets", 1), post_transform)


@rewrites("TreeEnsemble")
def tree_ensemble(w: Writer, x: str, /, *, post_transform: int = 0, **attrs: Any) -> str:
    """The post transform becomes an operator of its own."""
    double = attrs["leaf_weights"].dtype == np.float64
    y = w.op("TreeEnsemble", w.floats(x), domain=ML, **_single_precision(attrs))
    y = w.cast(y, np.float64) if double else y
    return of_targets(w, y, attrs.get("n_targets", 1), TRANSFORMS[post_transform])


def _single_precision(attrs: dict[str, Any]) -> dict[str, Any]:
    """Tables of doubles as float32: rows and thresholds are rounded alike."""
    return {
        k: v.astype(np.float32) if isinstance(v, np.ndarray) and v.dtype == np.float64 else v
        for k, v in attrs.items()
    }


@rewrites("TreeEnsembleClassifier")
def tree_ensemble_classifier(
    w: Writer,
    x: str,
    /,
    *,
    class_ids: Sequence[int],
    class_nodeids: Sequence[int],
    class_treeids: Sequence[int],
    class_weights: Sequence[float] = (),
    class_weights_as_tensor: Any = None,
    classlabels_int64s: Sequence[int] = (),
    classlabels_strings: Sequence[str] = (),
    base_values: Sequence[float] = (),
    base_values_as_tensor: Any = None,
    post_transform: str = "NONE",
    **structure: Any,
) -> tuple[str, ...]:
    """A score per class, of which the largest wins; with two classes, one score and a threshold."""
    weights = np.ravel(
        class_weights if class_weights_as_tensor is None else class_weights_as_tensor
    )
    base = np.ravel(base_values if base_values_as_tensor is None else base_values_as_tensor)
    count = len(classlabels_strings) or len(classlabels_int64s)
    used = sorted(set(class_ids))
    single = count == 2 and len(used) == 1
    y = w.op(
        "TreeEnsembleRegressor",
        w.floats(x),
        domain=ML,
        target_ids=[0] * len(class_ids) if single else list(class_ids),
        target_nodeids=list(class_nodeids),
        target_treeids=list(class_treeids),
        target_weights=weights.tolist(),
        n_targets=1 if single else count,
        **_single_precision(structure),
    )
    labels = (classlabels_int64s, classlabels_strings)
    if single:
        return _single(w, y, base, bool(np.all(weights >= 0)), used[0], post_transform, labels)
    if count == 2:
        return _pair(w, y, base, post_transform, classlabels_strings)
    if base.size:
        y = w.op("Add", y, w.constant(base))
    return label_of(w, winner(w, y), *labels), transformed(w, y, post_transform)


Labels = tuple[Sequence[int], Sequence[str]]


def _single(
    w: Writer, y: str, base: Any, positive: bool, column: int, transform: str, labels: Labels
) -> tuple[str, ...]:
    """Two classes, but scores of only one of them, as onnxruntime treats them."""
    if base.size > 1 or transform == "PROBIT":
        raise Unsupported(
            "has scores of one of two classes and a probit, or base values for both: onnxruntime's "
            "answer then depends on memory that it did not write"
        )
    if base.size and column == 0:
        y = w.op("Add", y, w.constant(base))
    label = label_of(w, above(w, y, 0.5 if positive else 0.0), *labels)
    if column == 1:
        zero = w.op("Sub", y, y)
        return label, transformed(w, w.op("Concat", zero, y, axis=1), transform)
    if transform == "LOGISTIC":
        y = w.op("Sigmoid", y)
    complement = positive or transform == "LOGISTIC"
    other = w.op("Sub", w.constant(1.0), y) if complement else w.op("Neg", y)
    return label, w.op("Concat", other, y, axis=1)


def _pair(w: Writer, y: str, base: Any, transform: str, names: Sequence[str]) -> tuple[str, ...]:
    """Scores of both classes: onnxruntime asks whether the second one is above zero."""
    if base.size == 1:
        y = w.op("Add", y, w.constant([base[0], 0.0]))
    elif base.size:
        score = w.op("Add", w.columns(y, 0, 1), w.constant(base[1]))
        y = w.op("Concat", w.op("Neg", score), score, axis=1)
    label = label_of(w, above(w, w.columns(y, 1, 2), 0.0), (0, 1), names)
    return label, transformed(w, y, transform)
