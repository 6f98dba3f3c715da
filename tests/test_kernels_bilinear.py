"""Convolutions with fewer products, against the definition on Python integers and on NumPy."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from mpcserve.kernels import linear_patches
from mpcserve.kernels.linear import TILE_OUTPUTS, conv2d, conv2d_tiles
from mpcserve.kernels.linear_bilinear import KARATSUBA, TOOM, Bilinear, bilinear_for
from mpcserve.kernels.linear_image import Geometry, geometry_of
from mpcserve.kernels.linear_micro import KC
from mpcserve.kernels.linear_panels import ROWS
from mpcserve.kernels.linear_patches import Layout
from mpcserve.kernels.linear_weights import pack_conv_w
from mpcserve.ring import Words
from tests.linear_support import (
    DTYPES,
    SEED,
    Draw,
    edges,
    follow,
    integer_conv2d,
    wrapping_conv2d,
)

BOTH = [KARATSUBA, TOOM]
Pads = tuple[int, int, int, int]


@pytest.fixture(params=DTYPES)
def draw(request: pytest.FixtureRequest) -> Draw:
    print("seed", SEED)
    return Draw(request.param)


@pytest.fixture(params=BOTH, ids=lambda by: by.name)
def by(request: pytest.FixtureRequest) -> Bilinear:
    chosen: Bilinear = request.param
    return chosen


def ring_of(x: Words, by: Bilinear) -> Words:
    """The bits that are right."""
    return np.array(2 ** (8 * x.itemsize - by.spare) - 1, x.dtype)


def geometry(x: Words, w: Words, pads: Pads) -> Geometry:
    """Of a convolution in one group."""
    return geometry_of(x.shape, w.shape, (1, 1), pads, (1, 1), 1)


def check(x: Words, w: Words, pads: Pads, groups: int, by: Bilinear, expected: Words) -> list[int]:
    """Whole and in tiles; how many words there are after each tile."""
    packed, expected = pack_conv_w(w, groups, by), expected & ring_of(x, by)
    how = ((1, 1), pads, (1, 1), groups)
    assert np.array_equal(conv2d(x, packed, *how), expected)
    return follow(conv2d_tiles(x, packed, *how), expected)


@pytest.mark.parametrize("bits", [32, 64])
def test_six_products_give_the_outputs_of_one_dimension(bits: int, by: Bilinear) -> None:
    rng = random.Random(SEED)
    for _ in range(200):
        d, g = ([rng.getrandbits(bits) for _ in range(n)] for n in (by.reach, 3))
        products = [a * b for a, b in zip(by.spread(d), by.weigh(g, bits), strict=True)]
        assert len(products) == 6
        for i, total in enumerate(by.sums(products)):
            exact = sum(g[j] * d[i + j] for j in range(3)) << by.spare // 2
            assert (total - exact) % 2**bits == 0


@pytest.mark.parametrize("pads", [(0, 0, 0, 0), (1, 1, 1, 1), (0, 2, 1, 3)])
@pytest.mark.parametrize("size", [(3, 3), (7, 8), (14, 5)])
def test_a_convolution_agrees_with_integers(
    size: tuple[int, int], pads: Pads, draw: Draw, by: Bilinear
) -> None:
    x, w = draw(2, 3, *size), draw(4, 3, 3, 3)
    check(x, w, pads, 1, by, integer_conv2d(x, w, (1, 1), pads, (1, 1), 1))


def test_edge_values_wrap_as_integers_do(draw: Draw, by: Bilinear) -> None:
    for a in edges(draw.dtype):
        for b in edges(draw.dtype):
            x, w = np.full((1, 2, 6, 7), a), np.full((2, 2, 3, 3), b)
            expected = integer_conv2d(x, w, (1, 1), (1, 0, 1, 2), (1, 1), 1)
            check(x, w, (1, 0, 1, 2), 1, by, expected)


CONVOLUTIONS = [
    # images, channels, size, outputs, pads, groups
    (1, 5, (56, 57), ROWS + 1, (1, 1, 1, 1), 1),
    (1, KC + 9, (14, 14), 2 * ROWS + 5, (1, 2, 0, 3), 1),
    (1, 4, (30, 90), 2 * linear_patches.ROWS_AT_ONCE + 7, (1, 1, 1, 1), 1),
    (2, 12, (17, 31), 30, (0, 1, 2, 0), 3),
    (3, 3, (1, 200), 5, (3, 1, 0, 9), 1),
    (2, 7, (1, 1), 9, (1, 1, 1, 1), 1),
    (1, 2, (120, 4), 3, (5, 5, 5, 5), 1),
]


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_convolution_agrees_with_wrapping_numpy(
    case: tuple[Any, ...], draw: Draw, by: Bilinear
) -> None:
    images, channels, size, outputs, pads, groups = case
    x, w = draw(images, channels, *size), draw(outputs, channels // groups, 3, 3)
    check(x, w, pads, groups, by, wrapping_conv2d(x, w, (1, 1), pads, (1, 1), groups))


@pytest.mark.parametrize("ring", [39, 50, 51, 62])
def test_a_convolution_is_right_in_the_ring_that_is_asked_for(ring: int) -> None:
    """Whichever instruction multiplies words of that ring and of the bits that Toom spends."""
    draw, ones = Draw(np.uint64), np.uint64(2**ring - 1)
    x, w, pads = draw(1, 20, 19, 30), draw(18, 20, 3, 3), (1, 1, 1, 1)
    packed = pack_conv_w(w, 1, TOOM)
    expected = wrapping_conv2d(x, w, (1, 1), pads, (1, 1), 1) & ones
    found = conv2d(x, packed, pads=pads, ring=ring)
    assert np.array_equal(found & ones, expected)


@pytest.mark.parametrize("limit", [1, 100_000, 250_000])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_in_bands_is_the_same(
    groups: int, limit: int, draw: Draw, by: Bilinear, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_patches, "SPREAD_BYTES", limit)
    monkeypatch.setattr(linear_patches, "BAND_BYTES", limit)
    x, w, pads = draw(2, 6, 41, 37), draw(160, 6 // groups, 3, 3), (1, 1, 0, 2)
    check(x, w, pads, groups, by, wrapping_conv2d(x, w, (1, 1), pads, (1, 1), groups))


def test_bands_of_several_images_are_the_same(
    draw: Draw, by: Bilinear, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_patches, "BAND_BYTES", 1)
    x, w, pads = draw(5, 6, 13, 12), draw(20, 6, 3, 3), (1, 1, 0, 2)
    chunks = list(Layout(geometry(x, w, pads), by, x.dtype).chunks())
    assert len(chunks) < 5 and len(chunks[0][2]) > 1
    check(x, w, pads, 1, by, wrapping_conv2d(x, w, (1, 1), pads, (1, 1), 1))


def test_small_images_that_share_a_kernel_are_computed_together(draw: Draw, by: Bilinear) -> None:
    x, w, pads = draw(11, 5, 7, 7), draw(64, 5, 3, 3), (1, 1, 1, 1)
    chunks = list(Layout(geometry(x, w, pads), by, x.dtype).chunks())
    assert len(chunks) < 11
    tiles = check(x, w, pads, 1, by, wrapping_conv2d(x, w, (1, 1), pads, (1, 1), 1))
    assert len(tiles) == len(chunks)


def test_spread_patches_take_at_most_the_stated_memory(by: Bilinear) -> None:
    for channels, size in ((64, 224), (512, 28), (512, 14), (256, 7), (3, 224), (256, 112)):
        shape = (2, channels, size, size), (channels, channels, 3, 3)
        g = geometry_of(*shape, (1, 1), (1, 1, 1, 1), (1, 1), 1)
        layout = Layout(g, by, np.dtype(np.uint64))
        for first, last, bands in layout.chunks():
            assert [a for a, _ in bands[1:]] == [b for _, b in bands[:-1]]
            assert (bands[0][0], bands[-1][1]) == (0, layout.down)
            for low, high in bands:
                words = layout.spread_words(last - first, (low, high))
                patches = (last - first) * (high - low) * layout.across
                assert 36 * channels * patches <= words
                assert 8 * words <= 1.02 * linear_patches.SPREAD_BYTES
                assert last - first == 1 or patches <= linear_patches.POOLED_PATCHES


def test_tiles_are_worth_sending(draw: Draw, by: Bilinear) -> None:
    x, w, pads = draw(1, 64, 40, 40), draw(256, 64, 3, 3), (1, 1, 1, 1)
    tiles = check(x, w, pads, 1, by, wrapping_conv2d(x, w, (1, 1), pads, (1, 1), 1))
    assert 3 <= len(tiles) <= 5
    assert max(b - a for a, b in pairwise([0, *tiles])) <= TILE_OUTPUTS


def test_a_packed_kernel_takes_four_times_the_memory(draw: Draw, by: Bilinear) -> None:
    w = draw(26, 5, 3, 3)
    packed = pack_conv_w(w, 2, by)
    assert packed.nbytes == 4 * w.nbytes
    assert repr(packed) == "Packed(shape=(26, 5, 3, 3), groups=2)"
    with pytest.raises(AssertionError, match="another convolution"):
        conv2d(draw(1, 10, 9, 9), packed, (2, 2), (0, 0, 0, 0), (1, 1), 2)


def test_nothing_is_computed_for_an_empty_image(draw: Draw, by: Bilinear) -> None:
    packed = pack_conv_w(draw(4, 3, 3, 3), 1, by)
    assert conv2d(draw(0, 3, 8, 8), packed).shape == (0, 4, 6, 6)
    assert conv2d(draw(2, 3, 2, 8), packed).shape == (2, 4, 0, 6)


def choice(
    x: tuple[int, ...],
    w: tuple[int, ...],
    ring: int = 32,
    strides: tuple[int, int] = (1, 1),
    dilations: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Bilinear | None:
    """What computes this convolution, padded by one."""
    return bilinear_for(geometry_of(x, w, strides, (1, 1, 1, 1), dilations, groups), ring)


def test_the_ring_decides_which_sums_are_exact() -> None:
    rings = [30, 31, 32, 33, 62, 63, 64]
    chosen = [choice((1, 64, 56, 56), (64, 64, 3, 3), ring) for ring in rings]
    assert chosen == [TOOM, KARATSUBA, KARATSUBA, TOOM, TOOM, KARATSUBA, KARATSUBA]


def test_other_convolutions_are_computed_as_they_are_defined() -> None:
    x, w = (1, 64, 56, 56), (64, 64, 3, 3)
    assert choice(x, w, strides=(2, 2)) is None
    assert choice(x, w, dilations=(2, 2)) is None
    assert choice(x, (64, 64, 1, 1)) is None
    assert choice(x, (64, 64, 3, 5)) is None
    assert choice(x, (64, 1, 3, 3), groups=64) is None
    assert choice((1, 3, 224, 224), (64, 3, 3, 3)) is None
    assert choice(x, (8, 64, 3, 3)) is None
    assert choice(x, (64, 32, 3, 3), groups=2) is KARATSUBA


def test_few_patches_do_not_pay_for_a_weight_four_times_as_large() -> None:
    w = (512, 512, 3, 3)
    for ring, by in ((32, KARATSUBA), (42, TOOM)):
        assert choice((1, 512, 7, 7), w, ring) is None
        assert choice((8, 512, 7, 7), w, ring) is by
        assert choice((1, 512, 14, 14), w, ring) is by
