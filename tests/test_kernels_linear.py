"""Matrix products and convolutions mod 2^64 and 2^32, against Python integers and NumPy."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import DTypeLike

from mpcserve.kernels import (
    linear,
    linear_image,
    linear_micro,
    linear_panels,
    linear_runs,
)
from mpcserve.kernels.linear import (
    conv2d,
    conv2d_tiles,
    matmul,
    matmul_tiles,
)
from mpcserve.kernels.linear_weights import pack_conv_w, pack_matmul_b
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


@pytest.fixture(params=DTYPES)
def draw(request: pytest.FixtureRequest) -> Draw:
    print("seed", SEED)
    return Draw(request.param)


def integer_matmul(a: Words, b: Words) -> Words:
    """a @ b for two matrices, on Python integers."""
    rows = [[int(v) for v in row] for row in a]
    columns = [[int(v) for v in column] for column in b.T]
    ring = 2 ** (8 * a.itemsize)
    sums = [[sum(map(int.__mul__, r, c)) % ring for c in columns] for r in rows]
    return np.array(sums, a.dtype).reshape(len(rows), len(columns))


Shape = tuple[int, ...]
SHAPES: list[tuple[Shape, Shape]] = [
    ((1, 1), (1, 1)),
    ((3, 5), (5, 7)),
    ((1, 700), (700, 33)),
    ((5, 600), (600, 10)),
    ((13, 31), (31, 65)),
    ((97, 513), (513, 71)),
    ((200, 9), (9, 1)),
    ((3, 1, 4, 300), (2, 300, 1)),
    ((9, 1), (1, 1)),
    ((2, 3, 4, 5), (5, 9)),
    ((2, 1, 4, 300), (3, 300, 17)),
    ((4, 5), (6, 5, 3)),
    ((2, 3, 8, 16), (2, 3, 16, 8)),
    ((5, 1, 7), (7, 8)),
]
EMPTY: list[tuple[Shape, Shape]] = [
    ((0, 3), (3, 4)),
    ((2, 3), (3, 0)),
    ((2, 0), (0, 3)),
    ((0, 2, 3), (3, 4)),
]
EMPTY += [((0, 2, 3), (0, 3, 4)), ((4, 0, 3), (3, 2)), ((0, 0), (0, 0))]
EMPTY += [((2, 3, 0), (0, 4)), ((2, 3, 4), (4, 0)), ((2, 0, 0), (2, 0, 0))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("edge", range(5))
def test_matmul_of_edge_values_wraps_as_integers_do(edge: int, dtype: DTypeLike) -> None:
    for other in edges(dtype):
        a = np.full((linear_panels.ROWS + 1, 3), edges(dtype)[edge])
        b = np.full((3, linear_panels.lanes_of(dtype) + 1), other)
        assert np.array_equal(matmul(a, b), integer_matmul(a, b))


@pytest.mark.parametrize("rows", range(1, 2 * linear_panels.ROWS + 2))
def test_matmul_agrees_with_integers_for_every_number_of_rows(rows: int, draw: Draw) -> None:
    lanes = linear_panels.lanes_of(draw.dtype)
    for wide in (1, lanes - 1, lanes, 2 * lanes + 3):
        a, b = draw(rows, 11), draw(11, wide)
        assert np.array_equal(matmul(a, b), integer_matmul(a, b))


@pytest.mark.parametrize("ring", [64, 53, 52, 39])
def test_a_product_is_right_in_the_ring_that_is_asked_for(ring: int) -> None:
    """Whichever instruction multiplies words of that ring; operands have all their bits."""
    draw, ones = Draw(np.uint64), np.uint64(2**ring - 1)
    for rows, deep, columns in ((1, 3, 8), (5, 300, 9), (12, 7, 16), (13, 33, 40), (97, 513, 71)):
        a, b = draw(rows, deep), draw(deep, columns)
        expected = integer_matmul(a, b) & ones
        for right in (b, pack_matmul_b(b)):
            assert np.array_equal(matmul(a, right, ring=ring) & ones, expected)
            flat = np.concatenate([w.copy() for _, w in matmul_tiles(a, right, ring=ring)])
            assert np.array_equal(flat & ones, expected.reshape(-1))
    x, w = draw(2, 6, 9, 7), draw(26, 3, 3, 3)
    expected = integer_conv2d(x, w, (2, 1), (1, 0, 1, 1), (1, 1), 2) & ones
    for weight in (w, pack_conv_w(w, 2)):
        found = conv2d(x, weight, (2, 1), (1, 0, 1, 1), (1, 1), 2, ring=ring)
        assert np.array_equal(found & ones, expected)


@pytest.mark.parametrize("columns", [*range(2, 20), 33, 35, 49, 53])
def test_products_of_every_number_of_columns(columns: int, draw: Draw) -> None:
    """The last few lie across the lanes, or rows do; deeper than one panel, rows left over too."""
    a, b = draw(29, 300), draw(300, columns)
    whole = a @ b
    assert np.array_equal(matmul(a, b), whole)
    assert np.array_equal(matmul(a, pack_matmul_b(b)), whole)
    x, w = draw(1, 150, 1, columns), draw(29, 150, 1, 1)
    whole = (w[:, :, 0, 0] @ x[0, :, 0]).reshape(1, 29, 1, columns)
    assert np.array_equal(conv2d(x, pack_conv_w(w, 1)), whole)
    ring = 8 * a.itemsize - 13
    low = a.dtype.type((1 << ring) - 1)
    assert np.array_equal(matmul(a & low, b & low, ring=ring) & low, (a & low) @ (b & low) & low)


@pytest.mark.parametrize(("left", "right"), SHAPES + EMPTY)
def test_matmul_agrees_with_wrapping_numpy(
    left: tuple[int, ...], right: tuple[int, ...], draw: Draw
) -> None:
    a, b = draw(*left), draw(*right)
    expected = a @ b
    for operand in (b, pack_matmul_b(b)):
        got = matmul(a, operand)
        assert got.dtype == draw.dtype
        assert got.shape == expected.shape
        assert np.array_equal(got, expected)
        follow(matmul_tiles(a, operand), expected)


@pytest.mark.parametrize(("left", "right"), [((13, 31), (31, 65)), ((2, 3, 8, 16), (2, 3, 16, 8))])
def test_matmul_reads_operands_however_they_lie_in_memory(
    left: tuple[int, ...], right: tuple[int, ...], draw: Draw
) -> None:
    a, b = draw(*left), draw(*right)
    expected = a @ b
    transposed_a = np.ascontiguousarray(a.swapaxes(-1, -2)).swapaxes(-1, -2)
    transposed_b = np.ascontiguousarray(b.swapaxes(-1, -2)).swapaxes(-1, -2)
    assert np.array_equal(matmul(transposed_a, transposed_b), expected)
    assert np.array_equal(matmul(transposed_a, pack_matmul_b(transposed_b)), expected)
    assert np.array_equal(matmul(a[..., ::-1, :], b[..., ::-1]), expected[..., ::-1, ::-1])
    assert np.array_equal(
        matmul(a[..., ::3, ::2], b[..., ::2, ::3]), a[..., ::3, ::2] @ b[..., ::2, ::3]
    )
    column = np.broadcast_to(b[..., :1], b.shape)
    assert np.array_equal(matmul(a, column), a @ column)


def test_matmul_by_a_column_reads_operands_however_they_lie_in_memory(draw: Draw) -> None:
    a, b = draw(2, 60, 40), draw(2, 40, 3)
    for left in (a, a[:, ::2], a[:, :, ::-1], a.swapaxes(1, 2)[:, :40], a[:, :1]):
        for right in (b[..., 1:2], b[:1, :, :1], b[:, ::-1, :1]):
            deep = left.shape[-1]
            column = np.concatenate([right, right], axis=1)[:, :deep]
            for operand in (column, pack_matmul_b(column)):
                assert np.array_equal(matmul(left, operand), left @ column)
    wide = np.broadcast_to(a[..., :1], a.shape)
    assert np.array_equal(matmul(wide, b[..., :1]), wide @ b[..., :1])


def test_matmul_reads_read_only_and_unaligned_memory(draw: Draw) -> None:
    a, b = draw(7, 12), draw(12, 9)
    frozen = np.frombuffer(b"x" + a.tobytes(), draw.dtype, offset=1).reshape(a.shape)
    assert not frozen.flags.writeable
    assert not frozen.flags.aligned
    fixed = np.frombuffer(b.tobytes(), draw.dtype).reshape(b.shape)
    assert np.array_equal(matmul(frozen, fixed), a @ b)
    assert np.array_equal(matmul(a, pack_matmul_b(fixed)), a @ b)

    x, w = draw(1, 2, 5, 6), draw(3, 2, 2, 2)
    expected = wrapping_conv2d(x, w, (1, 1), (0, 0, 0, 0), (1, 1), 1)
    x = np.frombuffer(b"x" + x.tobytes(), draw.dtype, offset=1).reshape(x.shape)
    w = np.frombuffer(b"x" + w.tobytes(), draw.dtype, offset=1).reshape(w.shape)
    assert np.array_equal(conv2d(x, w), expected)
    assert np.array_equal(conv2d(x, pack_conv_w(w, 1)), expected)


def test_matmul_tiles_come_in_pieces_that_are_worth_sending(draw: Draw) -> None:
    a, b = draw(1000, 40), draw(40, 700)
    counts = follow(matmul_tiles(a, b), a @ b)
    assert 4 <= len(counts) <= 8

    a, b = draw(3000, 6, 5), draw(3000, 5, 8)
    counts = follow(matmul_tiles(a, b), a @ b)
    assert 2 <= len(counts) <= 4


CONVOLUTIONS = [
    # x, w, strides, pads, dilations, groups
    ((1, 1, 1, 1), (1, 1, 1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    ((2, 3, 7, 6), (4, 3, 3, 2), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    ((1, 2, 9, 11), (3, 2, 3, 3), (2, 3), (1, 0, 2, 3), (1, 1), 1),
    ((1, 2, 8, 9), (2, 2, 2, 3), (1, 1), (0, 2, 1, 0), (2, 3), 1),
    ((2, 4, 6, 7), (4, 1, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 4),
    ((1, 4, 7, 9), (8, 1, 3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 4),
    ((1, 6, 5, 5), (4, 3, 2, 2), (1, 2), (0, 1, 1, 0), (2, 1), 2),
    ((1, 3, 1, 19), (2, 3, 1, 5), (1, 2), (0, 2, 0, 1), (1, 2), 1),
    ((1, 2, 3, 3), (2, 2, 1, 1), (2, 2), (1, 1, 1, 1), (1, 1), 1),
    ((1, 1, 2, 2), (1, 1, 1, 1), (3, 3), (4, 4, 4, 4), (1, 1), 1),
]


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_conv2d_agrees_with_integers(case: tuple[Any, ...], draw: Draw) -> None:
    x, w = draw(*case[0]), draw(*case[1])
    how: Any = case[2:]
    expected = integer_conv2d(x, w, *how)
    assert np.array_equal(wrapping_conv2d(x, w, *how), expected)
    for operand in (w, pack_conv_w(w, how[-1])):
        assert np.array_equal(conv2d(x, operand, *how), expected)
        follow(conv2d_tiles(*(x, operand, *how)), expected)


GRID = list(
    product(
        (1, 2, 8),  # groups: dense, grouped, depthwise
        ((1, 1), (3, 3), (2, 5)),
        ((1, 1), (2, 2), (3, 1)),
        ((0, 0, 0, 0), (1, 2, 0, 3)),
        ((1, 1), (2, 1)),
    )
)


@pytest.mark.parametrize(("groups", "taps", "strides", "pads", "dilations"), GRID)
def test_conv2d_agrees_with_wrapping_numpy(
    groups: int,
    taps: tuple[int, int],
    strides: tuple[int, int],
    pads: tuple[int, int, int, int],
    dilations: tuple[int, int],
    draw: Draw,
) -> None:
    x, w = draw(2, 8, 13, 21), draw(16, 8 // groups, *taps)
    expected = wrapping_conv2d(x, w, strides, pads, dilations, groups)
    how = (strides, pads, dilations, groups)
    assert np.array_equal(conv2d(x, w, *how), expected)
    assert np.array_equal(conv2d(x, pack_conv_w(w, groups), *how), expected)


def test_conv2d_of_nothing_is_nothing(draw: Draw) -> None:
    w = draw(4, 3, 3, 3)
    assert conv2d(draw(0, 3, 8, 8), w).shape == (0, 4, 6, 6)
    assert conv2d(draw(2, 3, 2, 8), w).shape == (2, 4, 0, 6)
    tiles = conv2d_tiles(draw(0, 3, 8, 8), w, (1, 1), (0, 0, 0, 0), (1, 1), 1)
    assert [(start, words.size) for start, words in tiles] == [(0, 0)]


def test_conv2d_reads_operands_however_they_lie_in_memory(draw: Draw) -> None:
    x, w = draw(2, 4, 4, 12), draw(6, 4, 3, 2)
    how = ((2, 1), (1, 0, 0, 2), (1, 2), 1)
    swapped = ((1, 2), (0, 1, 2, 0), (2, 1), 1)
    expected = wrapping_conv2d(x, w, *how).transpose(0, 1, 3, 2)
    x, w = x.transpose(0, 1, 3, 2), w.transpose(0, 1, 3, 2)
    assert np.array_equal(conv2d(x, w, *swapped), expected)
    assert np.array_equal(conv2d(x, pack_conv_w(w, 1), *swapped), expected)
    x.flags.writeable = False
    assert np.array_equal(conv2d(x, w, *swapped), expected)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("budget", [1, 1000, 4000])
def test_conv2d_in_bands_is_the_same(
    groups: int, budget: int, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_image, "SOURCE_WORDS", budget)
    monkeypatch.setattr(linear_image, "SEVERAL_WORDS", budget)
    x, w = draw(2, 6, 17, 15), draw(80, 6 // groups, 3, 3)
    for strides in ((1, 1), (3, 2)):
        how = (strides, (1, 1, 0, 2), (1, 2), groups)
        expected = wrapping_conv2d(x, w, *how)
        follow(conv2d_tiles(x, pack_conv_w(w, groups), *how), expected)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("strides", [(1, 1), (2, 1), (2, 2)])
def test_few_rows_are_computed_in_runs(rows: int, strides: tuple[int, int], draw: Draw) -> None:
    for size in (5, 70):
        x, w = draw(1, 3, size, size + 1), draw(3 * rows, 1, 3, 2)
        for pads in ((1, 1, 1, 1), (0, 0, 0, 0)):
            how = (strides, pads, (1, 1), 3)
            expected = wrapping_conv2d(x, w, *how)
            assert np.array_equal(conv2d(x, w, *how), expected)
            follow(conv2d_tiles(x, pack_conv_w(w, 3), *how), expected)
    a, b = draw(rows, 11), draw(11, 2 * linear_runs.RUN_WORDS + 3)
    assert np.array_equal(matmul(a, b), a @ b)


def test_conv2d_copies_at_most_the_stated_memory() -> None:
    shape = linear_image.geometry_of(
        (2, 64, 224, 224), (64, 64, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1
    )
    chunks = list(shape.chunks())
    assert [c[:2] for c in chunks] == [(0, 1), (1, 2)]
    for _, _, bands in chunks:
        assert [first for first, _ in bands[1:]] == [last for _, last in bands[:-1]]
        assert (bands[0][0], bands[-1][1]) == (0, 224)
        assert max(map(shape.copy_words, bands)) <= linear_image.SOURCE_WORDS


def test_conv2d_tiles_come_in_pieces_that_are_worth_sending(draw: Draw) -> None:
    x, w = draw(1, 2, 60, 60), draw(128, 2, 3, 3)
    how = ((1, 1), (1, 1, 1, 1), (1, 1), 1)
    assert 3 <= len(follow(conv2d_tiles(x, w, *how), wrapping_conv2d(x, w, *how))) <= 5


def test_tiles_begin_where_a_packed_panel_begins() -> None:
    assert linear.TILE_ROWS % linear_panels.ROWS == 0
    for itemsize, packed in ((4, False), (8, False), (4, True), (8, True)):
        assert linear_micro.left_rows(itemsize, packed) % linear_panels.ROWS == 0
    for item0, item1, row0, row1 in linear._tiles(3, 1000, 100, 1000, whole=False):
        assert (item1 - item0, row0 % linear_panels.ROWS) == (1, 0)
        assert row1 > row0


def test_operands_of_different_dtypes_are_refused() -> None:
    wide, narrow = Draw(np.uint64)(4, 4), Draw(np.uint32)(4, 4)
    image, weight = wide.reshape(1, 1, 4, 4), narrow.reshape(1, 1, 4, 4)
    refused: list[Callable[[], object]] = [
        lambda: matmul(wide, narrow),
        lambda: matmul(narrow, pack_matmul_b(wide)),
        lambda: list(matmul_tiles(wide, narrow)),
        lambda: conv2d(image, weight),
        lambda: conv2d(image, pack_conv_w(weight, 1)),
    ]
    for work in refused:
        with pytest.raises(AssertionError, match=r"different dtypes.*uint"):
            work()
    signed: Any = wide.view(np.int64)
    for work in (lambda: matmul(signed, signed), lambda: pack_matmul_b(signed)):
        with pytest.raises(AssertionError, match="neither uint64 nor uint32"):
            work()


def test_packed_holds_little_more_than_the_weight_and_never_shows_it(
    draw: Draw,
) -> None:
    b, w = draw(3, 50, 41), draw(6, 2, 3, 3)
    packed = pack_matmul_b(b)
    assert packed.shape == b.shape
    assert packed.dtype == draw.dtype
    assert b.nbytes <= packed.nbytes <= 3 * 50 * 48 * b.itemsize
    assert pack_matmul_b(b[..., :1]).nbytes == 3 * 50 * b.itemsize
    assert pack_conv_w(w, 3).nbytes == w.nbytes
    assert repr(packed) == "Packed(shape=(3, 50, 41), groups=0)"


def test_kernels_run_side_by_side_in_threads(draw: Draw) -> None:
    a, b = draw(60, 300), draw(300, 70)
    x, w = draw(1, 8, 20, 20), draw(16, 8, 3, 3)
    how = ((1, 1), (1, 1, 1, 1), (1, 1), 1)
    products, images = a @ b, wrapping_conv2d(x, w, *how)
    right: list[bool] = []

    def work() -> None:
        for _ in range(20):
            right.append(np.array_equal(matmul(a, b), products))
            right.append(np.array_equal(conv2d(x, w, *how), images))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 160


OTHER_MACHINE = """
import numpy as np
from mpcserve.kernels import linear, linear_panels, linear_weights
from mpcserve.kernels.linear_bilinear import KARATSUBA, TOOM

assert not linear_panels.NATIVE
rng = np.random.default_rng(5)
edges = np.array([0, 1, 2**63 - 1, 2**63, 2**64 - 1, 2**32 - 1, 2**32, 2**31], np.uint64)
for m, k, n in ((1, 9, 4), (7, 600, 13), (6, 3, 8), (13, 1100, 5), (8, 20, 33), (9, 30, 1)):
    a, b = rng.integers(0, 2**64, (m, k), np.uint64), rng.integers(0, 2**64, (k, n), np.uint64)
    a[:, :3], b[:3] = rng.choice(edges, (m, 3)), rng.choice(edges, (3, n))
    for dtype in (np.uint64, np.uint32):
        a, b = a.astype(dtype), b.astype(dtype)
        assert np.array_equal(linear.matmul(a, b), a @ b)
        assert np.array_equal(linear.matmul(a, linear_weights.pack_matmul_b(b)), a @ b)
for dtype in (np.uint64, np.uint32):
    x, w = (rng.integers(0, 2**64, s, np.uint64) for s in ((1, 9, 19, 33), (14, 9, 3, 3)))
    x[:, :3], w[:, :3] = rng.choice(edges, (3, 19, 33)), rng.choice(edges, (3, 3, 3))
    x, w = x.astype(dtype), w.astype(dtype)
    expected = linear.conv2d(x, w, pads=(1, 0, 2, 1))
    for by in (KARATSUBA, TOOM):
        ring = np.array(2 ** (8 * x.itemsize - by.spare) - 1, dtype)
        got = linear.conv2d(x, linear_weights.pack_conv_w(w, 1, by), pads=(1, 0, 2, 1))
        assert np.array_equal(got, expected & ring)
print("same")
"""


@pytest.mark.slow
def test_a_machine_without_wide_products_computes_the_same(tmp_path: Path) -> None:
    env = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    env |= {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", OTHER_MACHINE]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("same\n", "")
