"""The instruction table: for each op its attributes, shape rule, width rule and cost.

Three groups, and nothing else exists in a plan:

    sources     input · weight · constant
    local       act on Δ and on each mask share alike: no rounds, no bytes
    interactive product (mul, matmul, conv) · sign · all · select · rectify · tally · extend ·
                spectral:
                masked values are exchanged

A value is a number, or a bit: 0 or 1, shared mod 2. BIT_MOVES act on both; `xor` joins bits.

An operand wider than an instruction's working width is reduced on the fly: dropping high bits
is free and exact (mod 2^m' for any m' > bound).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

Shape = tuple[int, ...]
Attrs = Mapping[str, Any]


def packed_bytes(count: int, width: int) -> int:
    """Bytes of `count` values of `width` bits packed back to back, padded to a whole byte."""
    return (count * width + 7) // 8


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one instruction: bytes each way per alice↔bob round, and bytes carol deals to bob."""

    rounds: tuple[int, ...] = ()
    dealt: int = 0


@dataclass(frozen=True, slots=True)
class OpSpec:
    """One line of the table. `shape(operand shapes, attrs)` raises ValueError when they do not fit.

    `attrs` are required names. `cost(output's size, its width, attrs, number of operands)`.
    """

    arity: tuple[int, int]
    shape: Callable[[Sequence[Shape], Attrs], Shape] | None
    attrs: tuple[str, ...] = ()
    local: bool = False
    cost: Callable[[int, int, Attrs, int], Cost] = field(default=lambda *_: Cost())

    @property
    def interactive(self) -> bool:
        """Whether the servers talk: all that is neither a source nor local."""
        return self.arity[0] > 0 and not self.local


def _same(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    return shapes[0]


def _broadcast(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    return np.broadcast_shapes(*shapes)


def _reshape(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    shape = tuple(attrs["shape"])
    if prod(shape) != prod(shapes[0]):
        raise ValueError(f"cannot reshape {shapes[0]} to {shape}")
    return shape


def _transpose(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    if sorted(attrs["perm"]) != list(range(len(shapes[0]))):
        raise ValueError(f"perm {attrs['perm']} does not permute {shapes[0]}")
    return tuple(shapes[0][i] for i in attrs["perm"])


def _slice(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    (shape,) = shapes
    if not len(attrs["starts"]) == len(attrs["stops"]) == len(attrs["steps"]) == len(shape):
        raise ValueError(f"slice of {shape} needs {len(shape)} starts, stops and steps")
    out = []
    for d, start, stop, step in zip(
        shape, attrs["starts"], attrs["stops"], attrs["steps"], strict=True
    ):
        if not (0 <= start <= stop <= d and step >= 1):
            raise ValueError(f"slice {start}:{stop}:{step} of an axis of {d}")
        out.append(len(range(start, stop, step)))
    return tuple(out)


def _concat(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    axis = attrs["axis"]
    first = list(shapes[0])
    for s in shapes[1:]:
        if len(s) != len(first) or any(
            i != axis and a != b for i, (a, b) in enumerate(zip(s, first, strict=True))
        ):
            raise ValueError(f"cannot concat {shapes} on axis {axis}")
    first[axis] = sum(s[axis] for s in shapes)
    return tuple(first)


def _pad(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    before, after = attrs["before"], attrs["after"]
    if not len(before) == len(after) == len(shapes[0]) or min([*before, *after, 0]) < 0:
        raise ValueError(f"pad {before}, {after} of {shapes[0]}")
    return tuple(d + b + a for d, b, a in zip(shapes[0], before, after, strict=True))


def _expand(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    shape = tuple(attrs["shape"])
    if np.broadcast_shapes(shapes[0], shape) != shape:
        raise ValueError(f"cannot expand {shapes[0]} to {shape}")
    return shape


def _gather(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    (shape,), axis, indices = shapes, attrs["axis"], attrs["indices"]
    _within(indices, axis, shape)
    return (*shape[:axis], len(indices), *shape[axis + 1 :])


def _combine(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    (shape,), axis, taps = shapes, attrs["axis"], attrs["taps"]
    if not 1 <= taps <= len(attrs["indices"]) or len(attrs["indices"]) % taps:
        raise ValueError(f"{len(attrs['indices'])} indices for {taps} taps")
    if len(attrs["factors"]) != len(attrs["indices"]):
        raise ValueError(f"{len(attrs['factors'])} factors for {len(attrs['indices'])} indices")
    _within(attrs["indices"], axis, shape)
    return (*shape[:axis], len(attrs["indices"]) // taps, *shape[axis + 1 :])


def _within(indices: Sequence[int], axis: int, shape: Shape) -> None:
    if not 0 <= axis < len(shape):
        raise ValueError(f"no axis {axis} in {shape}")
    array = np.asarray(indices)
    if array.size and (array.min() < 0 or array.max() >= shape[axis]):
        raise ValueError(f"index outside axis {axis} of {shape}")


def _sum(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    return tuple(d for i, d in enumerate(shapes[0]) if i not in attrs["axes"])


def _constant(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    if len(attrs["values"]) != prod(attrs["shape"]):
        raise ValueError(f"{len(attrs['values'])} values for shape {attrs['shape']}")
    return tuple(attrs["shape"])


def _with_addend(rule: Callable[[Sequence[Shape], Attrs], Shape]) -> Any:
    def shape(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
        out = rule(shapes[:2], attrs)
        if len(shapes) == 3 and np.broadcast_shapes(out, shapes[2]) != out:
            raise ValueError(f"addend {shapes[2]} does not broadcast to {out}")
        return out

    return shape


def _matmul(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    a, b = shapes
    if len(a) < 2 or len(b) < 2 or a[-1] != b[-2]:
        raise ValueError(f"matmul of {a} and {b}")
    return (*np.broadcast_shapes(a[:-2], b[:-2]), a[-2], b[-1])


def conv_output_size(size: int, kernel: int, stride: int, dilation: int, pad: int) -> int:
    """Output length of a convolution along one axis; `pad` is the sum of both sides."""
    return (size + pad - dilation * (kernel - 1) - 1) // stride + 1


def _conv(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    x, w = shapes
    groups = attrs["groups"]
    if len(x) != 4 or len(w) != 4 or x[1] != w[1] * groups or w[0] % groups:
        raise ValueError(f"conv of {x} by {w} in {groups} groups")
    top, left, bottom, right = attrs["pads"]
    (sh, sw), (dh, dw) = attrs["strides"], attrs["dilations"]
    height = conv_output_size(x[2], w[2], sh, dh, top + bottom)
    width = conv_output_size(x[3], w[3], sw, dw, left + right)
    if min(height, width) < 1:
        raise ValueError(f"conv of {x} by {w} has an empty output")
    return x[0], w[0], height, width


def _product_cost(size: int, width: int, attrs: Attrs, operands: int) -> Cost:
    return Cost((packed_bytes(size, width),), packed_bytes(size, attrs["ring"]))


def combine_monomials(count: int, with_eq: bool) -> int:
    """Dealt monomials that merge `count` chunks (see `protocol.primitives.sign`).

    The masks themselves come from the pairwise PRGs, so only products of two or more are dealt.
    """
    eqs = count if with_eq else count - 1
    products = (1 << eqs) - 1 - eqs
    lts: int = sum((1 << (count - 1 - j)) - 1 for j in range(count - 1))
    return products + lts


def sign_levels(attrs: Attrs) -> list[list[int]]:
    """Chunk counts merged at each level: `groups` partitions the chunks; one group is one level."""
    groups = list(attrs["groups"])
    levels = [groups] if len(groups) == 1 else [groups, [len(groups)]]
    return [level for level in levels if max(level) > 1]


def combine_planes(count: int, with_eq: bool) -> int:
    """Bits per element and way that merging `count` chunks opens."""
    return 0 if count == 1 else 2 * (count - 1) + (1 if with_eq else 0)


def needs_eq(level: Sequence[int], group: int) -> bool:
    """Whether a group's equality is wanted by the next level: all but the lowest group's."""
    return len(level) > 1 and group > 0


def _sign_cost(size: int, width: int, attrs: Attrs, operands: int) -> Cost:
    plane = packed_bytes(size, 1)
    opened, dealt = [], sum(2**c - 1 for c in attrs["chunks"]) + 1
    for level in sign_levels(attrs):
        merges = [(count, needs_eq(level, g)) for g, count in enumerate(level) if count > 1]
        opened.append(sum(combine_planes(*m) for m in merges))
        dealt += sum(combine_monomials(*m) for m in merges)
    return Cost((*(o * plane for o in opened), plane), dealt * plane)


def _select_cost(size: int, width: int, attrs: Attrs, operands: int) -> Cost:
    dealt = packed_bytes(2 * size, width) * len(attrs["widths"])
    dealt += sum(packed_bytes(3 * size, max(width - read, 0)) for read in attrs["widths"])
    return Cost((packed_bytes(size, width),), dealt)


def rectify_products(chunks: int) -> int:
    """Products of masks of a comparison's lower outcomes: see `protocol.primitives.rectify`."""
    return int(3 * 2 ** (chunks - 1) - 2)


def _rectify_cost(size: int, width: int, attrs: Attrs, operands: int) -> Cost:
    chunks, plane = attrs["chunks"], packed_bytes(size, 1)
    m, products = sum(chunks) + 1, rectify_products(len(chunks))
    dealt = (sum(2**c - 1 for c in chunks) + 1) * plane
    for count in (1, products):
        dealt += packed_bytes(2 * count * size, width)
    dealt += packed_bytes(3 * size, width - m) + packed_bytes(products * size, width - m)
    return Cost(((2 * len(chunks) - 1) * plane, packed_bytes(size, width)), dealt)


def _choose(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    if len(shapes) % 2 or len(set(shapes)) != 1:
        raise ValueError(f"select pairs bits with values of one shape, got {shapes}")
    if "widths" in attrs and 2 * len(attrs["widths"]) != len(shapes):
        raise ValueError(f"select of {len(shapes) // 2} pairs with widths {attrs['widths']}")
    return shapes[0]


def _all(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    if len(set(shapes)) != 1 or len(attrs["when"]) != len(shapes):
        raise ValueError(f"all needs bits of one shape and a value for each, got {shapes}")
    return shapes[0]


def _all_cost(size: int, width: int, attrs: Attrs, operands: int) -> Cost:
    plane = packed_bytes(size, 1)
    return Cost((plane,), ((1 << operands) - 1 - operands) * plane)


def _tally(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    if not shapes[0] or len(attrs["values"]) != shapes[0][0]:
        raise ValueError(f"tally of {shapes[0]} by {len(attrs['values'])} values")
    return shapes[0][1:]


def _tally_cost(size: int, width: int, attrs: Attrs, operands: int) -> Cost:
    return Cost((packed_bytes(size, width),), packed_bytes(len(attrs["values"]) * size, width))


def _alike(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    if len(set(shapes)) != 1:
        raise ValueError(f"xor needs bits of one shape, got {shapes}")
    return shapes[0]


def _extend_cost(size: int, width: int, attrs: Attrs, operands: int) -> Cost:
    return Cost((packed_bytes(size, width),), 2 * packed_bytes(size, width - attrs["width"]))


MANY = 1 << 20
"""More operands than any instruction has."""

MAX_ALL = 8
"""Bits that one `all` joins: it deals 2^8 − 9 products of their masks."""


def wave_rings(attrs: Attrs) -> list[int]:
    """Bits in which each harmonic's waves are shared: what they lack of the finest scale, less."""
    finest = max(attrs["waves"])
    return [attrs["ring"] - (finest - bits) for bits in attrs["waves"]]


def _spectral(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    return shapes[0] if attrs["sums"] == 1 else (*shapes[0], attrs["sums"])


def _spectral_cost(size: int, width: int, attrs: Attrs, operands: int) -> Cost:
    pairs = 2 * size // attrs["sums"]
    dealt = sum(packed_bytes(pairs, bits) for bits in wave_rings(attrs))
    return Cost((packed_bytes(size, width),), dealt)


_PRODUCT = ("ring", "truncate")

OPS: Mapping[str, OpSpec] = {
    "input": OpSpec((0, 0), None, ("name",)),
    "weight": OpSpec((0, 0), None, ("name",)),
    "constant": OpSpec((0, 0), _constant, ("shape", "values")),
    "add": OpSpec((2, 2), _broadcast, local=True),
    "sub": OpSpec((2, 2), _broadcast, local=True),
    "scale": OpSpec((1, 1), _same, ("factor",), local=True),
    "offset": OpSpec((1, 1), _same, ("value",), local=True),
    "shift": OpSpec((1, 1), _same, ("bits",), local=True),
    "reshape": OpSpec((1, 1), _reshape, ("shape",), local=True),
    "transpose": OpSpec((1, 1), _transpose, ("perm",), local=True),
    "slice": OpSpec((1, 1), _slice, ("starts", "stops", "steps"), local=True),
    "concat": OpSpec((1, MANY), _concat, ("axis",), local=True),
    "pad": OpSpec((1, 1), _pad, ("before", "after", "value"), local=True),
    "expand": OpSpec((1, 1), _expand, ("shape",), local=True),
    "gather": OpSpec((1, 1), _gather, ("axis", "indices"), local=True),
    "combine": OpSpec((1, 1), _combine, ("axis", "taps", "indices", "factors"), local=True),
    "sum": OpSpec((1, 1), _sum, ("axes",), local=True),
    "wrap": OpSpec((1, 1), _same, ("bits",), local=True),
    "odd": OpSpec((1, 1), _same, local=True),
    "xor": OpSpec((1, MANY), _alike, ("flip",), local=True),
    "mul": OpSpec((2, 3), _with_addend(_broadcast), _PRODUCT, cost=_product_cost),
    "matmul": OpSpec((2, 3), _with_addend(_matmul), _PRODUCT, cost=_product_cost),
    "conv": OpSpec(
        (2, 3),
        _with_addend(_conv),
        (*_PRODUCT, "strides", "pads", "dilations", "groups"),
        cost=_product_cost,
    ),
    "sign": OpSpec((1, 1), _same, ("chunks", "groups"), cost=_sign_cost),
    "rectify": OpSpec((1, 1), _same, ("chunks",), cost=_rectify_cost),
    "all": OpSpec((2, MAX_ALL), _all, ("when",), cost=_all_cost),
    "select": OpSpec((2, MANY), _choose, ("when", "nonnegative", "widths"), cost=_select_cost),
    "tally": OpSpec((1, 1), _tally, ("values",), cost=_tally_cost),
    "extend": OpSpec((1, 1), _same, ("width",), cost=_extend_cost),
    "spectral": OpSpec(
        (1, 1),
        _spectral,
        ("width", "ring", "truncate", "bits", "waves", "sums", "sine", "cosine"),
        cost=_spectral_cost,
    ),
}
"""`sign(x)` is the bit [x < 0]; `chunks`: bits per chunk, low to high, in all working width − 1;
`groups`: how many consecutive chunks merge at the first level. `rectify(x)` is max(x, 0), read mod
2**(1 + the sum of `chunks`), of which there are two or more. `all(bits…)` is the bit [every bit
equals its `when`]. `xor(bits…)` is their sum mod 2, and `flip`. `odd(x)` is the lowest bit of an
integer, `wrap(x)` the integer y with −2**(`bits` − 1) ≤ y < 2**(`bits` − 1) that equals x mod
2**`bits`; its bound is `bits` − 1 although −2**bound is possible. `tally(bit)` is the sum of the
public `values` whose bit is set, along the first axis. `select(bit, x, …)` is the sum of the x
where bit = `when`, of which at most one may hold, or any number if `many`; `nonnegative` promises
x ≥ 0 where selected. `extend` reads x mod 2**`width`, `select` each x mod 2**its own of `widths`;
both write mod 2**value.width.
Products are computed mod 2**`ring`,
divided by 2**`truncate` with stochastic rounding, and opened at value.width ≤ ring − truncate; an
optional third operand is added before the truncation. `spectral(x)` is Σ_k sine[k−1]·sin(kωx) +
cosine[k−1]·cos(kωx), ω one turn per 2**`width` ulp, coefficients over 2**`bits`, waves over
2**`waves`[k−1]; it is truncated and opened as a product is. Of several `sums` of the same waves
each has a row of coefficients, and a place along a new last axis. `combine(x)` is a product by a
public matrix along `axis`: element k is Σ_t `factors`[t, k]·x[`indices`[t, k]], of both tables
`taps` rows."""

BIT_MOVES = ("reshape", "transpose", "slice", "concat", "expand", "gather")
"""Local ops that put words elsewhere, bits as well as numbers."""

PRODUCTS = ("mul", "matmul", "conv")
BITS = ("sign", "all", "xor", "odd")
"""Ops whose value is a bit, whatever they read."""
