"""The right operand of a convolution: where the word of a kernel tap and an output pixel lies.

Column p of the image matrix is output pixel p, row k is one (channel, tap y, tap x). The matrix is
never written out: word (k, p) lies at at + offs[k] + base[p] of a source. Without padding the
source is the input itself. Otherwise it is a padded copy, in which each row is split by the
horizontal stride (even columns, then odd ones, …), so that neighbouring pixels are neighbours in
memory for every tap. Copies of large images are made in bands of output rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

import numpy as np

from mpcserve.kernels.linear_micro import Index
from mpcserve.ring import Words

SOURCE_WORDS = 1 << 20  # of a padded copy: 8 MiB
TABLE, TABLES = 1 << 13, 128  # index tables up to this long, and this many, await the next call
SEVERAL_WORDS = 1 << 16  # small items are copied several at once, as many as fit an L2 cache

Band = tuple[int, int]  # output rows first : last
Pair = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Geometry:
    """The sizes of one convolution; pads are top, left, bottom, right. Made by `geometry_of`."""

    x_shape: tuple[int, ...]
    w_shape: tuple[int, ...]
    strides: Pair
    pads: tuple[int, int, int, int]
    dilations: Pair
    groups: int
    out_shape: tuple[int, int, int, int]

    @cached_property
    def items(self) -> int:
        """Independent products: one for each image and group, in this order in memory."""
        return self.x_shape[0] * self.groups

    @cached_property
    def rows(self) -> int:
        """Output channels of one group."""
        return self.w_shape[0] // self.groups

    @cached_property
    def deep(self) -> int:
        """Products in one output word."""
        return self.w_shape[1] * self.w_shape[2] * self.w_shape[3]

    @cached_property
    def pixels(self) -> int:
        """Output words of one channel."""
        return self.out_shape[2] * self.out_shape[3]

    @cached_property
    def copies(self) -> bool:
        """Is a padded copy needed? A row of pixels must lie in the input, word by word."""
        return any(self.pads) or (self.strides[1] > 1 and self.w_shape[3] > 1)

    @cached_property
    def row_words(self) -> int:
        """Columns of one phase of a row of the padded copy."""
        reach = (self.out_shape[3] - 1) * self.strides[1]
        reach += (self.w_shape[3] - 1) * self.dilations[1] + 1
        return -(-reach // self.strides[1])

    def source_rows(self, band: Band) -> int:
        """Rows of the padded image that the band's output rows see."""
        reach = (self.w_shape[2] - 1) * self.dilations[0] + 1
        return (band[1] - band[0] - 1) * self.strides[0] + reach

    def copy_words(self, band: Band) -> int:
        """Words of the padded copy of one item."""
        columns = self.row_words * self.strides[1]
        return self.w_shape[1] * self.source_rows(band) * columns

    def chunks(self) -> Iterator[tuple[int, int, list[Band]]]:
        """Items first : last and the bands to cut them into; one band unless they are large."""
        last = self.out_shape[2]
        if not self.copies:
            yield 0, self.items, [(0, last)]
            return
        several = max(1, SEVERAL_WORDS // self.copy_words((0, last)))
        high = last
        while high > 1 and self.copy_words((0, high)) > SOURCE_WORDS:
            high = (high + 1) // 2
        bands = [(y, min(last, y + high)) for y in range(0, last, high)]
        for item in range(0, self.items, several):
            yield item, min(self.items, item + several), bands


@dataclass(slots=True, eq=False)
class Source:
    """Word (k, p) of item t is words[at[t] + offs[k] + base[p]]."""

    words: Words
    at: Index
    offs: Index
    base: Index
    runs: tuple[int, int, int] | None
    """Rows of output pixels: how many, how wide, how far apart; None if pixels are no neighbours.
    """


@lru_cache(maxsize=1 << 10)
def geometry_of(
    x: tuple[int, ...],
    w: tuple[int, ...],
    strides: Pair,
    pads: tuple[int, int, int, int],
    dilations: Pair,
    groups: int,
) -> Geometry:
    """The one of these sizes. Shapes: x [N, C, H, W], w [O, C / groups, kh, kw]."""
    assert len(x) == len(w) == 4 and x[1] == w[1] * groups and w[0] % groups == 0, (x, w, groups)
    top, left, bottom, right = pads
    assert min(pads) >= 0 and min(*strides, *dilations, *w[2:]) >= 1
    high = (x[2] + top + bottom - (w[2] - 1) * dilations[0] - 1) // strides[0] + 1
    wide = (x[3] + left + right - (w[3] - 1) * dilations[1] - 1) // strides[1] + 1
    out = (x[0], w[0], max(0, high), max(0, wide))
    return Geometry(x, w, strides, pads, dilations, groups, out)


def prepare(x: Words, g: Geometry, first: int, last: int, band: Band) -> Source:
    """The source for items first:last and the output rows of the band. x is contiguous."""
    x = x.reshape(g.items, g.w_shape[1], *g.x_shape[2:])
    if g.copies:
        words, start = _padded(x, g, first, last, band), 0
        plane = g.row_words * g.strides[1] * g.source_rows(band)
    else:
        words, plane = x.reshape(-1), x.shape[2] * x.shape[3]
        start = first * g.w_shape[1] * plane + band[0] * g.strides[0] * x.shape[3]
    at = grid((last - first,), (g.w_shape[1] * plane,))
    high = band[1] - band[0]
    small = max(g.deep, high * g.out_shape[3]) <= TABLE
    offs, base = (_kept_tables if small else _tables)(g, high)
    runs = None
    if g.copies or g.strides[1] == 1:
        wide = g.out_shape[3]
        runs = (high, wide, int(base[wide] - base[0]) if high > 1 else wide)
    return Source(words, at + start if start else at, offs, base, runs)


def _tables(g: Geometry, high: int) -> tuple[Index, Index]:
    """offs and base for a band of `high` output rows."""
    (down, across), (channels, tall, wide) = g.strides, g.w_shape[1:]
    row, rows = g.x_shape[3], g.x_shape[2]
    taps = np.arange(wide) * g.dilations[1]
    if g.copies:
        row, rows = g.row_words * across, g.source_rows((0, high))
        taps = taps % across * g.row_words + taps // across
        across = 1
    planes = grid((channels, tall), (rows * row, g.dilations[0] * row))
    offs = np.add.outer(planes, taps).reshape(-1)
    offs.flags.writeable = False
    return offs, grid((high, g.out_shape[3]), (down * row, across))


_kept_tables = lru_cache(maxsize=TABLES)(_tables)


def grid(sizes: tuple[int, ...], steps: tuple[int, ...]) -> Index:
    """Where the words with these indices lie, the last index fastest. Read-only."""
    make = _kept_grid if prod(sizes) <= TABLE else _new_grid
    return make(sizes, steps)


def _new_grid(sizes: tuple[int, ...], steps: tuple[int, ...]) -> Index:
    total = np.zeros(1, np.int64)
    for size, step in zip(sizes, steps, strict=True):
        total = np.add.outer(total, np.arange(size) * step).reshape(-1)
    total.flags.writeable = False
    return total


_kept_grid = lru_cache(maxsize=TABLES)(_new_grid)


def _padded(x: Words, g: Geometry, first: int, last: int, band: Band) -> Words:
    """The padded copy: column x of a row goes to phase x + left, rows from band's first one on."""
    planes = x[first:last].reshape(-1, *x.shape[2:])
    phases, rows = g.strides[1], g.source_rows(band)
    top, (height, width) = band[0] * g.strides[0] - g.pads[0], planes.shape[1:]
    out = np.zeros((len(planes), rows, phases, g.row_words), x.dtype)
    y0, y1 = max(0, top), min(height, top + rows)
    for phase in range(phases):
        # Column p of this phase is column p · phases + start of the input.
        start = phase - g.pads[1]
        p0 = max(0, -(start // phases))
        p1 = min(g.row_words, -((start - width) // phases))
        if y0 < y1 and p0 < p1:
            columns = slice(p0 * phases + start, (p1 - 1) * phases + start + 1, phases)
            out[:, y0 - top : y1 - top, phase, p0:p1] = planes[:, y0:y1, columns]
    return out.reshape(-1)
