"""Preparation of features: normalising, binarising, encoding, choosing, joining."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from mpcserve.compiler.ml.rewrite import Writer, rewrites
from mpcserve.compiler.problems import Unsupported

ENCODE_FIRST = "encode it as numbers before the model is exported"

_DISTRIBUTIONS = ("LinearClassifier", "TreeEnsembleClassifier")


@rewrites("Normalizer")
def normalizer(w: Writer, x: str, /, *, norm: str = "MAX") -> str:
    """Rows divided by their norm; scores that a softmax made have the norm 1 already."""
    maker = w.maker(x)
    if norm == "L1" and maker is not None and maker.op_type in _DISTRIBUTIONS:
        transforms = [a.s for a in maker.attribute if a.name == "post_transform"]
        if transforms == [b"SOFTMAX"]:
            return x
    x = w.floats(x)
    if norm == "MAX":
        return w.op("Div", x, w.reduce("ReduceMax", x, 1))
    if norm not in ("L1", "L2"):
        raise Unsupported(f"norm {norm!r} is unknown")
    return w.op("LpNormalization", x, axis=1, p=int(norm[1]))


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


@rewrites("Imputer")
def imputer(
    w: Writer,
    x: str,
    /,
    *,
    imputed_value_floats: Sequence[float] = (),
    imputed_value_int64s: Sequence[int] = (),
    replaced_value_float: float = 0.0,
    replaced_value_int64: int = 0,
) -> str:
    """A secret value per feature where x is missing; a NaN never leaves the client.

    What the model computes stays guarded against it: samples are run in floats.
    """
    if not np.isfinite(replaced_value_float):
        if not imputed_value_floats:
            return x
        if np.isnan(replaced_value_float):
            missing = w.op("IsNaN", x)
        else:
            above = int(replaced_value_float > 0)
            missing = w.op("IsInf", x, detect_positive=above, detect_negative=1 - above)
        return w.op("Where", missing, w.constant(imputed_value_floats), x)
    if imputed_value_int64s:
        missing = w.constant(replaced_value_int64, np.int64)
        values = w.constant(imputed_value_int64s, np.int64)
    else:
        missing, values = w.constant(replaced_value_float), w.constant(imputed_value_floats)
    return w.op("Where", w.op("Equal", x, missing), values, x)


@rewrites("OneHotEncoder")
def one_hot_encoder(
    w: Writer,
    x: str,
    /,
    *,
    cats_int64s: Sequence[int] = (),
    cats_strings: Sequence[str] = (),
    zeros: int = 1,
) -> str:
    """A comparison with each category, secret as well; text is encoded on the client."""
    if cats_strings:
        raise Unsupported("encodes text, which cannot be shared", ENCODE_FIRST)
    return _equal(w, w.cast(x, np.int64), cats_int64s, np.int64)


@rewrites("LabelEncoder")
def label_encoder(
    w: Writer,
    x: str,
    /,
    *,
    default_float: float = -0.0,
    default_int64: int = -1,
    keys_floats: Sequence[float] = (),
    keys_int64s: Sequence[int] = (),
    values_floats: Sequence[float] = (),
    values_int64s: Sequence[int] = (),
    **text: object,
) -> str | None:
    """Numbers to numbers: a comparison with each key, and a product with the secret values."""
    if "keys_strings" in text or w.types.get(x) == onnx.TensorProto.STRING:
        raise Unsupported("encodes text, which cannot be shared", ENCODE_FIRST)
    if text or (keys_int64s and list(keys_int64s) == list(range(len(values_int64s)))):
        return None  # names of classes, and indices of them
    keys, dtype = (keys_floats, np.float32) if keys_floats else (keys_int64s, np.int64)
    values = np.array([*values_floats, *values_int64s], np.float64)
    other = float(default_float if values_floats else default_int64)
    found = w.op("MatMul", _equal(w, x, keys, dtype), w.constant((values - other)[:, None]))
    flat = w.op("Squeeze", found, w.constant([-1], np.int64))
    y = w.op("Add", flat, w.constant(other))
    return y if values_floats else w.cast(y, np.int64)


def _equal(w: Writer, x: str, keys: Sequence[float], dtype: type) -> str:
    """One more axis: 1.0 where x equals the key."""
    column = w.op("Unsqueeze", x, w.constant([-1], np.int64))
    return w.cast(w.op("Equal", column, w.constant(keys, dtype)), np.float32)
