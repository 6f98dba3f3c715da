"""The local ops: linear maps that every role applies to what it holds, at no cost.

The same function maps Δ and each share of λ, since Δ − λ_A − λ_B commutes with it. Public constants
(`offset`, `constant`, the border of `pad`) touch Δ only. `shift` divides by 2^t: subtract 2^(t−1)
from Δ, then drop t bits of Δ, λ_A and λ_B alike; error < 1.5 ulp, mean −2^−(t+1) ulp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mpcserve.kernels import bits, linear
from mpcserve.plan.plan import Instruction, Plan
from mpcserve.ring import Words, as_words, reduce, word_type, words_of

Apply = Callable[[Instruction, Sequence[Words], bool], Words]


def apply_local(plan: Plan, i: Instruction, xs: Sequence[Words], is_delta: bool) -> Words:
    """The op on Δ (`is_delta`) or on one share of λ, reduced to the value's width.

    What only moves words may return a view of its operand.
    """
    if i.value.width == 1:
        return _bit(plan, i, xs, is_delta)
    if i.id in plan.moves:
        return np.asarray(_TABLE[i.op](i, xs, is_delta))
    if i.op != "shift":
        xs = [as_words(x, i.value.width) for x in xs]
    # asarray: NumPy turns arrays without axes into scalars, whose arithmetic warns when it wraps
    return np.asarray(reduce(np.asarray(_TABLE[i.op](i, xs, is_delta)), i.value.width))


def _bit(plan: Plan, i: Instruction, xs: Sequence[Words], is_delta: bool) -> Words:
    """Ops whose value is a bit, on planes."""
    if i.op == "odd":
        lowest = np.empty((1, (i.value.size + 63) // 64), np.uint64)
        bits.slice_bits(np.ascontiguousarray(xs[0]).reshape(-1), 0, 1, lowest)
        return np.asarray(lowest[0])
    if i.op == "xor":
        out: Words = np.asarray(np.bitwise_xor.reduce(xs))
        return np.bitwise_not(out) if i.attrs["flip"] and is_delta else out
    if i.op == "reshape":
        return xs[0]
    flags = [bits.flags_of(x, v.shape) for x, v in zip(xs, plan.operands(i), strict=True)]
    return bits.plane_of(np.asarray(_TABLE[i.op](i, flags, is_delta)))


def _offset(i: Instruction, xs: Sequence[Words], is_delta: bool) -> Words:
    return xs[0] + words_of([i.attrs["value"]], (), i.value.width) if is_delta else xs[0]


def _shift(i: Instruction, xs: Sequence[Words], is_delta: bool) -> Words:
    (x,), t = xs, i.attrs["bits"]
    if t == 0:
        return x
    word = x.dtype.type
    return np.asarray(x - word(1 << (t - 1)) if is_delta else x) >> word(t)


def _slice(i: Instruction, xs: Sequence[Words], is_delta: bool) -> Words:
    at = i.attrs
    return xs[0][tuple(map(slice, at["starts"], at["stops"], at["steps"]))]


def _pad(i: Instruction, xs: Sequence[Words], is_delta: bool) -> Words:
    border = words_of([i.attrs["value"] if is_delta else 0], (), i.value.width)
    out = np.full(i.value.shape, border, border.dtype)
    inside = tuple(slice(b, b + d) for b, d in zip(i.attrs["before"], xs[0].shape, strict=True))
    out[inside] = xs[0]
    return out


def _constant(i: Instruction, xs: Sequence[Words], is_delta: bool) -> Words:
    if is_delta:
        return words_of(i.attrs["values"], i.value.shape, i.value.width)
    return np.zeros(i.value.shape, word_type(i.value.width))


DENSE = 8
"""A matrix with an eighth of its elements set is faster multiplied than gathered."""


def _combine(i: Instruction, xs: Sequence[Words], is_delta: bool) -> Words:
    (x,), at = xs, i.attrs
    indices = np.asarray(at["indices"]).reshape(at["taps"], -1)
    factors = words_of(at["factors"], indices.shape, i.value.width)
    if DENSE * len(indices) >= x.shape[at["axis"]]:
        return _multiplied(x, at["axis"], indices, factors)
    along = (-1, *[1] * (x.ndim - 1 - at["axis"]))
    total = np.zeros(i.value.shape, x.dtype)
    for index, factor in zip(indices, factors, strict=True):
        part = np.take(x, index, axis=at["axis"])
        part *= factor.reshape(along)
        total += part
    return total


def _multiplied(x: Words, axis: int, indices: NDArray[np.int64], factors: Words) -> Words:
    """The same as one product by a matrix."""
    matrix = np.zeros((x.shape[axis], indices.shape[1]), x.dtype)
    np.add.at(matrix, (indices, np.arange(indices.shape[1])), factors)
    last = np.ascontiguousarray(np.moveaxis(x, axis, -1))
    product = linear.matmul(last.reshape(-1, x.shape[axis]), matrix)
    return np.moveaxis(product.reshape((*last.shape[:-1], -1)), -1, axis)


_TABLE: Mapping[str, Apply] = {
    "constant": _constant,
    "add": lambda i, xs, d: xs[0] + xs[1],
    "sub": lambda i, xs, d: xs[0] - xs[1],
    "scale": lambda i, xs, d: xs[0] * words_of([i.attrs["factor"]], (), i.value.width),
    "offset": _offset,
    "shift": _shift,
    "reshape": lambda i, xs, d: xs[0].reshape(i.value.shape),
    "transpose": lambda i, xs, d: xs[0].transpose(i.attrs["perm"]),
    "slice": _slice,
    "concat": lambda i, xs, d: np.concatenate(xs, axis=i.attrs["axis"]),
    "pad": _pad,
    "expand": lambda i, xs, d: np.broadcast_to(xs[0], i.value.shape),
    "gather": lambda i, xs, d: np.take(xs[0], np.asarray(i.attrs["indices"]), axis=i.attrs["axis"]),
    "combine": _combine,
    "wrap": lambda i, xs, d: xs[0],
    "sum": lambda i, xs, d: np.sum(xs[0], axis=tuple(i.attrs["axes"]), dtype=xs[0].dtype),
}
