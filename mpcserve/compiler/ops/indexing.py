"""Elements read from and written to public places: local, unless what is written is compared.

Public indices are structure that the plan shows. What is read at a secret index is a product with
rows that `lookup` makes of it; nothing is written to a secret place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from math import prod
from typing import Any

import numpy as np

from mpcserve.compiler import functions as f
from mpcserve.compiler.builder import Builder, Operand, Ref
from mpcserve.compiler.functions import aligned, axis_of, ints_of, secret, values_of
from mpcserve.compiler.lookup import looked_up, looked_up_along, looked_up_slices
from mpcserve.compiler.problems import Unsupported
from mpcserve.compiler.rearrange import NOWHERE, Ints, assembled, positions_of, taken
from mpcserve.compiler.registry import lowers


def indices_of(x: Operand | None, what: str = "indices") -> Ints:
    """A constant tensor of integers."""
    return np.asarray(values_of(x, what)).astype(np.int64)


@lowers("Gather", since=1)
def gather(b: Builder, x: Operand, indices: Operand, /, *, axis: int = 0) -> Ref:
    """Elements at indices along an axis: local; at secret ones a product with all of them.

    An index that is an input is shared as a row of so many; one that is computed is compared with
    every place, 4 rounds in all. 2^22 such comparisons at most.
    """
    if isinstance(indices, Ref):
        return looked_up(b, x, indices, axis)
    source = secret(b, x)
    axis = axis_of(axis, len(source.shape))
    where = indices_of(indices)
    flat = np.where(where < 0, where + source.shape[axis], where).ravel()
    shape = (*source.shape[:axis], *where.shape, *source.shape[axis + 1 :])
    return b.reshape(b.gather(source, axis, flat), shape)


@lowers("GatherElements", since=11)
def gather_elements(b: Builder, x: Operand, indices: Operand, /, *, axis: int = 0) -> Ref:
    """Elements at indices along an axis, an index for each: local; secret ones as Gather's."""
    if isinstance(indices, Ref):
        return looked_up_along(b, x, indices, axis)
    source = secret(b, x)
    return taken(b, source, _along(source.shape, indices_of(indices), axis))


@lowers("GatherND", since=11)
def gather_nd(b: Builder, x: Operand, indices: Operand, /, *, batch_dims: int = 0) -> Ref:
    """Slices at positions, each given by its indices: local; secret ones as Gather's."""
    if isinstance(indices, Ref):
        return looked_up_slices(b, x, indices, batch_dims)
    source, where = secret(b, x), indices_of(indices)
    shape = source.shape[batch_dims:]
    own = _slices(shape, where)
    batch = np.arange(prod(source.shape[:batch_dims])) * prod(shape)
    steps = batch.reshape((*source.shape[:batch_dims], *[1] * (own.ndim - batch_dims)))
    return taken(b, source, steps + own)


@lowers("ScatterElements", since=11)
def scatter_elements(
    b: Builder,
    x: Operand,
    indices: Operand,
    updates: Operand,
    /,
    *,
    axis: int = 0,
    reduction: str = "none",
) -> Ref:
    """x with elements at constant indices along an axis replaced by updates, or joined with them.

    Local for none and add; mul is a product, max and min a comparison per update of an element.
    """
    return _scattered(b, x, _along(x.shape, indices_of(indices), axis), updates, reduction)


@lowers("Scatter", since=9)
def scatter(b: Builder, x: Operand, indices: Operand, updates: Operand, /, *, axis: int = 0) -> Ref:
    """x with elements at constant indices along an axis replaced by updates: local."""
    return scatter_elements(b, x, indices, updates, axis=axis)


@lowers("ScatterND", since=11)
def scatter_nd(
    b: Builder, x: Operand, indices: Operand, updates: Operand, /, *, reduction: str = "none"
) -> Ref:
    """x with slices at constant positions replaced by updates, or joined with them.

    Local for none and add; mul is a product, max and min a comparison per update of an element.
    """
    return _scattered(b, x, _slices(x.shape, indices_of(indices)), updates, reduction)


@lowers("TensorScatter", since=24)
def tensor_scatter(
    b: Builder,
    x: Operand,
    updates: Operand,
    starts: Operand | None = None,
    /,
    *,
    axis: int = -2,
    mode: str = "linear",
) -> Ref:
    """A cache with consecutive entries written from a constant position on, per batch: local."""
    axis, length = axis_of(axis, len(x.shape)), x.shape[axis]
    first = (
        np.zeros(x.shape[0], np.int64) if starts is None else indices_of(starts, "write_indices")
    )
    along = [updates.shape[axis] if i == axis else 1 for i in range(len(x.shape))]
    where = first.reshape(-1, *[1] * (len(x.shape) - 1)) + np.arange(along[axis]).reshape(along)
    if mode == "circular":
        where %= length
    elif mode != "linear":
        raise Unsupported(f"mode {mode!r} is unknown")
    return _scattered(b, x, _along(x.shape, np.broadcast_to(where, updates.shape), axis), updates)


def _along(shape: Sequence[int], indices: Ints, axis: int) -> Ints:
    """Flat positions of the elements `indices` along an axis, each at its own other indices."""
    axis = axis_of(axis, len(shape))
    if indices.ndim != len(shape):
        raise Unsupported(f"indices of {indices.ndim} axes for a tensor of {len(shape)}")
    grid: list[Ints] = list(np.indices(indices.shape, sparse=True))
    grid[axis] = np.where(indices < 0, indices + shape[axis], indices)
    return positions_of(shape)[tuple(grid)]


def _slices(shape: Sequence[int], indices: Ints) -> Ints:
    """Flat positions of the slices at indices[…, :] of the leading axes."""
    return np.asarray(positions_of(shape)[tuple(np.moveaxis(indices, -1, 0))])


Join = Callable[[Builder, Ref, Ref], Ref]


def _product(b: Builder, x: Ref, y: Ref) -> Ref:
    return b.mul(x, y, to=x.frac_bits)


_JOINS: dict[str, Join] = {"mul": _product, "max": f.maximum, "min": f.minimum}


def _scattered(
    b: Builder, x: Operand, where: Ints, updates: Operand, reduction: str = "none"
) -> Ref:
    """Updates written to the flat positions `where` of x; the last of several stays."""
    held, new = aligned(b, x, updates)
    size, targets = prod(held.shape), where.ravel()
    source = positions_of(held.shape).ravel()
    if reduction == "none":
        source[targets] = size + np.arange(targets.size)
        return assembled(b, [held, new], source.reshape(held.shape))
    turn = _turns(targets, size)
    if reduction == "add":
        parts = [held]
        for k in range(int(turn.max()) + 1):
            added = np.full(size, NOWHERE)
            added[targets[turn == k]] = np.flatnonzero(turn == k)
            parts.append(taken(b, new, added.reshape(held.shape)))
        return reduce(b.add, parts)
    if reduction not in _JOINS:
        raise Unsupported(f"reduction {reduction!r} is unknown")
    for k in range(int(turn.max()) + 1):
        here = np.flatnonzero(turn == k)
        joined = _JOINS[reduction](b, taken(b, held, targets[here]), taken(b, new, here))
        held, joined = aligned(b, held, joined)
        source[:] = np.arange(size)
        source[targets[here]] = size + np.arange(len(here))
        held = assembled(b, [held, joined], source.reshape(held.shape))
    return held


def _turns(targets: Ints, size: int) -> Ints:
    """How many earlier updates go to the same element."""
    order = np.argsort(targets, kind="stable")
    first = np.searchsorted(targets[order], targets[order])
    turns = np.empty_like(targets)
    turns[order] = np.arange(len(targets)) - first
    return turns


@lowers("Compress", since=9)
def compress(b: Builder, x: Ref, condition: Operand, /, *, axis: int | None = None) -> Ref:
    """What a constant condition keeps of an axis, or of all elements."""
    kept = np.flatnonzero(values_of(condition, "condition"))
    if axis is None:
        return b.gather(b.reshape(x, (prod(x.shape),)), 0, kept)
    return b.gather(x, axis_of(axis, len(x.shape)), kept)


@lowers("Trilu", since=14)
def trilu(b: Builder, x: Ref, k: Operand | None = None, /, *, upper: int = 1) -> Ref:
    """The triangle above or below a diagonal, else zero."""
    diagonal = 0 if k is None else ints_of(k, "k")[0]
    where = positions_of(x.shape[-2:])
    rows, columns = np.indices(where.shape)
    inside = columns - rows >= diagonal if upper else columns - rows <= diagonal
    return taken(b, x, np.where(inside, where, NOWHERE), keep=len(x.shape) - 2)


@lowers("ReverseSequence", since=10)
def reverse_sequence(
    b: Builder, x: Ref, lengths: Operand, /, *, batch_axis: int = 1, time_axis: int = 0
) -> Ref:
    """The first elements of each sequence in reverse order, as many as a constant says."""
    where = np.moveaxis(positions_of(x.shape), (batch_axis, time_axis), (0, 1)).copy()
    for row, length in zip(where, ints_of(lengths, "sequence_lens"), strict=True):
        row[:length] = row[:length][::-1].copy()
    return taken(b, x, np.moveaxis(where, (0, 1), (batch_axis, time_axis)))


@lowers("MaxUnpool", since=9)
def max_unpool(
    b: Builder,
    x: Ref,
    indices: Operand,
    output_shape: Operand | None = None,
    /,
    *,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Ref:
    """Elements put back to the constant places from which a MaxPool took them; zero elsewhere."""
    axes = len(kernel_shape)
    steps, around = list(strides or [1] * axes), list(pads or [0] * (2 * axes))
    space = [
        (n - 1) * s + k - around[i] - around[axes + i]
        for i, (n, s, k) in enumerate(zip(x.shape[2:], steps, kernel_shape, strict=True))
    ]
    where = np.full(prod((*x.shape[:2], *space)), NOWHERE)
    where[indices_of(indices).ravel()] = np.arange(prod(x.shape))
    placed = where.reshape((*x.shape[:2], *space))
    if output_shape is not None:
        whole = ints_of(output_shape, "output_shape")
        larger: Any = [(0, n - d) for n, d in zip(whole, placed.shape, strict=True)]
        placed = np.pad(placed, larger, constant_values=NOWHERE)
    return taken(b, x, placed)


@lowers("Col2Im", since=18)
def col2im(
    b: Builder,
    x: Ref,
    image_shape: Operand,
    block_shape: Operand,
    /,
    *,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Ref:
    """Blocks put back into a picture; where they overlap they add up. Local."""
    image, block = ints_of(image_shape, "image_shape"), ints_of(block_shape, "block_shape")
    axes = len(image)
    spread, steps = list(dilations or [1] * axes), list(strides or [1] * axes)
    around = list(pads or [0] * (2 * axes))
    places, inside = np.zeros((), np.int64), np.ones((), bool)
    for i, (size, kernel) in enumerate(zip(image, block, strict=True)):
        reach = (kernel - 1) * spread[i] + 1
        count = (size + around[i] + around[axes + i] - reach) // steps[i] + 1
        at = np.add.outer(np.arange(kernel) * spread[i], np.arange(count) * steps[i]) - around[i]
        places = np.multiply.outer(places, np.ones_like(at)) * size + at
        inside = np.multiply.outer(inside, (at >= 0) & (at < size))
    # Axes are kernel, count, kernel, count …; a column holds all kernels, a row all counts.
    order = [*range(0, 2 * axes, 2), *range(1, 2 * axes, 2)]
    flat, held = places.transpose(order).ravel(), inside.transpose(order).ravel()
    columns = np.flatnonzero(held)
    targets, pixels = flat[columns], prod(image)
    turn = _turns(targets, pixels)
    shape = (x.shape[0], x.shape[1] // prod(block), *image)
    blocks = b.reshape(x, (*shape[:2], prod(block) * x.shape[2]))
    parts = []
    for k in range(int(turn.max()) + 1):
        where = np.full(pixels, NOWHERE)
        where[targets[turn == k]] = columns[turn == k]
        parts.append(taken(b, blocks, where.reshape(image), keep=2))
    return b.reshape(reduce(b.add, parts), shape)
