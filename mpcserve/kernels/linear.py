"""Matrix products and convolutions mod 2^64 on uint64 arrays.

Callers with a narrower ring mask the result. Each product also exists as an iterator that fills the
output front to back and says how far it is, so that a caller can send what is finished while the
rest is computed. An operand that is used many times is packed once. Which code runs, in which
order and for how long depends on shapes alone, never on values. Calls share no scratch memory and
release the GIL.

Memory: outside the output, at most SOURCE_WORDS words for a padded copy of a convolution's input
(more only if one output row of the image needs more) and about half a megabyte.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

import numpy as np

from mpcserve.kernels import linear_micro as micro
from mpcserve.kernels.linear_image import Geometry, geometry_of, prepare
from mpcserve.kernels.linear_micro import KC, LANES, ROWS, ROWS_L2, STRIP_WORDS, Index
from mpcserve.ring import Words

TILE_OUTPUTS = 1 << 16  # words of output that are worth sending on their own …
TILE_PRODUCTS = 1 << 25  # … or a few milliseconds of work, whichever is less, but not below
TILE_ROWS = 36  # this many rows: fewer would gather a panel for too little work; of ROWS a multiple

_Tile = tuple[int, int, int, int]  # items first : last, and of each its rows first : last


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A weight in the order in which the kernels read it; made by pack_matmul_b and pack_conv_w.

    The order is that of this machine's kernels: it lives as long as the process, not in files.
    """

    shape: tuple[int, ...]
    groups: int  # of a convolution; 0 for the right operand of a matmul
    words: Words = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(self.words.nbytes)


@dataclass(frozen=True, slots=True, eq=False)
class _Left:
    """Word (i, k) of left operand t is words[at[t] + i·row_step + k·col_step], or packed."""

    words: Words
    at: Index
    row_step: int
    col_step: int
    packed: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Right:
    """Word (k, p) of right operand t is words[at[t] + offs[k] + base[p]], or packed."""

    words: Words
    at: Index
    offs: Index
    base: Index
    packed: bool


def matmul(a: Words, b: Words | Packed) -> Words:
    """a @ b mod 2^64.

    Shapes: [..., m, k] and [..., k, n] → [..., m, n]; leading dimensions broadcast.
    """
    out = np.empty(_matmul_shape(a.shape, b.shape), np.uint64)
    for _ in _matmul(a, b, out, whole=True):
        pass
    return out


def matmul_tiles(a: Words, b: Words | Packed, out: Words) -> Iterator[int]:
    """Fill out with a @ b mod 2^64; yield after each tile how many leading words are final."""
    assert out.shape == _matmul_shape(a.shape, b.shape)
    return _matmul(a, b, out, whole=False)


def conv2d(
    x: Words,
    w: Words | Packed,
    strides: tuple[int, int] = (1, 1),
    pads: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilations: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Words:
    """Cross-correlation mod 2^64 of zero-padded images, as ONNX Conv.

    pads: top, left, bottom, right.
    Shapes: x [N, C, H, W], w [O, C / groups, kh, kw] → [N, O, H', W'].
    """
    shape = geometry_of(x.shape, w.shape, strides, pads, dilations, groups)
    out = np.empty(shape.out_shape, np.uint64)
    for _ in _conv2d(x, w, shape, out, whole=True):
        pass
    return out


def conv2d_tiles(
    x: Words,
    w: Words | Packed,
    strides: tuple[int, int],
    pads: tuple[int, int, int, int],
    dilations: tuple[int, int],
    groups: int,
    out: Words,
) -> Iterator[int]:
    """Fill out with conv2d(x, w, …); yield after each tile how many leading words are final."""
    shape = geometry_of(x.shape, w.shape, strides, pads, dilations, groups)
    assert out.shape == shape.out_shape
    return _conv2d(x, w, shape, out, whole=False)


def pack_matmul_b(b: Words) -> Packed:
    """The right operand of a matmul, [..., k, n], for many products."""
    *lead, deep, wide = b.shape
    right = _right_of(b, tuple(lead))
    item_words = deep * -(-wide // LANES) * LANES
    words = _aligned(len(right.at) * item_words)
    words[...] = 0
    for item, at in enumerate(right.at):
        micro.pack_right(right.words, int(at), right.offs, right.base, words, item * item_words)
    return Packed(b.shape, 0, words)


def pack_conv_w(w: Words, groups: int) -> Packed:
    """The weight of a convolution, [O, C / groups, kh, kw], for many products."""
    assert w.shape[0] % groups == 0
    rows, deep = w.shape[0] // groups, prod(w.shape[1:])
    flat = _contiguous(w).reshape(-1)
    words = _aligned(flat.size)
    for at in range(0, flat.size, max(1, rows * deep)):
        micro.pack_left(flat, at, rows, deep, words, at)
    return Packed(w.shape, groups, words)


def _matmul_shape(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    assert len(a) >= 2 and len(b) >= 2 and a[-1] == b[-2], (a, b)
    return (*np.broadcast_shapes(a[:-2], b[:-2]), a[-2], b[-1])


def _matmul(a: Words, b: Words | Packed, out: Words, whole: bool) -> Iterator[int]:
    assert a.dtype == out.dtype == np.uint64 and out.flags.carray
    if out.size == 0 or a.shape[-1] == 0:
        out[...] = 0
        yield out.size
        return
    if len(b.shape) == 2 and a.ndim > 2:  # one right operand for all rows: one tall product
        a, out = a.reshape(-1, a.shape[-1]), out.reshape(-1, out.shape[-1])
    *lead, height, wide = out.shape
    left, right = _left_of(a, tuple(lead)), _right_of(b, tuple(lead))
    flat, at = out.reshape(-1), np.arange(prod(lead)) * (height * wide)
    for tile in _tiles(len(at), height, wide, a.shape[-1], whole):
        _multiply(left, right, flat, at, wide, height, tile)
        yield (tile[1] - 1) * height * wide + tile[3] * wide


def _conv2d(x: Words, w: Words | Packed, g: Geometry, out: Words, whole: bool) -> Iterator[int]:
    assert x.dtype == out.dtype == np.uint64 and out.flags.carray
    if out.size == 0 or g.deep == 0:
        out[...] = 0
        yield out.size
        return
    x, flat = _contiguous(x), out.reshape(-1)
    channel, item = g.pixels, g.rows * g.pixels
    for first, last, bands in g.chunks():
        left = _conv_left(w, g, first, last)
        source = prepare(x, g, first, last, bands[0])
        for tile in _tiles(last - first, g.rows, channel, g.deep, whole):
            for band in bands:
                if len(bands) > 1:
                    source = prepare(x, g, first, last, band)
                right = _Right(source.words, source.at, source.offs, source.base, False)
                at = np.arange(first, last) * item + band[0] * g.out_shape[3]
                _multiply(left, right, flat, at, channel, g.rows, tile)
            yield (first + tile[1] - 1) * item + tile[3] * channel


def _multiply(
    left: _Left, right: _Right, out: Words, at: Index, step: int, height: int, tile: _Tile
) -> None:
    """One tile of left · right: row i of item t goes to out[at[t] + i · step :]."""
    rows = 0 if left.packed else min(ROWS_L2, height)
    depth = min(KC, len(right.offs))
    block, strip = np.empty(rows * depth, np.uint64), _aligned(STRIP_WORDS)
    micro.multiply(
        left.words, left.at, (int(left.packed), left.row_step, left.col_step),
        right.words, right.at, right.packed, right.offs, right.base,
        out, at, step, height, tile, block, strip, np.arange(0, depth * LANES, LANES),
    )  # fmt: skip


def _tiles(items: int, height: int, wide: int, deep: int, whole: bool) -> Iterator[_Tile]:
    """Items and rows that cover all items front to back; rows start at multiples of ROWS."""
    if whole:
        yield 0, items, 0, height
        return
    rows = max(TILE_ROWS, min(TILE_OUTPUTS // wide, TILE_PRODUCTS // (wide * deep)) // ROWS * ROWS)
    if rows >= height:
        several = rows // height
        for item in range(0, items, several):
            yield item, min(items, item + several), 0, height
        return
    for item in range(items):
        for row in range(0, height, rows):
            yield item, item + 1, row, min(height, row + rows)


def _left_of(a: Words, lead: tuple[int, ...]) -> _Left:
    words, steps = _flat(a, (*lead, *a.shape[-2:]))
    return _Left(words, _offsets(lead, steps), steps[-2], steps[-1], False)


def _right_of(b: Words | Packed, lead: tuple[int, ...]) -> _Right:
    deep, wide = b.shape[-2:]
    if isinstance(b, Packed):
        assert b.groups == 0, "packed for conv2d"
        words, own = b.words, b.shape[:-2]
        item_words = deep * -(-wide // LANES) * LANES
        starts = np.arange(prod(own)).reshape(own) * item_words
        at = np.broadcast_to(starts, lead).flatten()
        return _Right(words, at, np.arange(deep), np.arange(wide), True)
    words, steps = _flat(b, (*lead, deep, wide))
    offs, base = np.arange(deep) * steps[-2], np.arange(wide) * steps[-1]
    return _Right(words, _offsets(lead, steps), offs, base, False)


def _conv_left(w: Words | Packed, g: Geometry, first: int, last: int) -> _Left:
    at = np.arange(first, last) % g.groups * (g.rows * g.deep)
    if isinstance(w, Packed):
        assert w.groups == g.groups, (w.groups, g.groups)
        return _Left(w.words, at, 0, 0, True)
    return _Left(_contiguous(w).reshape(-1), at, g.deep, 1, False)


def _flat(x: Words, shape: tuple[int, ...]) -> tuple[Words, tuple[int, ...]]:
    """The memory of x as one vector, and the steps in words of x broadcast to the shape."""
    assert x.dtype == np.uint64
    if not x.flags.aligned or any(s < 0 or s % 8 for s in x.strides):
        x = _contiguous(x)
    view = x if x.shape == shape else np.broadcast_to(x, shape)
    steps = tuple(s // 8 for s in view.strides)
    if x.flags.c_contiguous or x.size == 0:
        return x.reshape(-1), steps
    span = 1 + sum((d - 1) * s // 8 for d, s in zip(x.shape, x.strides, strict=True))
    return np.lib.stride_tricks.as_strided(x, (span,), (8,), writeable=False), steps


def _contiguous(x: Words) -> Words:
    return np.require(x, requirements=["C_CONTIGUOUS", "ALIGNED"])


def _offsets(lead: tuple[int, ...], steps: tuple[int, ...]) -> Index:
    """Where each item begins, in C order of its leading indices."""
    at = np.zeros(1, np.int64)
    for size, step in zip(lead, steps, strict=False):
        at = np.add.outer(at, np.arange(size) * step).reshape(-1)
    return at


def _aligned(words: int) -> Words:
    """Uninitialised, on a 64-byte boundary: no vector of a panel crosses a cache line."""
    raw = np.empty(words + 7, np.uint64)
    skip = -(raw.ctypes.data // 8) % 8
    return raw[skip : skip + words]
