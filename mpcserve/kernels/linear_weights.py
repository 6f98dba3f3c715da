"""Weights in the order in which the kernels of `linear` read them: packed once, used many times."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import numpy as np

from mpcserve.kernels.linear_bilinear import PLANES, Bilinear, weigh
from mpcserve.kernels.linear_micro import KC, aligned
from mpcserve.kernels.linear_panels import ROWS, lanes_of
from mpcserve.ring import Words


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A weight in the order in which the kernels read it; made by pack_matmul_b and pack_conv_w.

    The order is that of this machine's kernels: it lives as long as the process, not in files.
    """

    shape: tuple[int, ...]
    groups: int  # of a convolution; 0 for the right operand of a matmul
    words: Words = field(repr=False)
    by: Bilinear | None = field(default=None, repr=False)  # computes with fewer products

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """uint64 or uint32."""
        return self.words.dtype

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(self.words.nbytes)


def pack_matmul_b(b: Words) -> Packed:
    """The right operand of a matmul, [..., k, n], for many products."""
    check_types(b.dtype)
    *lead, deep, wide = b.shape
    lanes = lanes_for(b)
    return Packed(b.shape, 0, _pack(b.reshape(prod(lead), deep, wide), lanes, lanes))


def pack_conv_w(w: Words, groups: int, by: Bilinear | None = None) -> Packed:
    """The weight of a convolution, [O, C / groups, kh, kw], for many products.

    `by`: with strides and dilations of 1 and 3×3 taps, by fewer products. It takes four times the
    memory, and the results are right mod 2^(bits − by.spare).
    """
    check_types(w.dtype)
    assert w.shape[0] % groups == 0
    if by:
        planes = weigh(w, by).reshape(PLANES, groups, -1, w.shape[1]).transpose(1, 0, 3, 2)
        return Packed(w.shape, groups, _pack(planes.reshape(-1, *planes.shape[2:]), ROWS, 1), by)
    rows = w.reshape(groups, w.shape[0] // groups, prod(w.shape[1:]))
    return Packed(w.shape, groups, _pack(rows.swapaxes(1, 2), ROWS, 1))


def _pack(source: Words, lanes: int, fill: int) -> Words:
    """[items, deep, wide] → KC rows after KC rows, panel by panel of `lanes` columns.

    A last panel of fewer columns is filled up to a multiple of `fill`.
    """
    items, deep, wide = source.shape
    full = wide // lanes
    whole, rest = full * lanes, wide % lanes
    last = -(-rest // fill) * fill
    packed = aligned(items * deep * (whole + last), source.dtype)
    out = packed.reshape(items, deep * (whole + last))
    for k0 in range(0, deep, KC):
        depth = min(KC, deep - k0)
        rows, block = source[:, k0 : k0 + depth], out[:, : depth * (whole + last)]
        panels = block[:, : whole * depth].reshape(items, full, depth, lanes)
        panels[...] = rows[..., :whole].reshape(items, depth, full, lanes).swapaxes(1, 2)
        cut = block[:, whole * depth :].reshape(items, depth, last)
        cut[..., :rest], cut[..., rest:] = rows[..., whole:], 0
        out = out[:, depth * (whole + last) :]
    return packed


def check_types(*dtypes: np.dtype[np.unsignedinteger]) -> None:
    """Are these the dtypes of the operands of one product?"""
    assert dtypes.count(dtypes[0]) == len(dtypes), f"operands of different dtypes: {dtypes}"
    assert dtypes[0] in (np.uint64, np.uint32), f"neither uint64 nor uint32: {dtypes[0]}"


def lanes_for(b: Words | Packed) -> int:
    """Columns of a panel of a right operand; a single column is packed as it is."""
    return lanes_of(b.dtype) if b.shape[-1] > 1 else 1
