"""The compiled half of `linear_bilinear`: spread patches, their products with kernels, the sums.

The patches of some images lie in blocks of `block` columns, one column a patch: for each of PLANES
planes a matrix [channels, columns] in the order in which `linear_micro` reads a packed right
operand. A block's products with some rows of the kernels stay in the L2 cache until summed.

Planes are an odd number of vectors apart. Powers of two would send the words of one patch to the
same few lines of a cache: that alone made it twice as slow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

from mpcserve.kernels.linear_bilinear import KARATSUBA, PLANES, POINTS, TAPS, TOOM, Bilinear, Terms
from mpcserve.kernels.linear_image import Band, Geometry, grid
from mpcserve.kernels.linear_micro import AT, IN, KC, OUT, Index, both, meet
from mpcserve.kernels.linear_panels import (
    LINE,
    ROWS,
    copy_lanes,
    kind_at,
    lanes_at,
    lanes_of,
    load,
    on_line,
    store,
    zero_at,
)
from mpcserve.kernels.places import Place, inline, on, part, place_of
from mpcserve.ring import Words

BLOCK_BYTES = 4 * LINE  # of a row of a block
ROWS_AT_ONCE = 48  # of ROWS a multiple; their products with a block are 442 KB of an L2 cache
SPREAD_BYTES = 1 << 24  # of the patches of a whole image, for several tiles of output to read …
BAND_BYTES = 1 << 22  # … or of a band of it, for one: they stay near, more only if a row needs more
POOLED_PATCHES, POOLED_OUTPUTS = 128, 1 << 18  # of several small images at once

_INDEX, _INT64 = ir.IntType(32), ir.IntType(64)


@dataclass(frozen=True, slots=True)
class _Lanes:
    """A vector of words, in code that is being written."""

    builder: ir.IRBuilder
    words: ir.Value

    def __add__(self, other: _Lanes) -> _Lanes:
        return _Lanes(self.builder, self.builder.add(self.words, other.words))

    def __sub__(self, other: _Lanes) -> _Lanes:
        return _Lanes(self.builder, self.builder.sub(self.words, other.words))

    def __rmul__(self, factor: int) -> _Lanes:
        factors = ir.Constant(self.words.type, [factor] * self.words.type.count)
        return _Lanes(self.builder, self.builder.mul(self.words, factors))


def _every(builder: ir.IRBuilder, words: ir.Value, first: int, step: int, count: int) -> _Lanes:
    """Words first, first + step, … of a longer vector."""
    order = [first + step * lane for lane in range(count)]
    undef = ir.Constant(words.type, ir.Undefined)
    mask = ir.Constant(ir.VectorType(_INDEX, count), order)
    return _Lanes(builder, builder.shuffle_vector(words, undef, mask))


def _joined(builder: ir.IRBuilder, parts: Terms) -> ir.Value:
    """Word 0 of each vector, then word 1 of each, …"""
    lanes, side = parts[0].words.type.count, len(parts)
    undef = ir.Constant(parts[0].words.type, ir.Undefined)
    words = [p.words for p in parts] + [undef] * (4 - side)
    both = ir.Constant(ir.VectorType(_INDEX, 2 * lanes), list(range(2 * lanes)))
    halves = [builder.shuffle_vector(*words[j : j + 2], both) for j in (0, 2)]
    order = [j * lanes + lane for lane in range(lanes) for j in range(side)]
    mask = ir.Constant(ir.VectorType(_INDEX, side * lanes), order)
    return builder.shuffle_vector(*halves, mask)


def _spread_by(by: Bilinear) -> Any:
    @inline
    def spread(typingctx, image, row_words, out, plane):  # type: ignore[no-untyped-def]
        """out[q·plane + i] = word q of the spread patch with its corner at image[i·side]."""

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            kind = kind_at(image)
            row, step, place, apart = args
            wide, size = ir.VectorType(ir.IntType(kind.bits), kind.lanes * by.side), kind.bits // 8
            rows = []
            for _ in range(by.reach):
                here = load(builder, row, wide, size)
                after = builder.gep(row, [ir.Constant(_INT64, by.side)])
                next_patch = load(builder, after, wide, size)
                words = [_every(builder, here, j, by.side, kind.lanes) for j in range(by.side)]
                words += [_every(builder, next_patch, j, by.side, kind.lanes) for j in (0, 1)]
                rows.append(by.spread(words))
                row = builder.gep(row, [step])
            columns = [by.spread(column) for column in zip(*rows, strict=True)]
            for y in range(POINTS):
                for x in range(POINTS):
                    store(builder, columns[x][y].words, place, size)
                    place = builder.gep(place, [apart])
            return context.get_dummy_value()

        return types.void(image, row_words, out, plane), codegen

    return spread


def _sum_by(by: Bilinear) -> Any:
    @inline
    def total(typingctx, products, plane, out, row_words):  # type: ignore[no-untyped-def]
        """Row y of the outputs of a vector of patches, patch after patch, to out[y·row_words :]."""

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            kind = kind_at(products)
            place, apart, to, step = args
            vector, size = kind.vector(), kind.bits // 8
            rows: list[list[_Lanes]] = [[] for _ in range(POINTS)]
            for y in range(POINTS):
                for _ in range(POINTS):
                    rows[y].append(_Lanes(builder, load(builder, place, vector, size)))
                    place = builder.gep(place, [apart])
            columns = [by.sums(column) for column in zip(*rows, strict=True)]
            for y in range(by.side):
                words = _joined(builder, by.sums([column[y] for column in columns]))
                spare = ir.Constant(words.type, [by.spare] * words.type.count)
                store(builder, builder.lshr(words, spare), to, size)
                to = builder.gep(to, [step])
            return context.get_dummy_value()

        return types.void(products, plane, out, row_words), codegen

    return total


_spread3, _spread4 = _spread_by(KARATSUBA), _spread_by(TOOM)
_sum3, _sum4 = _sum_by(KARATSUBA), _sum_by(TOOM)


@part
def _copy(source: Place, to: Place, count: int) -> None:
    """`count` words, in whole vectors if there are as many: the last overlaps the one before."""
    lanes = lanes_at(to)
    if count >= lanes:
        for k in range(0, count - lanes, lanes):
            copy_lanes(on(source, k), on(to, k))
        copy_lanes(on(source, count - lanes), on(to, count - lanes))
    else:
        for k in range(count):
            to[k] = source[k]


@part
def _vectors(words: int, lanes: int) -> int:
    """Words of as many vectors as hold so many."""
    return (words + lanes - 1) // lanes * lanes


@part
def _odd(words: int, lanes: int) -> int:
    """The same, but of an odd number of vectors."""
    return ((words + lanes - 1) // lanes | 1) * lanes


@both(IN, OUT, OUT, "UniTuple(int64, 14)")
def spread_patches(image: Words, out: Words, scratch: Words, sizes: tuple[int, ...]) -> None:
    """Rows first:last of the patches of some images, spread.

    sizes: side, images, where the first begins, channels, height, width, padding above and left,
    first, last, patches in a row, block, words of a padded row, words of a padded image.
    """
    side, images, start, channels, height, width, top, left = sizes[:8]
    first, last, across, block, row_words, image_words = sizes[8:]
    padded = on_line(place_of(scratch, 0))
    lanes, zero, patches = lanes_at(padded), zero_at(padded), images * (last - first) * across
    spread, plane = on(padded, image_words), _odd(patches + lanes, lanes)
    above = first * side - top  # the row of the image that is the first padded one
    y0, y1 = max(0, above), min(height, above + (last - first) * side + TAPS - 1)
    for k in range(image_words):
        padded[k] = zero
    for channel in range(channels):
        to = spread
        for n in range(images):
            source = place_of(image, start + (n * channels + channel) * height * width)
            for y in range(y0, y1):
                row = on(padded, (y - above) * row_words + left)
                _copy(on(source, y * width), row, width)
            for y in range(last - first):
                row = on(padded, y * side * row_words)
                # A last vector reads and writes beyond the row; the next row overwrites that.
                for x in range(0, across, lanes):
                    if side == 3:
                        _spread3(on(row, x * side), row_words, on(to, x), plane)
                    else:
                        _spread4(on(row, x * side), row_words, on(to, x), plane)
                to = on(to, across)
        k0 = channel // KC * KC
        depth = min(KC, channels - k0)
        for p0 in range(0, patches, block):
            wide = _vectors(min(block, patches - p0), lanes)
            place = place_of(out, p0 // block * PLANES * _odd(channels * block, lanes))
            place = on(place, k0 * wide + (channel - k0) * lanes)
            for q in range(PLANES):
                source, to = on(spread, q * plane + p0), on(place, q * _odd(channels * wide, lanes))
                for p in range(0, wide, lanes):
                    copy_lanes(on(source, p), on(to, p * depth))


@part
def _write(source: Place, step: int, p0: int, count: int, out: Place, at: tuple[int, ...]) -> None:
    """Outputs of `count` patches from p0 on, in rows `step` words apart, to where they belong."""
    side, first, high, across, height, width, item = at
    p = p0
    while p < p0 + count:
        line = p // across
        x = p - line * across
        n = line // high
        y = (first + line - n * high) * side
        many = min(across - x, p0 + count - p)
        words = min(many * side, width - x * side)
        to, row = on(out, n * item + y * width + x * side), on(source, (p - p0) * side)
        for j in range(min(side, height - y)):
            _copy(on(row, j * step), on(to, j * width), words)
        p += many


@both(IN, "int64", IN, OUT, "int64", OUT, AT, "UniTuple(int64, 15)")
def multiply_patches(
    left: Words,
    left_at: int,
    right: Words,
    out: Words,
    out_at: int,
    scratch: Words,
    in_strip: Index,
    sizes: tuple[int, ...],
) -> None:
    """Outputs row0:row1 of the patches that `spread_patches` wrote, from out[out_at :] on.

    sizes: side, images, channels, outputs, row0 (a multiple of ROWS), row1, first, last, patches in
    a row, block, height and width of an output, words from image to image, words of a plane of
    kernels, bits of a product that count. in_strip: k·lanes.
    """
    side, images, channels, outputs, row0, row1, first, last = sizes[:8]
    across, block, height, width, item, plane, bits = sizes[8:]
    corner, table = on_line(place_of(scratch, 0)), place_of(in_strip, 0)
    lanes = lanes_at(corner)
    products = on(corner, ROWS * lanes)
    summed = on(products, PLANES * _odd(ROWS_AT_ONCE * block, lanes))
    patches = images * (last - first) * across
    at = (side, first, last - first, across, height, width, item)
    for p0 in range(0, patches, block):
        count = min(block, patches - p0)
        wide = _vectors(count, lanes)
        these = place_of(right, p0 // block * PLANES * _odd(channels * block, lanes))
        for i0 in range(row0, row1, ROWS_AT_ONCE):
            rows = min(ROWS_AT_ONCE, row1 - i0)
            apart = _odd(rows * wide, lanes)
            for q in range(PLANES):
                kernel, to = place_of(left, left_at + q * plane), on(products, q * apart)
                matrix = on(these, q * _odd(channels * wide, lanes))
                for k0 in range(0, channels, KC):
                    depth = min(KC, channels - k0)
                    lhs, rhs = on(kernel, k0 * outputs + i0 * depth), on(matrix, k0 * wide)
                    # What is read next of the kernels: deeper, of the next plane, of more rows.
                    later, plane_on, then = k0 + KC, q, i0
                    if later >= channels:
                        later, plane_on = 0, q + 1
                    if plane_on == PLANES:
                        plane_on, then = 0, i0 + ROWS_AT_ONCE
                    deeper = min(KC, channels - later)
                    words = max(0, min(ROWS_AT_ONCE, outputs - then)) * deeper
                    ahead = place_of(left, left_at + plane_on * plane)
                    ahead = on(ahead, later * outputs + then * deeper)
                    meet(
                        lhs, rhs, table, depth, rows, wide, to, wide, k0, corner, bits, ahead, words
                    )
            for i in range(rows):
                for p in range(0, wide, lanes):
                    place, to = on(products, i * wide + p), on(summed, p * side)
                    if side == 3:
                        _sum3(place, apart, to, wide * side)
                    else:
                        _sum4(place, apart, to, wide * side)
                to = place_of(out, out_at + (i0 - row0 + i) * height * width)
                _write(summed, wide * side, p0, count, to, at)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the patches of a convolution lie, and how many are spread at once."""

    shape: Geometry
    by: Bilinear
    dtype: np.dtype[np.unsignedinteger]

    @property
    def lanes(self) -> int:
        """Patches of one vector."""
        return lanes_of(self.dtype)

    @property
    def block(self) -> int:
        """Patches that meet some rows of the kernels at once."""
        return BLOCK_BYTES // self.dtype.itemsize

    @property
    def channels(self) -> int:
        """Of the input, in one group."""
        return self.shape.w_shape[1]

    @property
    def down(self) -> int:
        """Rows of patches of an image."""
        return -(-self.shape.out_shape[2] // self.by.side)

    @property
    def across(self) -> int:
        """Patches in one of them."""
        return -(-self.shape.out_shape[3] // self.by.side)

    def chunks(self) -> Iterator[tuple[int, int, list[Band]]]:
        """Items first : last, and the bands of rows of patches to cut them into.

        Several items are images that share a kernel, so small that they are one tile of output.
        """
        g, each = self.shape, PLANES * self.channels * self.dtype.itemsize
        image, most = self.down * self.across, SPREAD_BYTES // each
        count = 1
        read_once = g.rows <= ROWS_AT_ONCE and image * each > BAND_BYTES
        if image > most or read_once:
            count = -(-self.down // max(1, BAND_BYTES // (each * self.across)))
        edges = [self.down * k // count for k in range(count + 1)]
        most = min(most, POOLED_PATCHES)
        several = min(most // image, POOLED_OUTPUTS // (g.rows * g.pixels))
        several = max(1, several) if g.groups == 1 else 1
        for item in range(0, g.items, several):
            yield item, min(g.items, item + several), list(pairwise(edges))

    def spread_words(self, images: int, band: Band) -> int:
        """Words that `spread` writes."""
        blocks, rest = divmod(images * (band[1] - band[0]) * self.across, self.block)
        words = blocks * self._odd(self.channels * self.block)
        return PLANES * (words + self._odd(self.channels * self._vectors(rest)))

    def spread(self, x: Words, first: int, last: int, band: Band, out: Words) -> None:
        """The spread patches of items first:last and of the rows of the band."""
        g, side, lanes = self.shape, self.by.side, self.lanes
        (height, width), (top, left), high = g.x_shape[2:], g.pads[:2], band[1] - band[0]
        patches = (last - first) * high * self.across
        row_words = max(left + width, self._vectors(self.across) * side + side)
        row_words = self._vectors(row_words)
        image_words = (high * side + TAPS - 1) * row_words
        scratch = image_words + PLANES * self._odd(patches + lanes) + LINE // self.dtype.itemsize
        start = first * self.channels * height * width
        spread_patches(
            x.reshape(-1), out, np.empty(scratch, self.dtype),
            (side, last - first, start, self.channels, height, width, top, left, *band,
             self.across, self.block, row_words, image_words),
        )  # fmt: skip

    def multiply(
        self, kernels: Words, patches: Words, first: int, last: int, band: Band,
        rows: Band, out: Words, out_at: int, ring: int,
    ) -> None:  # fmt: skip
        """Outputs of the same for some output channels, mod 2^ring, from out[out_at] on."""
        g, lanes, side = self.shape, self.lanes, self.by.side
        scratch = LINE // self.dtype.itemsize + ROWS * lanes
        scratch += PLANES * self._odd(ROWS_AT_ONCE * self.block) + side**2 * self.block
        plane = g.rows * self.channels
        multiply_patches(
            kernels, first % g.groups * PLANES * plane, patches, out, out_at,
            np.empty(scratch, self.dtype), grid((KC,), (lanes,)),
            (side, last - first, self.channels, g.rows, *rows, *band,
             self.across, self.block, *g.out_shape[2:], g.rows * g.pixels, plane,
             ring + self.by.spare),
        )  # fmt: skip

    def _vectors(self, words: int) -> int:
        """Words of as many vectors as hold so many."""
        return -(-words // self.lanes) * self.lanes

    def _odd(self, words: int) -> int:
        """The same, but of an odd number of vectors."""
        return (-(-words // self.lanes) | 1) * self.lanes
