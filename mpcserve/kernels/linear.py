"""Matrix products and convolutions: mod 2^64 on uint64 arrays, mod 2^32 on uint32 arrays.

All arrays of a product are of one dtype. Callers with a narrower ring mask the result; who says so,
by `ring`, may get other bits above it. Each product
also exists as an iterator over tiles, front to back, for a caller who works on and sends what is
finished while it lies in the cache, before the rest is computed. An operand that is used many times
is packed once. Which code runs, in which order and for how long depends on shapes alone, never on
values. Calls share no scratch memory and release the GIL.

A convolution by a packed weight of 3×3 taps can be computed by fewer products (`linear_bilinear`):
then it is right mod 2^(bits − 2) or mod 2^bits, as the weight was packed.

Memory: outside the output, at most SOURCE_WORDS words for a padded copy of a convolution's input,
or SPREAD_BYTES for its spread patches (more only if one row of either needs more), and about a
megabyte. Tables of indices, which follow from shapes, are kept for the next call: one or two
megabytes for a usual model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod
from typing import Any

import numpy as np

from mpcserve.kernels import linear_micro as micro
from mpcserve.kernels.linear_bilinear import PLANES, Bilinear
from mpcserve.kernels.linear_image import (
    TABLES,
    Band,
    Geometry,
    Source,
    geometry_of,
    grid,
    prepare,
)
from mpcserve.kernels.linear_micro import KC, Index, aligned, scratch_words
from mpcserve.kernels.linear_panels import ROWS, lanes_of
from mpcserve.kernels.linear_patches import Layout
from mpcserve.kernels.linear_runs import ROWS_MAX, Runs, multiply_runs, scratch_for
from mpcserve.kernels.linear_weights import (
    Packed,
    check_types,
    lanes_for,
)
from mpcserve.kernels.tasks import Run, Task, one_by_one
from mpcserve.ring import WORD_BITS, Words

TILE_OUTPUTS = 1 << 17  # words of output that are worth sending on their own …
TILE_PRODUCTS = 1 << 26  # … or a few milliseconds of work, whichever is less, but not below
TILE_ROWS = 36  # this many rows: fewer would gather a panel for too little work; of ROWS a multiple

_Tile = tuple[int, int, int, int]  # items first : last, and of each its rows first : last

Tile = tuple[int, Words]
"""(index, words): the words of a flat product from an index on, until the next tile is asked for.
"""


@dataclass(slots=True, eq=False)
class _Left:
    """Word (i, k) of left operand t is words[at[t] + i·row_step + k·col_step], or packed."""

    words: Words
    at: Index
    row_step: int
    col_step: int
    packed: bool


@dataclass(slots=True, eq=False)
class _Right:
    """Word (k, p) of right operand t is words[at[t] + offs[k] + base[p]], or packed."""

    words: Words
    at: Index
    deep: int
    wide: int
    offs: Index
    base: Index
    packed: bool
    column: bool  # a single one, whose words are neighbours
    runs: Runs | None = None  # of columns that are neighbours


@dataclass(slots=True, eq=False)
class _Out:
    """Row i of product t goes to words[at[t] + i·step :]; a product has so many rows.

    Of its words the low `bits` count.
    """

    words: Words
    at: Index
    step: int
    rows: int
    bits: int


class _Room:
    """Where a product is written: the whole of it, or one tile after another in the same place.

    With `apart` every tile has a place of its own, since some are computed ahead of others.
    """

    __slots__ = ("_apart", "_scratch", "_words", "whole")

    def __init__(self, whole: Words | None, apart: bool = False) -> None:
        self.whole, self._apart = whole is not None, apart
        self._words, self._scratch = whole, np.empty(0, np.uint64)

    def take(self, start: int, stop: int, dtype: np.dtype[Any]) -> tuple[Words, int]:
        """Room for words start:stop, and which word of the product lies first in it."""
        if self.whole:
            assert self._words is not None
            return self._words, 0
        if self._apart:
            return np.empty(stop - start, dtype), start
        if self._words is None or self._words.size < stop - start:
            self._words = np.empty(stop - start, dtype)
        return self._words[: stop - start], start

    def scratch(self, size: int, dtype: np.dtype[Any]) -> Words:
        """Words for what several tiles read, until they are asked for again: given back to the
        system and taken anew, megabytes would be faulted in page by page."""
        if self._apart:
            return aligned(size, dtype)
        if self._scratch.dtype != dtype or self._scratch.size < size:
            self._scratch = aligned(size, dtype)
        return self._scratch[:size]

    def zeros(self, size: int, dtype: np.dtype[Any]) -> Words:
        """All of the product where it is nothing but zeros."""
        words, _ = self.take(0, size, dtype)
        words[...] = 0
        return words


def matmul(a: Words, b: Words | Packed, *, ring: int = WORD_BITS) -> Words:
    """a @ b mod 2^ring.

    Shapes: [..., m, k] and [..., k, n] → [..., m, n]; leading dimensions broadcast.
    """
    shape = _matmul_shape(a.shape, b.shape)
    if isinstance(b, Packed) and (form := _form_of(a, b, ring)):
        return _in_one_go(a, b, form).reshape(shape)
    out = np.empty(shape, a.dtype)
    for task in _matmul(a, b, _Room(out.reshape(-1)), ring):
        task()
    return out


def matmul_tiles(
    a: Words, b: Words | Packed, run: Run = one_by_one, *, ring: int = WORD_BITS
) -> Iterator[Tile]:
    """matmul(a, b) front to back, tile by tile; `run` may compute some ahead."""
    if isinstance(b, Packed) and (form := _form_of(a, b, ring)):
        return iter(((0, _in_one_go(a, b, form)),))
    return run(_matmul(a, b, _Room(None, run is not one_by_one), ring))


def conv2d(
    x: Words,
    w: Words | Packed,
    strides: tuple[int, int] = (1, 1),
    pads: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilations: tuple[int, int] = (1, 1),
    groups: int = 1,
    *,
    ring: int = WORD_BITS,
) -> Words:
    """Cross-correlation of zero-padded images mod 2^ring, as ONNX Conv.

    pads: top, left, bottom, right.
    Shapes: x [N, C, H, W], w [O, C / groups, kh, kw] → [N, O, H', W'].
    """
    shape = geometry_of(x.shape, w.shape, strides, pads, dilations, groups)
    out = np.empty(shape.out_shape, x.dtype)
    for task in _conv2d(x, w, shape, _Room(out.reshape(-1)), ring):
        task()
    return out


def conv2d_tiles(
    x: Words,
    w: Words | Packed,
    strides: tuple[int, int],
    pads: tuple[int, int, int, int],
    dilations: tuple[int, int],
    groups: int,
    run: Run = one_by_one,
    *,
    ring: int = WORD_BITS,
) -> Iterator[Tile]:
    """conv2d(x, w, …) front to back, tile by tile."""
    shape = geometry_of(x.shape, w.shape, strides, pads, dilations, groups)
    return run(_conv2d(x, w, shape, _Room(None, run is not one_by_one), ring))


def _matmul_shape(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    assert len(a) >= 2 and len(b) >= 2 and a[-1] == b[-2], (a, b)
    if len(b) == 2:
        return (*a[:-1], b[-1])
    return (*np.broadcast_shapes(a[:-2], b[:-2]), a[-2], b[-1])


def _matmul(a: Words, b: Words | Packed, room: _Room, ring: int) -> Iterator[Task[Tile]]:
    check_types(a.dtype, b.dtype)
    shape = _matmul_shape(a.shape, b.shape)
    if prod(shape) == 0 or a.shape[-1] == 0:
        yield lambda: (0, room.zeros(prod(shape), a.dtype))
        return
    if len(b.shape) == 2 and a.ndim > 2:  # one right operand for all rows: one tall product
        a = a.reshape(-1, a.shape[-1])
        shape = (len(a), shape[-1])
    *lead, height, wide = shape
    left, right = _left_of(a, tuple(lead)), _right_of(b, tuple(lead))
    items, item = prod(lead), height * wide
    at = grid((items,), (item,))

    def fill(tile: _Tile) -> Tile:
        start, stop = tile[0] * item + tile[2] * wide, (tile[1] - 1) * item + tile[3] * wide
        words, shift = room.take(start, stop, a.dtype)
        out = _Out(words, at - shift if shift else at, wide, height, ring)
        _multiply(left, right, out, tile)
        return start, words

    for tile in _tiles(items, height, wide, a.shape[-1], room.whole):
        yield partial(fill, tile)


@dataclass(frozen=True, slots=True)
class _Form:
    """What `_in_one_go` tells the kernel: it follows from shapes."""

    outputs: int
    scratch: int
    in_strip: Index
    left: tuple[int, int, int]
    sizes: tuple[int, int, int, int, int, int]
    tile: _Tile


def _form_of(a: Words, b: Packed, ring: int) -> _Form | None:
    """Of rows that lie in order by a packed matrix, if there are so few that they are one tile.

    In a small model it takes longer to find the way to the kernel than the kernel takes.
    """
    if not (a.flags.c_contiguous and a.flags.aligned):
        return None
    check_types(a.dtype, b.dtype)
    assert a.shape[-1] == b.shape[-2], (a.shape, b.shape)
    return _small_form(a.size, b.shape, b.groups, b.dtype, ring)


@lru_cache(maxsize=TABLES)
def _small_form(
    size: int, shape: tuple[int, ...], groups: int, dtype: np.dtype[Any], ring: int
) -> _Form | None:
    assert groups == 0, "packed for conv2d"
    if len(shape) != 2 or shape[1] < 2 or not size:
        return None
    deep, wide = shape
    rows = size // deep
    tiles = list(_tiles(1, rows, wide, deep, False))
    if len(tiles) > 1:
        return None
    return _Form(
        rows * wide,
        scratch_words(dtype, rows, deep, True),
        grid((KC,), (lanes_of(dtype),)),
        (0, deep, 1),
        (1, deep, wide, rows, wide, ring),
        tiles[0],
    )


_FIRST = grid((), ())
_NONE = grid((0,), (0,))


def _in_one_go(a: Words, b: Packed, form: _Form) -> Words:
    """a @ b, flat."""
    out = np.empty(form.outputs, a.dtype)
    micro.multiply(
        a.reshape(-1), _FIRST, b.words, _FIRST, _NONE, _NONE, out, _FIRST,
        np.empty(form.scratch, a.dtype), form.in_strip, form.left, form.sizes, form.tile,
    )  # fmt: skip
    return out


def _conv2d(
    x: Words, w: Words | Packed, g: Geometry, room: _Room, ring: int
) -> Iterator[Task[Tile]]:
    check_types(x.dtype, w.dtype)
    if prod(g.out_shape) == 0 or g.deep == 0:
        yield lambda: (0, room.zeros(prod(g.out_shape), x.dtype))
        return
    x = _contiguous(x)
    if isinstance(w, Packed) and w.by:
        yield from _conv2d_by(x, w, w.by, g, room, ring)
        return
    channel, item = g.pixels, g.rows * g.pixels

    def fill(
        left: _Left, first: int, last: int, bands: Sequence[Band], only: Source | None, tile: _Tile
    ) -> Tile:
        start = (first + tile[0]) * item + tile[2] * channel
        stop = (first + tile[1] - 1) * item + tile[3] * channel
        words, shift = room.take(start, stop, x.dtype)
        for band in bands:
            source = only or prepare(x, g, first, last, band)
            offs, base = source.offs, source.base
            right = _Right(
                source.words,
                source.at,
                g.deep,
                len(base),
                offs,
                base,
                False,
                False,
                source.runs,
            )
            begin = first * item + band[0] * g.out_shape[3] - shift
            at = grid((last - first,), (item,)) + begin
            _multiply(left, right, _Out(words, at, channel, g.rows, ring), tile)
        return start, words

    for first, last, bands in g.chunks():
        left = _conv_left(w, g, first, last)
        only = prepare(x, g, first, last, bands[0]) if len(bands) == 1 else None
        for tile in _tiles(last - first, g.rows, channel, g.deep, room.whole):
            yield partial(fill, left, first, last, bands, only, tile)


def _conv2d_by(
    x: Words, w: Packed, by: Bilinear, g: Geometry, room: _Room, ring: int
) -> Iterator[Task[Tile]]:
    assert w.groups == g.groups, (w.groups, g.groups)
    assert (g.strides, g.dilations) == ((1, 1), (1, 1)), "packed for another convolution"
    layout, item = Layout(g, by, x.dtype), g.rows * g.pixels

    def spread(first: int, last: int, band: Band) -> Words:
        out = room.scratch(layout.spread_words(last - first, band), x.dtype)
        layout.spread(x, first, last, band, out)
        return out

    def fill(first: int, last: int, bands: list[Band], only: Words | None, rows: Band) -> Tile:
        start = first * item + rows[0] * g.pixels
        words, shift = room.take(start, (last - 1) * item + rows[1] * g.pixels, x.dtype)
        for band in bands:
            patches = spread(first, last, band) if only is None else only
            layout.multiply(w.words, patches, first, last, band, rows, words, start - shift, ring)
        return start, words

    products = PLANES * g.w_shape[1] // by.side**2
    for first, last, bands in layout.chunks():
        only = spread(first, last, bands[0]) if len(bands) == 1 else None
        whole = room.whole or last - first > 1
        least = TILE_ROWS * (1 if len(bands) == 1 else 2)  # each tile spreads the bands anew
        for _, _, row0, row1 in _tiles(1, g.rows, g.pixels, products, whole, least):
            yield partial(fill, first, last, bands, only, (row0, row1))


def _multiply(left: _Left, right: _Right, out: _Out, tile: _Tile) -> None:
    """One tile of left · right."""
    deep, dtype = right.deep, out.words.dtype
    if right.column and (left.col_step == 1 or deep == 1):
        micro.multiply_column(
            left.words, left.at, left.row_step, right.words, right.at, out.words, out.at, deep, tile
        )
        return
    if right.runs and tile[3] - tile[2] <= ROWS_MAX:
        steps = (1, out.rows) if left.packed else (left.row_step, left.col_step)
        sizes, room = (deep, out.step, int(right.base[0])), scratch_for(right.runs, dtype)
        multiply_runs(
            left.words, left.at, right.words, right.at, right.offs, out.words, out.at, room,
            steps, sizes, right.runs, tile,
        )  # fmt: skip
        return
    rows = 0 if left.packed else tile[3] - tile[2]
    scratch = np.empty(scratch_words(dtype, rows, deep, right.packed), dtype)
    micro.multiply(
        left.words, left.at, right.words, right.at, right.offs, right.base,
        out.words, out.at, scratch, grid((KC,), (lanes_of(dtype),)),
        (int(left.packed), left.row_step, left.col_step),
        (int(right.packed), deep, right.wide, out.rows, out.step, out.bits), tile,
    )  # fmt: skip


def _tiles(
    items: int, height: int, wide: int, deep: int, whole: bool, least: int = TILE_ROWS
) -> Iterator[_Tile]:
    """Items and rows that cover all items front to back; rows start at multiples of ROWS."""
    if whole:
        yield 0, items, 0, height
        return
    rows = max(least, min(TILE_OUTPUTS // wide, TILE_PRODUCTS // (wide * deep)) // ROWS * ROWS)
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
    return _Left(words, grid(lead, steps[:-2]), steps[-2], steps[-1], False)


def _right_of(b: Words | Packed, lead: tuple[int, ...]) -> _Right:
    deep, wide = b.shape[-2:]
    if isinstance(b, Packed):
        assert b.groups == 0, "packed for conv2d"
        words, steps = b.words, _item_steps(b, len(lead))
        if wide > 1:
            none = grid((0,), (0,))
            return _Right(words, grid(lead, steps), deep, wide, none, none, True, False)
        steps = (*steps, 1, 0)
    else:  # a single column is read as a row
        words, steps = _flat(_contiguous(b) if wide == 1 else b, (*lead, deep, wide))
    offs, base = grid((deep,), steps[-2:-1]), grid((wide,), steps[-1:])
    runs = (1, wide, wide) if steps[-1] == 1 else None
    return _Right(words, grid(lead, steps[:-2]), deep, wide, offs, base, False, wide == 1, runs)


def _item_steps(b: Packed, dimensions: int) -> tuple[int, ...]:
    """From one packed right operand to the next in each leading dimension, 0 if broadcast."""
    deep, wide = b.shape[-2:]
    lanes = lanes_for(b)
    steps, step = [0] * dimensions, deep * -(-wide // lanes) * lanes
    for axis, size in zip(reversed(range(dimensions)), reversed(b.shape[:-2]), strict=False):
        steps[axis] = step if size > 1 else 0
        step *= size
    return tuple(steps)


def _conv_left(w: Words | Packed, g: Geometry, first: int, last: int) -> _Left:
    at = _groups_at(first, last, g.groups, g.rows * g.deep)
    if isinstance(w, Packed):
        assert w.groups == g.groups, (w.groups, g.groups)
        return _Left(w.words, at, 0, 0, True)
    return _Left(_contiguous(w).reshape(-1), at, g.deep, 1, False)


@lru_cache(maxsize=TABLES)
def _groups_at(first: int, last: int, groups: int, apart: int) -> Index:
    """Where the kernels of items first : last begin."""
    at: Index = np.arange(first, last) % groups * apart
    at.flags.writeable = False
    return at


def _flat(x: Words, shape: tuple[int, ...]) -> tuple[Words, tuple[int, ...]]:
    """The memory of x as one vector, and the steps in words of x broadcast to the shape."""
    size = x.itemsize
    if not x.flags.aligned or any(s < 0 or s % size for s in x.strides):
        x = _contiguous(x)
    view = x if x.shape == shape else np.broadcast_to(x, shape)
    steps = tuple(s // size for s in view.strides)
    if x.flags.c_contiguous or x.size == 0:
        return x.reshape(-1), steps
    span = 1 + sum((d - 1) * s // size for d, s in zip(x.shape, x.strides, strict=True))
    return np.lib.stride_tricks.as_strided(x, (span,), (size,), writeable=False), steps


def _contiguous(x: Words) -> Words:
    return np.require(x, requirements=["C_CONTIGUOUS", "ALIGNED"])
