"""The reference: one party, no secrecy; the living definition of every instruction.

Values are signed int64. Truncation rounds to nearest, where the protocol rounds stochastically, so
each truncation of the protocol may differ from this by less than one ulp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mpcserve.plan.plan import Instruction, Plan

Int = NDArray[np.int64]


def evaluate_clear(
    plan: Plan,
    weights: Mapping[str, Int],
    inputs: Sequence[NDArray[np.floating]],
    watch: Callable[[int, Int], Int | None] | None = None,
) -> list[NDArray[np.generic]]:
    """Outputs of the plan in fixed point, in the clear.

    `watch(id, integers)` sees every value, and may return another to go on with.
    """
    values: dict[int, Int] = {}
    given = {s.id: (s, x) for s, x in zip(plan.inputs, inputs, strict=True)}
    for i in plan.instructions:
        if i.op == "input":
            spec, x = given[i.id]
            out = spec.encoded(x, i.value)
        elif i.op == "weight":
            out = np.asarray(weights[i.attrs["name"]], np.int64).reshape(i.value.shape)
        else:
            out = np.asarray(_TABLE[i.op](i, [values[j] for j in i.inputs]))
        instead = watch(i.id, out) if watch is not None else None
        values[i.id] = out if instead is None else instead
        for j in i.inputs:
            if plan.last_use[j] == i.id:
                values.pop(j, None)
    return [
        o.decoded(
            np.ldexp(values[o.id].astype(np.float64), -f)
            if (f := plan.value(o.id).frac_bits)
            else values[o.id]
        ).reshape(o.shape)
        for o in plan.outputs
    ]


def _truncate(z: Int, t: int) -> Int:
    return (z + np.int64(1 << (t - 1))) >> np.int64(t) if t else z


def _product(i: Instruction, z: Int, xs: Sequence[Int]) -> Int:
    if len(xs) == 3:
        z = z + xs[2]
    return _truncate(z, i.attrs["truncate"])


def _matmul(x: Int, y: Int) -> Int:
    """x @ y mod 2^64. Sums that float64 holds exactly are left to its fast products."""
    sizes = [int(np.abs(v).max(initial=0)) for v in (x, y)]
    if sizes[0] * sizes[1] * x.shape[-1] < EXACT:
        return np.asarray(x.astype(np.float64) @ y.astype(np.float64)).astype(np.int64)
    larger = int(sizes[1] > sizes[0])
    half = sizes[larger].bit_length() // 2
    top = (x, y)[larger] >> np.int64(half)
    rest = (x, y)[larger] - (top << np.int64(half))
    parts = [_matmul(x, p) if larger else _matmul(p, y) for p in (top, rest)]
    return (parts[0] << np.int64(half)) + parts[1]


EXACT = 1 << 53
"""Integers below are exact in float64."""


def _conv(i: Instruction, x: Int, w: Int) -> Int:
    at = i.attrs
    top, left, bottom, right = at["pads"]
    (sh, sw), (dh, dw), g = at["strides"], at["dilations"], at["groups"]
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    n, _, oh, ow = i.value.shape
    total = np.zeros((n, g, w.shape[0] // g, oh * ow), np.int64)
    for r, c in np.ndindex(w.shape[2:]):
        seen = x[:, :, r * dh : r * dh + (oh - 1) * sh + 1 : sh]
        seen = seen[:, :, :, c * dw : c * dw + (ow - 1) * sw + 1 : sw]
        tap = w[:, :, r, c].reshape(g, w.shape[0] // g, -1)
        total += _matmul(tap, seen.reshape(n, g, -1, oh * ow))
    return total.reshape(i.value.shape)


def _pad(i: Instruction, xs: Sequence[Int]) -> Int:
    widths = list(zip(i.attrs["before"], i.attrs["after"], strict=True))
    return np.pad(xs[0], widths, constant_values=i.attrs["value"])


def _slice(i: Instruction, xs: Sequence[Int]) -> Int:
    at = i.attrs
    return xs[0][tuple(map(slice, at["starts"], at["stops"], at["steps"]))]


def _spectral(i: Instruction, xs: Sequence[Int]) -> Int:
    at = i.attrs
    angle = xs[0] * (2 * np.pi / 2.0 ** at["width"])
    total = np.zeros((*angle.shape, at["sums"]))
    rows = (np.reshape(at[name], (at["sums"], -1)).T for name in ("sine", "cosine"))
    for k, (a, b) in enumerate(zip(*rows, strict=True), 1):
        total += a * np.sin(k * angle)[..., None] + b * np.cos(k * angle)[..., None]
    lowered = np.ldexp(total, max(at["waves"]) - at["truncate"])
    rounded: Int = np.rint(lowered).astype(np.int64).reshape(i.value.shape)
    return rounded


def _combine(i: Instruction, xs: Sequence[Int]) -> Int:
    at, (x,) = i.attrs, xs
    indices, factors = (np.asarray(at[k], np.int64).reshape(at["taps"], -1) for k in _COMBINED)
    along = (-1, *[1] * (x.ndim - 1 - at["axis"]))
    total = np.zeros(i.value.shape, np.int64)
    for index, factor in zip(indices, factors, strict=True):
        total += np.take(x, index, axis=at["axis"]) * factor.reshape(along)
    return total


_COMBINED = ("indices", "factors")


def _wrap(i: Instruction, xs: Sequence[Int]) -> Int:
    half = np.int64(1 << (i.attrs["bits"] - 1))
    return ((xs[0] + half) & (2 * half - 1)) - half


_TABLE: Mapping[str, Callable[[Instruction, Sequence[Int]], Int]] = {
    "constant": lambda i, xs: np.array(i.attrs["values"], np.int64).reshape(i.value.shape),
    "add": lambda i, xs: xs[0] + xs[1],
    "sub": lambda i, xs: xs[0] - xs[1],
    "scale": lambda i, xs: xs[0] * np.int64(i.attrs["factor"]),
    "offset": lambda i, xs: xs[0] + np.int64(i.attrs["value"]),
    "shift": lambda i, xs: _truncate(xs[0], i.attrs["bits"]),
    "reshape": lambda i, xs: xs[0].reshape(i.value.shape),
    "transpose": lambda i, xs: xs[0].transpose(i.attrs["perm"]),
    "slice": _slice,
    "concat": lambda i, xs: np.concatenate(xs, axis=i.attrs["axis"]),
    "pad": _pad,
    "expand": lambda i, xs: np.broadcast_to(xs[0], i.value.shape),
    "gather": lambda i, xs: np.take(xs[0], np.asarray(i.attrs["indices"]), axis=i.attrs["axis"]),
    "combine": _combine,
    "sum": lambda i, xs: np.sum(xs[0], axis=tuple(i.attrs["axes"]), dtype=np.int64),
    "wrap": _wrap,
    "odd": lambda i, xs: xs[0] & 1,
    "xor": lambda i, xs: np.bitwise_xor.reduce(xs) ^ np.int64(i.attrs["flip"]),
    "mul": lambda i, xs: _product(i, xs[0] * xs[1], xs),
    "matmul": lambda i, xs: _product(i, _matmul(xs[0], xs[1]), xs),
    "conv": lambda i, xs: _product(i, _conv(i, xs[0], xs[1]), xs),
    "sign": lambda i, xs: (xs[0] < 0).astype(np.int64),
    "all": lambda i, xs: np.logical_and.reduce(
        [x == w for x, w in zip(xs, i.attrs["when"], strict=True)]
    ).astype(np.int64),
    "select": lambda i, xs: np.asarray(
        sum(
            np.where(b == i.attrs["when"], x, np.int64(0))
            for b, x in zip(xs[::2], xs[1::2], strict=True)
        )
    ),
    "rectify": lambda i, xs: np.maximum(xs[0], 0),
    "tally": lambda i, xs: np.tensordot(np.asarray(i.attrs["values"], np.int64), xs[0], 1),
    "extend": lambda i, xs: xs[0],
    "spectral": _spectral,
}
