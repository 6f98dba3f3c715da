"""Normalisation by constants, and by what the values themselves spread over."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, log2, prod, sqrt
from typing import NamedTuple

import numpy as np

from mpcserve.compiler import roots
from mpcserve.compiler.builder import Builder, Operand, Ref
from mpcserve.compiler.functions import (
    absolute,
    aligned,
    axis_of,
    secret,
    times,
    values_of,
    with_frac_bits,
)
from mpcserve.compiler.problems import Unsupported
from mpcserve.compiler.registry import lowers, lowers_fused

SPREAD_BITS = 8
"""Fraction bits, beyond the usual, of a variance and of 1 / √ of it."""

INVERSE_BITS = 15
"""Bits of 1 / √ of a variance that are significant at least."""

NOISE_BITS = 5
"""Rows that spread less than 2^5 ulp are noise: they are normalised as if they spread that much."""

TOTAL_BITS = 60
"""Bits of a sum of squares: a ring of 64 holds it with its sign and what rounding adds."""


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
    if any(isinstance(v, Ref) for v in (scale, bias, mean, var)):
        return _secret_batch_norm(b, x, (scale, bias, mean, var), epsilon)
    inputs = zip((scale, bias, mean, var), ("scale", "B", "mean", "var"), strict=True)
    gain, offset, centre, spread = (np.asarray(values_of(v, n), np.float64) for v, n in inputs)
    slope = gain / np.sqrt(spread + epsilon)
    shape = (-1, *[1] * (len(x.shape) - 2)) if spatial and len(x.shape) > 1 else slope.shape
    w = b.weight(slope.reshape(shape))
    c = b.weight((offset - centre * slope).reshape(shape), x.frac_bits + w.frac_bits)
    return b.mul(x, w, c)


def _secret_batch_norm(b: Builder, x: Ref, given: Sequence[Operand], epsilon: float) -> Ref:
    """The same of statistics that are computed: a root and three products more."""
    shape = [-1, *[1] * (len(x.shape) - 2)]
    shape[0] = given[0].shape[0]
    scale, bias, mean, var = (b.reshape(secret(b, v), shape) for v in given)
    slope = b.mul(scale, roots.inverse_root(b, b.offset(var, epsilon)))
    centred = b.sub(*aligned(b, x, mean))
    return b.add(*aligned(b, b.mul(centred, slope), bias))


@lowers("LayerNormalization", since=17)
def layer_normalization(
    b: Builder,
    x: Ref,
    scale: Operand,
    bias: Operand | None = None,
    /,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Ref | tuple[Ref, ...]:
    """(x − mean) / √(variance + epsilon) · scale + bias over the last axes. Error: 2e-4."""
    y = _normalized(b, x, axis, scale, bias, epsilon, centred=True)
    if b.n_outputs == 1:
        return y
    axis = axis_of(axis, len(x.shape))
    # The steps are those of the first output: deduplicated.
    x, times_2 = _magnified(b, x)
    found = _unscaled(b, _rows(b, x, axis), epsilon * 4.0**times_2, centred=True)
    each = (*x.shape[:axis], *[1] * (len(x.shape) - axis))
    assert found.mean is not None
    mean, inverse = b.scale(found.mean, 1, times_2), b.scale(found.inverse, 1, -times_2)
    return y, b.reshape(mean, each), b.reshape(inverse, each)


@lowers("RMSNormalization", since=23)
def rms_normalization(
    b: Builder,
    x: Ref,
    scale: Operand,
    /,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Ref:
    """x / √(mean of squares + epsilon) · scale over the last axes. Error: 2e-4."""
    return _normalized(b, x, axis, scale, None, epsilon, centred=False)


@lowers("InstanceNormalization", since=6)
def instance_normalization(
    b: Builder, x: Ref, scale: Operand, bias: Operand, /, *, epsilon: float = 1e-5
) -> Ref:
    """(x − mean) / √(variance + epsilon) · scale + bias per channel. Error: 2e-4."""
    return _grouped(b, x, x.shape[1], scale, bias, epsilon)


@lowers("GroupNormalization", since=21)
def group_normalization(
    b: Builder,
    x: Ref,
    scale: Operand,
    bias: Operand,
    /,
    *,
    epsilon: float = 1e-5,
    num_groups: int,
    stash_type: int = 1,
) -> Ref:
    """(x − mean) / √(variance + epsilon) per group of channels, · scale + bias. Error: 2e-4."""
    return _grouped(b, x, num_groups, scale, bias, epsilon)


@lowers("MeanVarianceNormalization", since=9)
def mean_variance_normalization(b: Builder, x: Ref, /, *, axes: Sequence[int] = (0, 2, 3)) -> Ref:
    """(x − mean) / deviation over axes. Error: 2e-4."""
    x, rank = _magnified(b, x)[0], len(x.shape)
    over = sorted(axis_of(a, rank) for a in axes)
    order = [*(a for a in range(rank) if a not in over), *over]
    moved = b.transpose(x, order)
    found = _unscaled(b, _rows(b, moved, rank - len(over)), 0.0, centred=True)
    y = b.mul(found.values, found.inverse)
    return b.transpose(b.reshape(y, moved.shape), np.argsort(order).tolist())


@lowers("LpNormalization", since=1)
def lp_normalization(b: Builder, x: Ref, /, *, axis: int = -1, p: int = 2) -> Ref:
    """x over the sum of its absolute values, or over √ of the sum of its squares. Error: 2e-4."""
    x = with_frac_bits(b, _magnified(b, x)[0], b.frac_bits)
    axis = axis_of(axis, len(x.shape))
    if p == 1:
        total = b.sum(absolute(b, x), [axis])
        return roots.divide(b, x, b.reshape(total, _kept(x, axis)), ratio=1.0)
    order = [*(a for a in range(len(x.shape)) if a != axis), axis]
    moved = b.transpose(x, order)
    found = _unscaled(b, _rows(b, moved, len(order) - 1), 0.0, centred=False)
    y = times(b, b.mul(found.values, found.inverse), 1.0 / sqrt(x.shape[axis]))
    y = b.within(y, -1.0 - 2.0**-8, 1.0 + 2.0**-8)
    return b.transpose(b.reshape(y, moved.shape), np.argsort(order).tolist())


class _Unscaled(NamedTuple):
    """Rows before normalisation, 1 / √(their mean square + epsilon), their mean if centred."""

    values: Ref
    inverse: Ref
    mean: Ref | None = None


def _magnified(b: Builder, x: Ref) -> tuple[Ref, int]:
    """(2^k · x at the usual scale, k) for x that has k fraction bits more: local.

    Normalised, it is the same.
    """
    times_2 = max(x.frac_bits - b.frac_bits, 0)
    return b.scale(x, 1, -times_2), times_2


def _rows(b: Builder, x: Ref, axis: int) -> Ref:
    """All axes from `axis` on as one, all before as another."""
    head = prod(x.shape[:axis])
    return b.reshape(with_frac_bits(b, x, b.frac_bits), (head, prod(x.shape) // head))


def _unscaled(b: Builder, rows: Ref, epsilon: float, centred: bool) -> _Unscaled:
    """Cost: 1 round for the squares, of which only their sum is opened, and an inverse root's."""
    count = rows.shape[1]
    held = b.interval(rows)
    reach, mean = held.magnitude, None
    if centred:
        mean = b.reshape(times(b, b.sum(rows, [1]), 1.0 / count), (rows.shape[0], 1))
        rows = b.sub(rows, mean)
        width = held.most - held.least + 4 * 2.0**-b.frac_bits
        rows = b.within(rows, -width, width)
        reach = width / 2
    # What bounds cannot exclude must fit: rows that may be large are squared with fewer bits.
    most = count * (reach + 2.0**-b.frac_bits) ** 2 * (1 + 2.0**-20)
    spare = TOTAL_BITS - ceil(log2(max(most, 1.0)))
    coarse = b.shift(rows, max(rows.frac_bits - spare // 2, 0))
    left = b.reshape(coarse, (rows.shape[0], 1, count))
    right = b.reshape(coarse, (rows.shape[0], count, 1))
    finer = min(b.frac_bits + SPREAD_BITS, 2 * coarse.frac_bits)
    total = b.reshape(b.matmul(left, right, to=finer), (rows.shape[0], 1))
    total = b.within(total, 0.0, most)
    total = b.offset(total, count * epsilon)
    # 1 / √ is as small as rows may be large.
    fine = max(b.frac_bits + SPREAD_BITS, INVERSE_BITS + ceil(log2(max(reach, 1.0))))
    least = count * 4.0 ** (NOISE_BITS - b.frac_bits)
    return _Unscaled(rows, roots.inverse_root(b, total, fine, sqrt(count), least), mean)


def _normalized(
    b: Builder,
    x: Ref,
    axis: int,
    scale: Operand,
    bias: Operand | None,
    epsilon: float,
    centred: bool,
) -> Ref:
    over = range(axis_of(axis, len(x.shape)), len(x.shape))
    return normalize(b, x, scale, bias, axes=over, epsilon=epsilon, centred=int(centred))


@lowers_fused("Normalize")
def normalize(
    b: Builder,
    x: Ref,
    scale: Operand | None = None,
    bias: Operand | None = None,
    /,
    *,
    axes: Sequence[int],
    epsilon: float,
    centred: int,
) -> Ref:
    """(x − mean, if centred) / √(mean square + epsilon) · scale + bias over axes. Error: 2e-4."""
    x, times_2 = _magnified(b, x)
    rank = len(x.shape)
    order = [*(a for a in range(rank) if a not in axes), *axes]
    lead = rank - len(axes)
    moved = b.transpose(x, order)
    rows = _rows(b, moved, lead)
    found = _unscaled(b, rows, epsilon * 4.0**times_2, bool(centred))
    scale, bias = (None if v is None else _moved(b, v, rank, order) for v in (scale, bias))
    values = b.reshape(found.values, moved.shape)
    inverse = b.reshape(found.inverse, (*moved.shape[:lead], *[1] * len(axes)))
    y = _finished(b, values, inverse, scale, bias, rows.shape[1])
    return b.transpose(y, np.argsort(order).tolist())


def _moved(b: Builder, x: Operand, rank: int, order: Sequence[int]) -> Operand:
    """A constant that broadcasts to a tensor, with the tensor's axes permuted."""
    x = _shaped(b, x, (*[1] * (rank - len(x.shape)), *x.shape))
    return b.transpose(x, order) if isinstance(x, Ref) else x.transpose(order)


def _grouped(b: Builder, x: Ref, groups: int, scale: Operand, bias: Operand, epsilon: float) -> Ref:
    """Rows are samples and groups of channels; scale and bias are one per channel."""
    batch, channels = x.shape[:2]
    x, times_2 = _magnified(b, x)
    rows = b.reshape(_rows(b, x, 1), (batch * groups, prod(x.shape[1:]) // groups))
    found = _unscaled(b, rows, epsilon * 4.0**times_2, centred=True)
    shape = (batch, groups, channels // groups, prod(x.shape[2:]))
    scale, bias = (_shaped(b, v, (1, groups, channels // groups, 1)) for v in (scale, bias))
    values = b.reshape(found.values, shape)
    inverse = b.reshape(found.inverse, (batch, groups, 1, 1))
    return b.reshape(_finished(b, values, inverse, scale, bias, rows.shape[1]), x.shape)


def _finished(
    b: Builder,
    values: Ref,
    inverse: Ref,
    scale: Operand | None,
    bias: Operand | None,
    count: int,
) -> Ref:
    """values · scale · inverse + bias; the first product runs while the inverse is found.

    A scale of ones and a bias of zeros are what exporters write for none: nothing is computed.
    """
    # No element of a normalised row exceeds √count.
    reach = np.asarray(1.01 * sqrt(count))
    if not (scale is None or _all(scale, 1.0)):
        gain = secret(b, scale)
        held = b.interval(gain)
        reach = reach * np.maximum(np.abs(held.low), np.abs(held.high))
        values = b.mul(values, gain)
    y = b.within(b.mul(values, inverse), -reach - 0.01, reach + 0.01)
    return y if bias is None or _all(bias, 0.0) else b.add(*aligned(b, y, bias))


def _all(x: Operand, value: float) -> bool:
    return not isinstance(x, Ref) and bool(np.all(np.asarray(x) == value))


def _kept(x: Ref, axis: int) -> list[int]:
    return [1 if a == axis else d for a, d in enumerate(x.shape)]


def _shaped(b: Builder, x: Operand, shape: Sequence[int]) -> Operand:
    return b.reshape(x, shape) if isinstance(x, Ref) else np.asarray(x, np.float64).reshape(shape)
