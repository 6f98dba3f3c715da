"""Losses of a prediction for public labels."""

from __future__ import annotations

from math import prod

import numpy as np

from mpcserve.compiler.booleans import where
from mpcserve.compiler.builder import Array, Builder, Operand, Ref
from mpcserve.compiler.functions import times, values_of
from mpcserve.compiler.problems import Unsupported
from mpcserve.compiler.registry import lowers
from mpcserve.compiler.roots import divide
from mpcserve.compiler.softmax import log_softmax


@lowers("NegativeLogLikelihoodLoss", since=12)
def nll_loss(
    b: Builder,
    x: Ref,
    target: Operand,
    weight: Operand | None = None,
    /,
    *,
    reduction: str = "mean",
    ignore_index: int | None = None,
) -> Ref:
    """−w[t]·x[t] for public labels t: local, and a product with secret weights of the classes."""
    return _loss(b, x, values_of(target, "target"), weight, reduction, ignore_index)


@lowers("SoftmaxCrossEntropyLoss", since=12)
def cross_entropy(
    b: Builder,
    x: Ref,
    target: Operand,
    weight: Operand | None = None,
    /,
    *,
    reduction: str = "mean",
    ignore_index: int | None = None,
) -> tuple[Ref, Ref]:
    """The negative log-likelihood of a log-softmax over the classes, and that. Error: 3e-4."""
    logs = log_softmax(b, x, 1)
    return _loss(b, logs, values_of(target, "labels"), weight, reduction, ignore_index), logs


def _loss(
    b: Builder,
    x: Ref,
    target: Array,
    weight: Operand | None,
    reduction: str,
    ignored: int | None,
) -> Ref:
    labels = np.asarray(target, np.int64)
    counted = np.ones(labels.shape, bool) if ignored is None else labels != ignored
    labels = np.where(counted, labels, 0)
    classes = x.shape[1]
    if labels.min() < -classes or labels.max() >= classes:
        raise Unsupported(f"a label is not one of {classes} classes", "export it with other labels")
    labels = labels % classes
    picked = b.scale(_at(b, x, labels), -1)
    each: Ref | None = None
    if weight is not None:
        known = weight if isinstance(weight, Ref) else b.weight(weight)
        each = b.reshape(b.gather(known, 0, labels.ravel()), labels.shape)
        picked = b.mul(picked, each)
    zero = np.zeros((), np.float32)
    picked = where(b, counted, picked, zero) if not counted.all() else picked
    if reduction == "none":
        return picked
    over = list(range(labels.ndim))
    total = b.sum(picked, over)
    if reduction == "sum":
        return total
    if each is None:
        return times(b, total, 1.0 / max(int(counted.sum()), 1))
    each = where(b, counted, each, zero) if not counted.all() else each
    if isinstance(weight, Ref):
        return divide(b, total, b.sum(each, over))
    share = np.where(counted, np.asarray(weight, np.float64)[labels], 0.0).sum()
    return b.mul(total, b.weight(np.asarray(1.0 / share)))


def _at(b: Builder, x: Ref, labels: Array) -> Ref:
    """x[n, labels[n, …], …]."""
    batch, classes, *rest = x.shape
    places = np.arange(batch * prod(rest)).reshape(batch, prod(rest))
    samples, positions = places // prod(rest), places % prod(rest)
    flat = (samples * classes + labels.reshape(batch, -1)) * prod(rest) + positions
    picked = b.gather(b.reshape(x, (prod(x.shape),)), 0, flat.ravel())
    return b.reshape(picked, labels.shape)
