"""The compiled half of the linear layers: out[i, p] = Σ_k left[i, k] · right[k, p] mod 2^64 or 32.

One driver serves matmul and conv, on words of 64 bits and on words of 32; all operands of a product
are of one kind. The left operand is read by strides or comes packed in panels of ROWS rows. The
right one is addressed as source[at + offs[k] + base[p]]: a strided or a transposed matrix, or the
image columns of a convolution without ever writing them out; or it comes packed in panels of as
many columns as a vector has lanes. The driver gathers one panel KC deep (it stays in the L1 cache)
and meets it with many rows of the left operand (they stay in the L2 cache).

The innermost loop is `linear_panels`. Every address, branch and loop count is a function of shapes
alone.
Source: Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mpcserve.kernels.jit import F, kernel
from mpcserve.kernels.linear_panels import (
    FEW_COLUMNS,
    LINE,
    NATIVE,
    PANELS,
    ROOM,
    ROWS,
    added,
    copy_lanes,
    lanes_at,
    lanes_of,
    multiply_columns,
    multiply_panel,
    multiply_panels,
    on_line,
    row_lanes_at,
    zero_at,
)
from mpcserve.kernels.places import Place, on, part, place_of
from mpcserve.ring import Words

Index = NDArray[np.int64]

KC = 256  # depth of a panel: KC vectors of 512 bits are 16 KiB, half an L1 cache
STRIP = 8  # panels gathered at once, so that memory is read in longer runs
PACKED_ROWS = 96  # that meet one packed panel: 96 or 192 KiB of an L2 cache
LEFT_BYTES = (384 if NATIVE else 192) << 10  # of those that meet one that is gathered
FEW_ROWS, FEW_DEEP = 4, 64  # up to here columns are read where they lie: copying would cost more


def left_rows(itemsize: int, right_packed: bool) -> int:
    """Rows that meet one panel, of words of so many bytes.

    The more, the less often a panel is gathered; one that is packed needs no gathering.
    """
    if right_packed:
        return PACKED_ROWS
    return LEFT_BYTES // (KC * itemsize) // ROWS * ROWS


_left_rows = part(left_rows)


def aligned(words: int, dtype: np.dtype[Any]) -> Words:
    """Uninitialised, from the beginning of a cache line: no vector of a panel crosses one.

    There is ROOM behind it.
    """
    raw: Words = np.empty(words + LINE // dtype.itemsize + ROOM, dtype)
    skip = -raw.ctypes.data % LINE // dtype.itemsize
    return raw[skip : skip + words]


def scratch_words(dtype: DTypeLike, rows: int, deep: int, right_packed: bool) -> int:
    """What `multiply` needs: a tile for cut-off columns, a strip of the right, `rows` to pack."""
    strip = 0 if right_packed else STRIP * lanes_of(dtype)
    line = LINE // np.dtype(dtype).itemsize + ROOM
    several = min(left_rows(np.dtype(dtype).itemsize, right_packed), rows)
    return line + ROWS * lanes_of(dtype) + (strip + several) * min(KC, deep)


@part
def _neighbours(base: Place, width: int, lanes: int) -> bool:
    """Are `width` columns whole vectors of neighbours in memory? base must not decrease."""
    return width % lanes == 0 and base[width - 1] - base[0] == width - 1


@part
def _gather_neighbours(source: Place, offs: Place, columns: int, depth: int, out: Place) -> None:
    """Panels of neighbours: out[(j·depth + k)·lanes + …] = source[offs[k] + j·lanes + …]."""
    lanes = lanes_at(out)
    for k in range(depth):
        row, to = on(source, offs[k]), on(out, k * lanes)
        for j in range(0, columns, lanes):
            copy_lanes(on(row, j), on(to, j * depth))


@part
def _gather_panel(
    source: Place, offs: Place, base: Place, width: int, depth: int, out: Place
) -> None:
    """One panel of scattered columns: out[k·lanes + lane] = source[offs[k] + base[lane]]."""
    lanes = lanes_at(out)
    for k in range(depth):
        row, to = on(source, offs[k]), on(out, k * lanes)
        if width == lanes:
            for lane in range(lanes):
                to[lane] = row[base[lane]]
        else:
            for lane in range(width):
                to[lane] = row[base[lane]]


@part
def _gather(source: Place, offs: Place, base: Place, columns: int, depth: int, out: Place) -> None:
    """Panels of all columns; lanes past the last column are left as they are."""
    lanes = lanes_at(out)
    if _neighbours(base, columns, lanes):
        _gather_neighbours(on(source, base[0]), offs, columns, depth, out)
        return
    for p0 in range(0, columns, lanes):
        to, width, first = on(out, p0 * depth), min(lanes, columns - p0), on(base, p0)
        if _neighbours(first, width, lanes):
            _gather_neighbours(on(source, first[0]), offs, lanes, depth, to)
        else:
            _gather_panel(source, offs, first, width, depth, to)


@part
def _pack_rows(
    source: Place, row_step: int, col_step: int, rows: int, depth: int, out: Place
) -> None:
    """Panels of up to ROWS rows, word (i, k) of a panel of r rows at k·r + i; rows·depth words."""
    for i0 in range(0, rows, ROWS):
        first, count = on(source, i0 * row_step), min(ROWS, rows - i0)
        to = on(out, i0 * depth)
        for k in range(depth):
            column = on(first, k * col_step)
            if count == ROWS:
                for i in range(ROWS):
                    to[i] = column[i * row_step]
            else:
                for i in range(count):
                    to[i] = column[i * row_step]
            to = on(to, count)


@part
def meet(
    left: Place,
    right: Place,
    offs: Place,
    depth: int,
    rows: int,
    columns: int,
    out: Place,
    step: int,
    more: int,
    corner: Place,
    bits: int,
    ahead: Place,
    words: int,
) -> None:
    """Packed rows times the panels of a strip of `columns`, added to out when `more`.

    Right mod 2^bits. Meanwhile `words` words are fetched from `ahead` on.
    """
    lanes = lanes_at(out)
    calls = (columns + PANELS * lanes - 1) // (PANELS * lanes) * ((rows + ROWS - 1) // ROWS)
    pace = (words + calls * depth - 1) // (calls * depth)
    apart, several = depth * lanes, columns // (PANELS * lanes) * PANELS * lanes
    for p0 in range(0, several, PANELS * lanes):
        for i0 in range(0, rows, ROWS):
            count, these = min(ROWS, rows - i0), on(left, i0 * depth)
            place, panels = on(out, i0 * step + p0), on(right, p0 * depth)
            multiply_panels(
                these, panels, apart, offs, depth, count, place, step, more, bits, ahead, pace
            )
            ahead = on(ahead, depth * pace)
    for p0 in range(several, columns, lanes):
        width, panel = min(lanes, columns - p0), on(right, p0 * depth)
        cut, few = width < lanes, width <= FEW_COLUMNS
        across, along = (1, row_lanes_at(corner)) if few else (lanes, 1)
        for i0 in range(0, rows, ROWS):
            count, these = min(ROWS, rows - i0), on(left, i0 * depth)
            place = on(out, i0 * step + p0)
            to, by, add = (corner, lanes, 0) if cut else (place, step, more)
            if few:
                multiply_columns(these, panel, offs, depth, count, width, corner, bits, ahead, pace)
            else:
                multiply_panel(
                    these, panel, apart, offs, depth, count, to, by, add, bits, ahead, pace
                )
            ahead = on(ahead, depth * pace)
            if cut:
                for i in range(count):
                    for j in range(width):
                        word = corner[i * across + j * along]
                        place[j] = place[j] + word if more else word
                    place = on(place, step)


@part
def _read_next(k0: int, i0: int, deep: int, height: int, most: int) -> tuple[int, int]:
    """(where, how many words): what of a packed left operand is read after the block at i0, k0."""
    later, then = (k0 + KC, i0) if k0 + KC < deep else (0, i0 + most)
    depth = min(KC, deep - later)
    return later * height + then * depth, max(0, min(most, height - then)) * depth


AT = "Array(int64, 1, 'C', readonly=True)"
IN = "Array({0}, 1, 'C', readonly=True)"
OUT = "{0}[::1]"


def both(*arguments: str) -> Callable[[F], F]:
    """Compile for words of 64 bits and for words of 32; {0} is the type of a word."""
    return kernel(*(f"void({', '.join(arguments)})".format(f"uint{bits}") for bits in (64, 32)))


@both(
    *(IN, AT, IN, AT, AT, AT, OUT, AT, OUT, AT),
    *("UniTuple(int64, 3)", "UniTuple(int64, 6)", "UniTuple(int64, 4)"),
)
def multiply(
    left: Words, left_at: Index, right: Words, right_at: Index, offs: Index, base: Index,
    out: Words, out_at: Index, scratch: Words, in_strip: Index, left_form: tuple[int, int, int],
    sizes: tuple[int, int, int, int, int, int], tile: tuple[int, int, int, int],
) -> None:  # fmt: skip
    """Rows row0:row1 of products item0:item1; row i of item t goes to out[out_at[t] + i·step :].

    left_form: packed or not, and if not the steps of rows and columns. sizes: is the right packed
    (then offs and base are not read), depth, columns, rows of an item, step, bits of a word that
    count. tile: item0, item1, row0 (a multiple of ROWS), row1. scratch: as scratch_words says.
    in_strip: k·lanes.
    """
    left_packed, row_step, col_step = left_form
    right_packed, deep, wide, height, step, bits = sizes
    item0, item1, row0, row1 = tile
    most = _left_rows(left.itemsize, right_packed != 0)
    corner = on_line(place_of(scratch, 0))
    lanes = lanes_at(corner)
    strip = on(corner, ROWS * lanes)
    block = strip if right_packed else on(strip, STRIP * lanes * min(KC, deep))
    panels = (wide + lanes - 1) // lanes * lanes
    for item in range(item0, item1):
        source = place_of(right, right_at[item])
        for i0 in range(row0, row1, most):
            rows = min(most, row1 - i0)
            few = rows <= FEW_ROWS and deep <= FEW_DEEP and not right_packed
            width = lanes if few else STRIP * lanes
            strips = (wide + width - 1) // width
            for k0 in range(0, deep, KC):
                depth = min(KC, deep - k0)
                lhs = place_of(left, left_at[item])
                ahead, words = lhs, 0
                if left_packed:
                    word, words = _read_next(k0, i0, deep, height, most)
                    ahead, words = on(lhs, word), (words + strips - 1) // strips
                    lhs = on(lhs, k0 * height + i0 * depth)
                else:
                    lhs = on(lhs, i0 * row_step + k0 * col_step)
                    _pack_rows(lhs, row_step, col_step, rows, depth, block)
                    lhs = block
                for p0 in range(0, wide, width):
                    columns = min(width, wide - p0)
                    place = place_of(out, out_at[item] + i0 * step + p0)
                    rhs, table = on(source, k0 * panels + p0 * depth), place_of(in_strip, 0)
                    if not right_packed:
                        start, taps = place_of(base, p0), place_of(offs, k0)
                        if few and _neighbours(start, columns, lanes):
                            rhs, table = on(source, start[0]), taps
                        else:
                            rhs = strip
                            _gather(source, taps, start, columns, depth, rhs)
                    meet(
                        lhs, rhs, table, depth, rows, columns, place, step, k0, corner, bits,
                        ahead, words,
                    )  # fmt: skip
                    ahead = on(ahead, words)


@both(*(IN, AT, "int64", IN, AT, OUT, AT, "int64", "UniTuple(int64, 4)"))
def multiply_column(
    left: Words,
    left_at: Index,
    row_step: int,
    right: Words,
    right_at: Index,
    out: Words,
    out_at: Index,
    deep: int,
    tile: tuple[int, int, int, int],
) -> None:
    """The same where the right operand is one column; its words and those of a row are neighbours.

    Copying rows into panels would cost more than the products.
    """
    item0, item1, row0, row1 = tile
    for item in range(item0, item1):
        column, to = place_of(right, right_at[item]), place_of(out, out_at[item])
        for i in range(row0, row1):
            row = place_of(left, left_at[item] + i * row_step)
            total = zero_at(to)
            for k in range(deep):
                total = added(total, row[k], column[k])
            to[i] = total
