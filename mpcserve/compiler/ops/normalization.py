"""Normalisation by constants."""

from __future__ import annotations

import numpy as np

from mpcserve.compiler.builder import Builder, Operand, Ref
from mpcserve.compiler.functions import values_of
from mpcserve.compiler.problems import Unsupported
from mpcserve.compiler.registry import lowers


@lowers("BatchNormalization", since=7)
def batch_normalization(
    b: Builder,
    x: Ref,
    scale: Operand,
    bias: Operand,
    mean: Operand,
    var: Operand,
    /,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    spatial: int = 1,
    training_mode: int = 0,
) -> Ref:
    """x · secret slope + secret offset per channel, where it could not be folded: one product."""
    if training_mode or b.n_outputs > 1:
        raise Unsupported("normalises in training mode", "export the model in inference mode")
    inputs = zip((scale, bias, mean, var), ("scale", "B", "mean", "var"), strict=True)
    gain, offset, centre, spread = (np.asarray(values_of(v, n), np.float64) for v, n in inputs)
    slope = gain / np.sqrt(spread + epsilon)
    shape = (-1, *[1] * (len(x.shape) - 2)) if spatial and len(x.shape) > 1 else slope.shape
    w = b.weight(slope.reshape(shape))
    c = b.weight((offset - centre * slope).reshape(shape), x.frac_bits + w.frac_bits)
    return b.mul(x, w, c)
