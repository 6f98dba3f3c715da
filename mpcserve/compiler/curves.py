"""The curves of activations, on arrays of reals."""

from __future__ import annotations

from math import erf as erf_of
from math import pi

import numpy as np
from numpy.typing import NDArray

Reals = NDArray[np.float64]


def sigmoid_curve(x: Reals, gain: float = 1.0) -> Reals:
    """1 / (1 + e^−gain·x)."""
    return np.asarray(0.5 + 0.5 * np.tanh(0.5 * gain * x))


def erf_curve(x: Reals) -> Reals:
    """The error function."""
    return np.array([erf_of(v) for v in np.ravel(x)]).reshape(np.shape(x))


def gelu_curve(x: Reals) -> Reals:
    """x·Φ(x)."""
    return np.asarray(x * 0.5 * (1 + erf_curve(x / np.sqrt(2))))


def tanh_gelu_curve(x: Reals) -> Reals:
    """Its approximation by tanh."""
    return np.asarray(x * 0.5 * (1 + np.tanh(np.sqrt(2 / pi) * (x + 0.044715 * x**3))))


def swish_curve(x: Reals, gain: float = 1.0) -> Reals:
    """x·sigmoid(gain·x)."""
    return np.asarray(x * sigmoid_curve(x, gain))


def softplus_curve(x: Reals) -> Reals:
    """log(1 + e^x)."""
    return np.logaddexp(0.0, x)


def log_sigmoid_curve(x: Reals) -> Reals:
    """log(1 / (1 + e^−x))."""
    return -softplus_curve(-x)


def mish_curve(x: Reals) -> Reals:
    """x·tanh(softplus(x))."""
    return np.asarray(x * np.tanh(softplus_curve(x)))


def exp_curve(x: Reals, factor: float = 1.0, top: float = 0.0) -> Reals:
    """e^(factor·x − top)."""
    return np.exp(factor * x - top)


def dip_curve(x: Reals, alpha: float, scale: float) -> Reals:
    """alpha·(e^(x / scale) − 1)."""
    return np.asarray(alpha * np.expm1(x / scale))
