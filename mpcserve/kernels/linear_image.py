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

import numpy as np

from mpcserve.kernels.jit import kernel
from mpcserve.kernels.linear_micro import Index
from mpcserve.ring import U64, Words

SOURCE_WORDS = 1 << 20  # of a padded copy: 8 MiB
SEVERAL_WORDS = 1 << 16  # small items are copied several at once, as many as fit an L2 cache

_ZERO = U64(0)

Band = tuple[int, int]  # output rows first : last
Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes of one convolution; pads are top, left, bottom, right."""

    x_shape: tuple[int, ...]
    w_shape: tuple[int, ...]
    strides: Pair
    pads: tuple[int, int, int, int]
    dilations: Pair
    groups: int
    out_shape: tuple[int, int, int, int]

    @property
    def items(self) -> int:
        """Independent products: one for each image and group, in this order in memory."""
        return self.x_shape[0] * self.groups

    @property
    def rows(self) -> int:
        """Output channels of one group."""
        return self.w_shape[0] // self.groups

    @property
    def deep(self) -> int:
        """Products in one output word."""
        return self.w_shape[1] * self.w_shape[2] * self.w_shape[3]

    @property
    def pixels(self) -> int:
        """Output words of one channel."""
        return self.out_shape[2] * self.out_shape[3]

    @property
    def copies(self) -> bool:
        """Is a padded copy needed? A row of pixels must lie in the input, word by word."""
        return any(self.pads) or (self.strides[1] > 1 and self.w_shape[3] > 1)

    @property
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


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Word (k, p) of item t is words[at[t] + offs[k] + base[p]]."""

    words: Words
    at: Index
    offs: Index
    base: Index


def geometry_of(
    x: tuple[int, ...],
    w: tuple[int, ...],
    strides: Pair,
    pads: tuple[int, int, int, int],
    dilations: Pair,
    groups: int,
) -> Geometry:
    """Shapes: x [N, C, H, W], w [O, C / groups, kh, kw]."""
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
    (high, _), (channels, tall, wide) = g.strides, g.w_shape[1:]
    taps = np.arange(wide) * g.dilations[1]
    if g.copies:
        words, start, across = _padded(x, g, first, last, band), 0, 1
        row = g.row_words * g.strides[1]
        plane = row * g.source_rows(band)
        taps = taps % g.strides[1] * g.row_words + taps // g.strides[1]
    else:
        words, across = x.reshape(-1), g.strides[1]
        row, plane = x.shape[3], x.shape[2] * x.shape[3]
        start = first * channels * plane + band[0] * high * row
    offs = _sums(np.arange(channels) * plane, np.arange(tall) * (g.dilations[0] * row), taps)
    base = _sums(np.arange(band[1] - band[0]) * (high * row), np.arange(g.out_shape[3]) * across)
    return Source(words, start + np.arange(last - first) * (channels * plane), offs, base)


def _sums(*terms: Index) -> Index:
    """All sums of one element of each, the last index fastest."""
    total = np.zeros(1, np.int64)
    for term in terms:
        total = np.add.outer(total, term).reshape(-1)
    return total


def _padded(x: Words, g: Geometry, first: int, last: int, band: Band) -> Words:
    out = np.empty((last - first) * g.copy_words(band), np.uint64)
    top = band[0] * g.strides[0] - g.pads[0]
    planes = x[first:last].reshape(-1, *x.shape[2:])
    _pad(planes, top, g.pads[1], g.strides[1], g.source_rows(band), g.row_words, out)
    return out


@kernel(
    "void(Array(uint64, 3, 'C', readonly=True), int64, int64, int64, int64, int64, uint64[::1])"
)
def _pad(x: Words, top: int, left: int, phases: int, rows: int, row_words: int, out: Words) -> None:
    """Rows top : top + rows of each plane, zero outside; column x goes to phase x + left."""
    planes, height, width = x.shape
    out[:] = _ZERO
    at = 0
    for plane in range(planes):
        for y in range(top, top + rows):
            for phase in range(phases):
                # Column p of this phase is column p · phases + phase − left of the input.
                start = phase - left
                first = max(0, (phases - 1 - start) // phases)
                last = min(row_words, (width - start + phases - 1) // phases)
                if 0 <= y < height:
                    for p in range(first, last):
                        out[at + p] = x[plane, y, p * phases + start]
                at += row_words
