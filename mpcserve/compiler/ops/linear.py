"""Gemm, MatMul, Conv: one product each, with the bias added before the truncation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mpcserve.compiler.builder import Array, Builder, Operand, Ref
from mpcserve.compiler.functions import aligned, secret, times
from mpcserve.compiler.problems import Unsupported
from mpcserve.compiler.registry import lowers
from mpcserve.compiler.windows import pads_of


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
        x, alpha = alpha * x, 1.0
    elif isinstance(w, np.ndarray):
        w, alpha = alpha * w, 1.0
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


@lowers("Conv", since=7)
def conv(
    b: Builder,
    x: Operand,
    w: Operand,
    c: Operand | None = None,
    /,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Ref:
    """Convolution over one or two axes, grouped, strided, dilated, padded."""
    axes = len(w.shape) - 2
    if axes not in (1, 2):
        raise Unsupported(f"convolves {axes} axes, supported are 1 and 2")
    steps, spread = list(strides or [1] * axes), list(dilations or [1] * axes)
    before, after = pads_of(auto_pad, pads, x.shape[2:], w.shape[2:], steps, spread)
    xr, wr = secret(b, x), secret(b, w)
    xr = _cropped(b, xr, before, after)
    if axes == 1:
        xr = b.reshape(xr, (*xr.shape[:2], 1, xr.shape[2]))
        wr = b.reshape(wr, (*wr.shape[:2], 1, wr.shape[2]))
        steps, spread, before, after = [1, *steps], [1, *spread], [0, *before], [0, *after]
    public = [max(p, 0) for p in (*before, *after)]
    bias = None if c is None or isinstance(c, Ref) else c[:, None, None]
    y = b.conv(
        xr,
        wr,
        _bias(b, xr, wr, bias),
        strides=steps,
        pads=public,
        dilations=spread,
        groups=group,
    )
    if isinstance(c, Ref):
        y = b.add(*aligned(b, y, b.reshape(c, (c.shape[0], 1, 1))))
    return b.reshape(y, (*y.shape[:2], y.shape[3])) if axes == 1 else y


def _bias(b: Builder, x: Ref, w: Ref, values: Array | None) -> Ref | None:
    """The addend of a product, at the scale of its accumulator."""
    return None if values is None else b.weight(values, x.frac_bits + w.frac_bits)


def _cropped(b: Builder, x: Ref, before: list[int], after: list[int]) -> Ref:
    """Negative pads cut the picture."""
    for axis, (head, tail) in enumerate(zip(before, after, strict=True), 2):
        size = x.shape[axis]
        x = b.slice(x, axis, max(-head, 0), size - max(-tail, 0))
    return x


def _scaled(b: Builder, c: Operand, beta: float) -> Operand:
    return times(b, c, beta) if isinstance(c, Ref) else beta * c


def _turned(b: Builder, x: Operand, transpose: int) -> Operand:
    if not transpose:
        return x
    return b.transpose(x, (1, 0)) if isinstance(x, Ref) else x.T


def _shaped(b: Builder, x: Operand, shape: Sequence[Any]) -> Operand:
    return b.reshape(x, shape) if isinstance(x, Ref) else x.reshape(shape)
