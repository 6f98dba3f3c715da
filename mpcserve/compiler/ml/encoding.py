"""Preparation of features: normalising, binarising, encoding, choosing, joining."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpcserve.compiler.ml.rewrite import Writer, rewrites

_DISTRIBUTIONS = ("LinearClassifier", "TreeEnsembleClassifier")


@rewrites("Normalizer")
def normalizer(w: Writer, x: str, /, *, norm: str = "MAX") -> str | None:
    """Rows divided by their norm; scores that a softmax made have the norm 1 already."""
    maker = w.maker(x)
    if norm == "L1" and maker is not None and maker.op_type in _DISTRIBUTIONS:
        transforms = [a.s for a in maker.attribute if a.name == "post_transform"]
        if transforms == [b"SOFTMAX"]:
            return x
    x = w.floats(x)
    if norm == "MAX":
        return w.op("Div", x, w.reduce("ReduceMax", x, 1))
    if norm == "L1":
        return w.op("LpNormalization", x, axis=1, p=1)
    return w.op("LpNormalization", x, axis=1, p=2) if norm == "L2" else None


@rewrites("Binarizer")
def binarizer(w: Writer, x: str, /, *, threshold: float = 0.0) -> str:
    """1 where x is above the threshold, else 0."""
    x = w.op("Unsqueeze", w.floats(x), w.constant([0], np.int64))
    level = w.op("Expand", w.constant(threshold), w.op("Shape", x))
    larger = w.op("ArgMax", w.op("Concat", level, x, axis=0), axis=0, keepdims=0)
    return w.cast(larger, np.float32)


@rewrites("FeatureVectorizer")
def feature_vectorizer(w: Writer, *xs: str, inputdimensions: Sequence[int] = ()) -> str:
    """All inputs side by side."""
    return w.op("Concat", *(w.floats(x) for x in xs), axis=1)


@rewrites("ArrayFeatureExtractor")
def array_feature_extractor(w: Writer, x: str, indices: str, /) -> str | None:
    """Columns at constant indices."""
    if indices in w.constants:
        return w.op("Gather", x, w.reshape(indices, [-1]), axis=-1)
    return None
