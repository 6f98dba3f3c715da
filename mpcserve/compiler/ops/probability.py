"""Softmax and its relatives."""

from __future__ import annotations

from math import prod

from mpcserve.compiler import softmax as of
from mpcserve.compiler.builder import Builder, Ref
from mpcserve.compiler.functions import axis_of
from mpcserve.compiler.registry import lowers


@lowers("Softmax", since=13)
def softmax(b: Builder, x: Ref, /, *, axis: int = -1) -> Ref:
    """e^x / Σ e^x over an axis. Error: 2e-4."""
    return of.softmax(b, x, axis_of(axis, len(x.shape)))


@lowers("LogSoftmax", since=13)
def log_softmax(b: Builder, x: Ref, /, *, axis: int = -1) -> Ref:
    """x − log Σ e^x over an axis. Error: 3e-4."""
    return of.log_softmax(b, x, axis_of(axis, len(x.shape)))


@lowers("Softmax", since=1)
def flat_softmax(b: Builder, x: Ref, /, *, axis: int = 1) -> Ref:
    """e^x / Σ e^x over all axes from `axis` on. Error: 2e-4."""
    return b.reshape(of.softmax(b, _flat(b, x, axis), 1), x.shape)


@lowers("LogSoftmax", since=1)
def flat_log_softmax(b: Builder, x: Ref, /, *, axis: int = 1) -> Ref:
    """x − log Σ e^x over all axes from `axis` on. Error: 3e-4."""
    return b.reshape(of.log_softmax(b, _flat(b, x, axis), 1), x.shape)


def _flat(b: Builder, x: Ref, axis: int) -> Ref:
    head = prod(x.shape[: axis_of(axis, len(x.shape))])
    return b.reshape(x, (head, prod(x.shape) // head))
