"""Words to multiply, and what products of images are by definition."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from mpcserve.kernels import linear
from mpcserve.ring import Words

DTYPES = [np.uint64, np.uint32]
SEED = 20240607


def edges(dtype: DTypeLike) -> Words:
    """Where signs and carries change."""
    top = 2 ** (8 * np.dtype(dtype).itemsize)
    return np.array([0, 1, top // 2 - 1, top // 2, top - 1], dtype)


class Draw:
    """Uniform words of one dtype, a quarter of them edge values."""

    def __init__(self, dtype: type[np.unsignedinteger[Any]]) -> None:
        self.dtype = dtype
        self.rng = np.random.default_rng(SEED)

    def __call__(self, *shape: int) -> Words:
        x: Words = self.rng.integers(0, np.iinfo(self.dtype).max, shape, self.dtype, endpoint=True)
        edge = self.rng.random(shape) < 0.25
        x[edge] = edges(self.dtype)[self.rng.integers(0, 5, shape)][edge]
        return x


def integer_conv2d(
    x: Words,
    w: Words,
    strides: tuple[int, int],
    pads: tuple[int, int, int, int],
    dilations: tuple[int, int],
    groups: int,
) -> Words:
    """The definition, word by word, on Python integers."""
    count, _, height, width = x.shape
    channels, own, tall, wide = w.shape
    high = (height + pads[0] + pads[2] - (tall - 1) * dilations[0] - 1) // strides[0] + 1
    across = (width + pads[1] + pads[3] - (wide - 1) * dilations[1] - 1) // strides[1] + 1
    out = np.zeros((count, channels, high, across), x.dtype)
    for n, o, y, z in product(*map(range, out.shape)):
        total = 0
        for c, i, j in product(range(own), range(tall), range(wide)):
            row = y * strides[0] + i * dilations[0] - pads[0]
            column = z * strides[1] + j * dilations[1] - pads[1]
            if 0 <= row < height and 0 <= column < width:
                channel = o // (channels // groups) * own + c
                total += int(x[n, channel, row, column]) * int(w[o, c, i, j])
        out[n, o, y, z] = total % 2 ** (8 * x.itemsize)
    return out


def wrapping_conv2d(
    x: Words,
    w: Words,
    strides: tuple[int, int],
    pads: tuple[int, int, int, int],
    dilations: tuple[int, int],
    groups: int,
) -> Words:
    """Shifted images times one weight at a time, on NumPy's wrapping words."""
    x = np.pad(x, ((0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])))
    channels, own, tall, wide = w.shape
    high = (x.shape[2] - (tall - 1) * dilations[0] - 1) // strides[0] + 1
    across = (x.shape[3] - (wide - 1) * dilations[1] - 1) // strides[1] + 1
    out = np.zeros((len(x), channels, high, across), x.dtype)
    for o, c, i, j in product(*map(range, w.shape)):
        rows = slice(i * dilations[0], i * dilations[0] + high * strides[0], strides[0])
        columns = slice(j * dilations[1], j * dilations[1] + across * strides[1], strides[1])
        shifted = x[:, o // (channels // groups) * own + c, rows, columns]
        out[:, o] += shifted[:, :high, :across] * w[o, c, i, j]
    return out


def follow(tiles: Iterator[linear.Tile], expected: Words) -> list[int]:
    """Run a tiled product: how many words there are after each tile."""
    flat, counts, done = expected.reshape(-1), [], 0
    for start, words in tiles:
        assert start == done
        done += words.size
        counts.append(done)
        assert np.array_equal(words, flat[start:done])
    assert counts == sorted(set(counts))
    assert done == flat.size
    return counts
