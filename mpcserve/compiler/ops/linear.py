"""Gemm and MatMul: one product each, with the bias added before the truncation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mpcserve.compiler.builder import Array, Builder, Operand, Ref
from mpcserve.compiler.functions import aligned, secret, times
from mpcserve.compiler.registry import lowers


@lowers("Gemm", since=7)
def gemm(
    b: Builder,
    x: Operand,
    w: Operand,
    c: Operand | None = None,
    /,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Ref:
    """alpha · x @ w + beta · c, one product."""
    x, w = _turned(b, x, transA), _turned(b, w, transB)
    if isinstance(x, np.ndarray):
        x, alpha = _times(x, alpha), 1.0
    elif isinstance(w, np.ndarray):
        w, alpha = _times(w, alpha), 1.0
    x, w = secret(b, x), secret(b, w)
    if alpha == 1.0 and not isinstance(c, Ref):
        return b.matmul(x, w, _bias(b, x, w, None if c is None else beta * c))
    y = times(b, b.matmul(x, w), alpha)
    return y if c is None else b.add(*aligned(b, y, _scaled(b, c, beta)))


@lowers("MatMul", since=7)
def matmul(b: Builder, x: Operand, w: Operand, /) -> Ref:
    """x @ w as numpy.matmul: batch axes broadcast, vectors are rows and columns."""
    rows, columns = x.ndim if isinstance(x, np.ndarray) else len(x.shape), len(w.shape)
    left = _shaped(b, x, (1, *x.shape)) if rows == 1 else x
    right = _shaped(b, w, (*w.shape, 1)) if columns == 1 else w
    lead = left.shape[:-1]
    flat = len(right.shape) == 2 and len(left.shape) > 2
    if flat:
        left = _shaped(b, left, (int(np.prod(lead)), left.shape[-1]))
    y = b.matmul(secret(b, left), secret(b, right))
    shape = (*lead, y.shape[-1]) if flat else y.shape
    if rows == 1:
        shape = (*shape[:-2], shape[-1])
    if columns == 1:
        shape = shape[:-1]
    return b.reshape(y, shape)


def _bias(b: Builder, x: Ref, w: Ref, values: Array | None) -> Ref | None:
    """The addend of a product, at the scale of its accumulator."""
    return None if values is None else b.weight(values, x.frac_bits + w.frac_bits)


def _scaled(b: Builder, c: Operand, beta: float) -> Operand:
    return times(b, c, beta) if isinstance(c, Ref) else beta * c


def _times(values: Array, factor: float) -> Array:
    return values if factor == 1.0 else factor * values


def _turned(b: Builder, x: Operand, transpose: int) -> Operand:
    if not transpose:
        return x
    return b.transpose(x, (1, 0)) if isinstance(x, Ref) else x.T


def _shaped(b: Builder, x: Operand, shape: Sequence[Any]) -> Operand:
    return b.reshape(x, shape) if isinstance(x, Ref) else x.reshape(shape)
