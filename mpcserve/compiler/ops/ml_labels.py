"""Labels of classes: an index that was computed in secret becomes what it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from mpcserve.compiler import lookup
from mpcserve.compiler.builder import Array, Builder, Operand, Ref
from mpcserve.compiler.problems import Unsupported
from mpcserve.compiler.registry import lowers

ML = "ai.onnx.ml"


@lowers("ArrayFeatureExtractor", since=1, domain=ML)
def array_feature_extractor(b: Builder, x: Operand, index: Ref, /) -> Ref:
    """The class of a secret index: names are public, numbers are found by comparisons.

    Columns of a secret are a product, as those of Gather.
    """
    if isinstance(x, Ref):
        flat = b.reshape(index, (prod(index.shape),))
        return lookup.looked_up(b, x, flat, len(x.shape) - 1)
    return b.reshape(looked_up(b, index, np.asarray(x).ravel().tolist()), (1, prod(index.shape)))


@lowers("LabelEncoder", since=1, domain=ML)
def label_encoder(
    b: Builder,
    x: Ref,
    /,
    *,
    classes_strings: Sequence[str] = (),
    default_float: float = -0.0,
    default_int64: int = -1,
    default_string: str = "_Unused",
    default_tensor: Array | None = None,
    keys_floats: Sequence[float] = (),
    keys_int64s: Sequence[int] = (),
    keys_strings: Sequence[str] = (),
    keys_tensor: Array | None = None,
    values_floats: Sequence[float] = (),
    values_int64s: Sequence[int] = (),
    values_strings: Sequence[str] = (),
    values_tensor: Array | None = None,
) -> Ref:
    """The class of a secret index: names are public, numbers are found by comparisons."""
    values: list[Any] = [*values_strings, *values_int64s, *values_floats]
    values = values or np.ravel(() if values_tensor is None else values_tensor).tolist()
    if classes_strings:
        values = list(classes_strings)
    elif list(keys_int64s) != list(range(len(values))):
        raise Unsupported(
            "encodes something else than the index of a class",
            "encode categories before the model is exported",
        )
    return looked_up(b, x, values)


def looked_up(b: Builder, index: Ref, values: Sequence[Any]) -> Ref:
    """values[index] for a secret index in 0 … n − 1.

    Names of classes stay an index that the data owner looks up: they are public. Numbers in
    arithmetic progression are a sum; others are secret, and cost n − 1 comparisons, a selection and
    a product.
    """
    if index.frac_bits:
        raise Unsupported("its index is not a whole number")
    names = [v.decode() if isinstance(v, bytes) else v for v in values]
    if isinstance(names[0], str):
        if len(set(names)) < len(names):
            raise Unsupported("its names are not those of classes", "look up numbers instead")
        return b.labelled(b.scale(index, 1), names)
    numbers = np.asarray(values, np.float64)
    steps = np.diff(numbers)
    whole = bool(np.all(numbers == np.rint(numbers)))
    if whole and len(set(steps.tolist())) < 2:
        return b.offset(b.scale(index, int(steps[0]) if steps.size else 0), float(numbers[0]))
    if lookup.is_hot(b, index):
        return lookup.looked_up(b, numbers.astype(int) if whole else numbers, index, 0)
    frac_bits = 0 if whole else b.frac_bits
    count = int(np.prod(index.shape))
    column = b.expand(b.reshape(b.scale(index, -1), (count, 1)), (count, len(steps)))
    # 1 where index > k, and there the step from entry k to the next.
    passed = b.number(b.sign(b.add(column, b.constant(np.arange(len(steps))[None, :]))))
    first = b.weight(numbers[:1, None], frac_bits)
    found = b.matmul(passed, b.weight(steps[:, None], frac_bits), first, to=frac_bits)
    found = b.within(found, numbers.min(), numbers.max())
    return b.reshape(found, index.shape)
