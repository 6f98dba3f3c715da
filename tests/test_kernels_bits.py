"""Bit kernels against Python integers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mpcserve.kernels import bits, compare, local, packing
from mpcserve.ring import decode, encode, from_signed, reduce, to_signed, word_type, words_of

EDGES = [0, 1, 2**63 - 1, 2**63, 2**64 - 1]
SIZES = [1, 7, 8, 63, 64, 65, 130, 1000]


def words(seed: int, size: int) -> np.ndarray:
    x = np.random.default_rng(seed).integers(0, 2**64, size, dtype=np.uint64)
    x[: len(EDGES)] = EDGES[:size]
    return x


@pytest.mark.parametrize("size", SIZES)
def test_slicing_transposes_bits(size: int) -> None:
    x = words(3, size)
    for low, count in ((0, 64), (3, 20), (63, 1)):
        planes = np.empty((count, (size + 63) // 64), np.uint64)
        bits.slice_bits(x, low, count, planes)
        for i in range(count):
            expected = [(int(v) >> (low + i)) & 1 for v in x]
            out = np.empty(size, np.uint64)
            bits.unslice_bit(planes[i], out)
            assert out.tolist() == expected


@pytest.mark.parametrize("size", SIZES)
def test_planes_travel_in_whole_bytes_each(size: int) -> None:
    planes = words(5, 3 * ((size + 63) // 64)).reshape(3, -1)
    packed = bits.pack_planes(planes, size)
    assert len(packed) == 3 * ((size + 7) // 8)
    again = bits.unpack_planes(bytes(packed), 3, size)
    for a, b in zip(planes, again, strict=True):
        x, y = np.empty(size, np.uint64), np.empty(size, np.uint64)
        bits.unslice_bit(a, x)
        bits.unslice_bit(b, y)
        assert np.array_equal(x, y)


def test_monomials_are_all_subset_products() -> None:
    planes = words(7, 4 * 3).reshape(4, 3)
    out = np.empty((15, 3), np.uint64)
    bits.monomials(planes, out)
    for s in range(1, 16):
        expected = np.bitwise_and.reduce([planes[i] for i in range(4) if s >> i & 1])
        assert np.array_equal(out[s - 1], expected)


@pytest.mark.parametrize("dtype", [np.uint64, np.uint32])
@pytest.mark.parametrize("c", range(1, 9))
def test_a_chunk_shares_less_than_and_equal(c: int, dtype: type[np.unsignedinteger]) -> None:
    rng = np.random.default_rng(c)
    size = 2700  # 43 words: a block, a vector of words, and 3
    d, lam = rng.integers(0, 2 << c, size, dtype), rng.integers(0, 2 << c, size, dtype)
    d[:500] = lam[:500]
    words, chunks, rows = (size + 63) // 64, np.array([c]), 1 << c
    mono, room = np.empty(rows * words, np.uint64), compare.scratch(c)
    compare.chunk_monomials(bits.bytes_of(lam), lam.itemsize, chunks, rows, words, room, mono)
    part = rng.integers(0, 2**64, mono.shape, np.uint64)
    beta, none = rng.integers(0, 2**64, words, np.uint64), np.empty(0, np.uint64)
    both = np.zeros((2, words), np.uint64)
    for share, leader in ((part, True), (mono ^ part, False)):
        out, to = np.empty_like(both), np.array([-1, -2])
        how = (share, rows, none, 0, beta, leader, room, none, out)
        compare.open_chunks(bits.bytes_of(d), d.itemsize, chunks, to, *how)
        both ^= out
    low = dtype((1 << c) - 1)
    less = (d & low) < (lam & low)
    # the last chunk's share holds both signs, and each server's mask: here twice the same
    negative = less ^ (d >> dtype(c) != 0) ^ (lam >> dtype(c) != 0)
    for plane, expected in zip(both, (negative, d & low == lam & low), strict=True):
        got = np.empty(size, np.uint64)
        bits.unslice_bit(plane, got)
        assert np.array_equal(got.astype(bool), expected)


@pytest.mark.parametrize("size", [1, 64, 100, 2048, 2049, 4160])
def test_rows_in_blocks_travel_in_whole_bytes_each(size: int) -> None:
    words = (size + 63) // 64
    rows = np.random.default_rng(size).integers(0, 2**64, (3, words), np.uint64)
    rows[:, -1] &= np.uint64((1 << (size - 1) % 64 + 1) - 1)
    flat = bits.blocked(rows)
    assert flat[: 3 * min(words, bits.BLOCK)].tolist() == rows[:, : bits.BLOCK].ravel().tolist()
    packed = bits.pack_blocks(flat, size)
    assert len(packed) == 3 * ((size + 7) // 8)
    assert np.array_equal(bits.unpack_blocks(bytes(packed), 3, size), flat)


@pytest.mark.parametrize("width", [1, 2, 20, 63, 64])
def test_mask_facts_equal_integer_arithmetic(width: int) -> None:
    values = [reduce(np.array([v], np.uint64), width)[0] for v in EDGES]
    pairs = list(itertools.product(values, values))
    a, b = (np.array(x, np.uint64) for x in zip(*pairs, strict=True))
    total, carry, top = (np.empty_like(a) for _ in range(3))
    local.mask_facts(a, b, width, total, carry, top)
    for k, (x, y) in enumerate(pairs):
        s = int(x) + int(y)
        assert (int(total[k]), int(carry[k])) == (s % 2**width, s >> width)
        assert int(top[k]) == (s % 2**width) >> (width - 1)


@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize("own", [np.uint32, np.uint64])
@pytest.mark.parametrize("width", [1, 2, 17, 31, 32, 33, 64])
def test_what_a_selection_is_dealt_equals_integer_arithmetic(
    width: int, own: type, above: bool
) -> None:
    """Also of masks of which higher bits are set: those do not count."""
    word, wrap = word_type(width), 2 ** (8 * np.dtype(own).itemsize)
    values = np.array([*EDGES, *range(3)], np.uint64).astype(word)
    a, b, beta = np.array(list(itertools.product(values, values, (0, 1))), np.uint64).T
    size = a.size
    mine, rest = np.empty(2 * size, own), np.empty(3 * size if above else 0, own)
    mine[:size] = beta
    local.select_facts(a.astype(word), b.astype(word), width, mine, rest)
    for k in range(size):
        x, y, bit = int(a[k]) % 2**width, int(b[k]) % 2**width, int(beta[k])
        total, carry = (x + y) % 2**width, (x + y) >> width
        top = total >> (width - 1)
        assert (int(mine[k]), int(mine[size + k])) == (bit, bit * total % wrap)
        if above:
            assert rest[k::size].tolist() == [carry, top, bit * top]


def finish(
    z: np.ndarray, rest: np.ndarray, lam: np.ndarray, ring: int, truncate: int, leader: bool
) -> np.ndarray:
    """Masked shares of all of z, in tiles of odd sizes; what they pack must be they."""
    width = ring - truncate
    word = word_type(width)
    out, packed, start = np.empty(z.size, word), b"", 0
    for stop in (5, 600, 1601, z.size):
        count = (stop if stop == z.size else stop // 8 * 8) - start // 8 * 8
        space = packing.packed_space(count, width)
        local.finish_product(
            z[start:stop], start, rest, lam.astype(word), ring, truncate, width, leader, out, space
        )
        packed += packing.packed_bytes(space)
        start = stop
    assert packed == bytes(packing.pack(out, width))
    return out


@pytest.mark.parametrize(("ring", "truncate"), [(64, 16), (40, 8), (33, 0), (64, 0), (64, 63)])
def test_finish_product_truncates_within_one_ulp_in_the_small_ring(
    ring: int, truncate: int
) -> None:
    rng = np.random.default_rng([ring, truncate])
    size, width = 3000, ring - truncate
    z = rng.integers(-(2 ** (ring - 2)), 2 ** (ring - 2), size)
    z[:4] = [0, 1, -1, -(2**truncate) if truncate < 60 else 0]
    share, lam = words(1, size), rng.integers(0, 2**64, (2, size), np.uint64)
    rest = words(9, size)
    other = from_signed(z, 64) - share - rest
    a, b = (
        finish(share, rest, lam[0], ring, truncate, True),
        finish(other, np.zeros(size, np.uint64), lam[1], ring, truncate, False),
    )
    for k in range(size):
        got = (int(a[k]) + int(b[k]) - int(lam[0][k]) - int(lam[1][k])) % 2**width
        got -= 2**width if got >= 2 ** (width - 1) else 0
        error = (got << truncate) - int(z[k])
        error -= round(error / 2**ring) * 2**ring
        assert abs(error) < 2**truncate


def test_fixed_point_round_trips_at_every_width() -> None:
    x = np.array([-3.75, -0.5, 0.0, 0.25, 3.75])
    for width in (8, 20, 63, 64):
        assert np.array_equal(decode(encode(x, 4, width), 4, width), x)
    assert encode(np.array([0.3]), 0, 8)[0] == 0
    assert words_of([-1, 5], (2,), 8).tolist() == [255, 5]
    assert to_signed(np.array([255, 127], np.uint64), 8).tolist() == [-1, 127]
