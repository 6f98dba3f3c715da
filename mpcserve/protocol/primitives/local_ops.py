"""The local ops: linear maps that every role applies to what it holds, at no cost.

The same function maps Δ and each share of λ, since Δ − λ_A − λ_B commutes with it. Public constants
(`offset`, `constant`, the border of `pad`) touch Δ only. `shift` divides by 2^t: subtract 2^(t−1)
from Δ, then drop t bits of Δ, λ_A and λ_B alike; error < 1.5 ulp, mean −2^−(t+1) ulp.

`ready_local` looks at the plan once; what it returns does nothing but arithmetic on arrays, and
gives views where the op only moves elements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from mpcserve.kernels import bits, linear, local, weighing
from mpcserve.plan.plan import Instruction, Value
from mpcserve.ring import HALF_BITS, WORD_BITS, Words, as_words, word_type, words_of

Local = Callable[[Sequence[Words]], Words]
"""An op on what one role holds of its operands; each word below 2^width of its value."""

_Make = Callable[[Instruction, Sequence[Value], bool], Local]


def ready_local(i: Instruction, operands: Sequence[Value], is_delta: bool) -> Local:
    """The op on Δ (`is_delta`) or on one share of λ; its result is reduced to the value's width."""
    if i.value.width == 1:
        return _ready_bit(i, operands, is_delta)
    op, width = _TABLE[i.op](i, operands, is_delta), i.value.width
    word = word_type(width)
    if i.op in ("add", "sub") and all(
        v.shape == i.value.shape and word_type(v.width) is word for v in operands
    ):
        return _added(i)
    if any(word_type(v.width) is not word for v in operands):
        # A shift reads the high bits, and so the whole words of its operand.
        op = _then_words(op, width) if i.op == "shift" else _on_words(op, width)
    if width in (HALF_BITS, WORD_BITS) or not (
        i.op in _GROWING or any(v.width > width for v in operands)
    ):
        # asarray: NumPy turns arrays without axes into scalars, whose arithmetic warns at wraps
        return lambda xs: np.asarray(op(xs))
    mask = word((1 << width) - 1)
    return lambda xs: np.asarray(op(xs) & mask)


def _ready_bit(i: Instruction, operands: Sequence[Value], is_delta: bool) -> Local:
    """Ops whose value is a bit, on planes."""
    if i.op == "odd":
        return _odd
    if i.op == "xor":
        flips = bool(i.attrs["flip"]) and is_delta
        return lambda xs: np.asarray(_not(np.bitwise_xor.reduce(xs), flips))
    if i.op == "reshape":
        return lambda xs: xs[0]
    if i.op == "slice" and (rows := _rows(i, operands[0].shape)) is not None:
        start, count = rows
        return lambda xs: bits.part_of(xs[0], start, count)
    op, shapes = _TABLE[i.op](i, operands, is_delta), [v.shape for v in operands]
    return lambda xs: bits.plane_of(
        np.asarray(op([bits.flags_of(x, shape) for x, shape in zip(xs, shapes, strict=True)]))
    )


def _rows(i: Instruction, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """(first element, how many) of a slice that cuts neighbouring rows off the first axis."""
    at = i.attrs
    if set(at["steps"]) - {1} or tuple(at["stops"][1:]) != shape[1:] or any(at["starts"][1:]):
        return None
    return at["starts"][0] * prod(shape[1:]), i.value.size


def _odd(xs: Sequence[Words]) -> Words:
    flat = np.ascontiguousarray(xs[0]).reshape(-1)
    lowest = np.empty((1, (flat.size + 63) // 64), np.uint64)
    bits.slice_bits(flat, 0, 1, lowest)
    return np.asarray(lowest[0])


def _not(plane: Words, flips: bool) -> Words:
    return np.bitwise_not(plane) if flips else plane


def _on_words(op: Local, width: int) -> Local:
    return lambda xs: op([as_words(x, width) for x in xs])


def _then_words(op: Local, width: int) -> Local:
    return lambda xs: as_words(np.asarray(op(xs)), width)


def _offset(i: Instruction, operands: Sequence[Value], is_delta: bool) -> Local:
    if not is_delta:
        return lambda xs: xs[0]
    value = words_of([i.attrs["value"]], (), i.value.width)
    return lambda xs: xs[0] + value


def _scale(i: Instruction, operands: Sequence[Value], is_delta: bool) -> Local:
    factor = words_of([i.attrs["factor"]], (), i.value.width)
    return lambda xs: xs[0] * factor


def _shift(i: Instruction, operands: Sequence[Value], is_delta: bool) -> Local:
    t = i.attrs["bits"]
    word = word_type(operands[0].width)
    if t == 0:
        return lambda xs: xs[0]
    half, count = word(1 << (t - 1)), word(t)
    if is_delta:
        return lambda xs: np.asarray(xs[0] - half) >> count
    return lambda xs: xs[0] >> count


def _slice(i: Instruction, operands: Sequence[Value], is_delta: bool) -> Local:
    at = i.attrs
    where = tuple(map(slice, at["starts"], at["stops"], at["steps"]))
    return lambda xs: xs[0][where]


def _gather(i: Instruction, operands: Sequence[Value], is_delta: bool) -> Local:
    axis, indices = i.attrs["axis"], np.asarray(i.attrs["indices"]).astype(np.intp)
    steps = np.diff(indices)
    if indices.size > 1 and steps[0] > 0 and bool(np.all(steps == steps[0])):
        part = slice(int(indices[0]), int(indices[-1]) + 1, int(steps[0]))
        where = (slice(None),) * (axis % len(i.value.shape)) + (part,)
        return lambda xs: xs[0][where]
    return lambda xs: np.take(xs[0], indices, axis)


def _pad(i: Instruction, operands: Sequence[Value], is_delta: bool) -> Local:
    border = words_of([i.attrs["value"] if is_delta else 0], (), i.value.width)
    shape, old = i.value.shape, operands[0].shape
    inside = tuple(slice(b, b + d) for b, d in zip(i.attrs["before"], old, strict=True))

    def pad(xs: Sequence[Words]) -> Words:
        out = np.full(shape, border, border.dtype)
        out[inside] = xs[0]
        return out

    return pad


def _constant(i: Instruction, operands: Sequence[Value], is_delta: bool) -> Local:
    if is_delta:
        values = words_of(i.attrs["values"], i.value.shape, i.value.width)
    else:
        values = np.zeros(i.value.shape, word_type(i.value.width))
    return lambda xs: values


def _reshape(i: Instruction, operands: Sequence[Value], is_delta: bool) -> Local:
    shape = i.value.shape
    return lambda xs: xs[0].reshape(shape)


def _transpose(i: Instruction, operands: Sequence[Value], is_delta: bool) -> Local:
    perm = tuple(i.attrs["perm"])
    return lambda xs: xs[0].transpose(perm)


def _concat(i: Instruction, operands: Sequence[Value], is_delta: bool) -> Local:
    axis = i.attrs["axis"]
    return lambda xs: np.concatenate(xs, axis)


def _expand(i: Instruction, operands: Sequence[Value], is_delta: bool) -> Local:
    shape = i.value.shape
    return lambda xs: np.broadcast_to(xs[0], shape)


def _sum(i: Instruction, operands: Sequence[Value], is_delta: bool) -> Local:
    axes, word = tuple(i.attrs["axes"]), word_type(i.value.width)
    return lambda xs: np.add.reduce(xs[0], axis=axes, dtype=word)


DENSE = 8
"""A matrix with an eighth of its elements set is faster multiplied than gathered."""


def _combine(i: Instruction, operands: Sequence[Value], is_delta: bool) -> Local:
    at, old, word = i.attrs, operands[0].shape, word_type(i.value.width)
    axis, length = at["axis"], old[at["axis"]]
    indices = np.asarray(at["indices"]).astype(np.intp).reshape(at["taps"], -1)
    factors = words_of(at["factors"], indices.shape, i.value.width)
    if DENSE * len(indices) >= length:
        matrix = np.zeros((length, indices.shape[1]), word)
        np.add.at(matrix, (indices, np.arange(indices.shape[1])), factors)
        return lambda xs: _multiplied(xs[0], axis, matrix)
    tables = np.ascontiguousarray(indices.T), np.ascontiguousarray(factors.T)

    lead, tail, shape = prod(old[:axis]), prod(old[axis + 1 :]), i.value.shape

    def combine(xs: Sequence[Words]) -> Words:
        x = np.ascontiguousarray(xs[0]).reshape(lead, length, tail)
        out = np.empty((lead, shape[axis], tail), word)
        weighing.weighed(x, *tables, out)
        return out.reshape(shape)

    return combine


def _multiplied(x: Words, axis: int, matrix: Words) -> Words:
    """The same as one product by a matrix."""
    last = np.ascontiguousarray(np.moveaxis(x, axis, -1))
    product = linear.matmul(last.reshape(-1, x.shape[axis]), matrix)
    return np.moveaxis(product.reshape((*last.shape[:-1], -1)), -1, axis)


def _added(i: Instruction) -> Local:
    """Of two arrays that are alike, without another pass that reduces."""
    minus, value = i.op == "sub", i.value

    def add(xs: Sequence[Words]) -> Words:
        a, b = (np.ascontiguousarray(x).reshape(-1) for x in xs)
        out = np.empty(value.size, a.dtype)
        local.add_words(a, b, minus, value.width, out)
        return out.reshape(value.shape)

    return add


def _two(function: Any) -> _Make:
    return lambda i, operands, is_delta: lambda xs: function(xs[0], xs[1])


_TABLE: Mapping[str, _Make] = {
    "constant": _constant,
    "add": _two(np.add),
    "sub": _two(np.subtract),
    "scale": _scale,
    "offset": _offset,
    "shift": _shift,
    "reshape": _reshape,
    "transpose": _transpose,
    "slice": _slice,
    "concat": _concat,
    "pad": _pad,
    "expand": _expand,
    "gather": _gather,
    "combine": _combine,
    "wrap": lambda i, operands, is_delta: lambda xs: xs[0],
    "sum": _sum,
}
_GROWING = frozenset({"add", "sub", "scale", "offset", "shift", "combine", "sum"})
"""Ops whose results may exceed the width of what they read."""
