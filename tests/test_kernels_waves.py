"""Sines and cosines in integers: the same bits as whole numbers give, at any place of any block."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from mpcserve.kernels import waves

SIZES = (1, waves.BLOCK - 1, waves.BLOCK, 2 * waves.BLOCK + 7)
WORD = 1 << 64
HALF = 1 << (waves.ONE_BITS - 1)


def turned(angle: int, width: int, harmonics: int) -> list[tuple[int, int]]:
    """2^30·cos and 2^30·sin of an angle's multiples, by angle addition in Python's integers."""
    table = waves.tables(width)
    low = max(width - 10, 0)
    (ca, sa), (cb, sb) = (
        (int(part[0, at]), int(part[1, at]))
        for part, at in zip(table, divmod(angle, 1 << low), strict=True)
    )
    one = added(ca, sa, cb, sb)
    found = [one]
    while len(found) < harmonics:
        found.append(added(*found[-1], *one))
    return found


def added(ca: int, sa: int, cb: int, sb: int) -> tuple[int, int]:
    """cos and sin of the sum of two angles."""
    cos, sin = ca * cb - sa * sb, sa * cb + ca * sb
    return (cos + HALF) >> waves.ONE_BITS, (sin + HALF) >> waves.ONE_BITS


def angles(size: int, width: int) -> NDArray[np.uint64]:
    found = np.random.default_rng(size).integers(0, 1 << width, size).astype(np.uint64)
    found[-1] = (1 << width) - 1
    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("width", [6, 10, 23])
def test_masks_are_rounded_waves_of_the_angle(size: int, width: int) -> None:
    lam, bits = angles(size, width), np.array([26, 20, 17])
    out = np.empty((6, size), np.uint64)
    waves.wave_masks(lam, width, *waves.tables(width), bits, waves.scratch(), out)
    for e in {0, size // 2, size - 1}:
        for k, pair in enumerate(turned(int(lam[e]), width, 3)):
            drop = waves.ONE_BITS - int(bits[k])
            for row, wave in enumerate(pair):
                assert int(out[2 * k + row, e]) == ((wave + (1 << (drop - 1))) >> drop) % WORD
    turns = 2 * math.pi * lam.astype(float) / 2.0**width
    for k in range(3):
        cosine, sine = out[2 * k : 2 * k + 2].view(np.int64) / 2.0 ** bits[k]
        assert np.abs(cosine - np.cos((k + 1) * turns)).max() < 2.0 ** -int(bits[k])
        assert np.abs(sine - np.sin((k + 1) * turns)).max() < 2.0 ** -int(bits[k])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sums", [1, 3])
def test_shares_are_the_sums_of_the_definition(size: int, sums: int) -> None:
    width, count, rng = 22, 4, np.random.default_rng(sums)
    delta, table = angles(size, width), waves.tables(width)
    sine, cosine = (rng.integers(-(1 << 30), 1 << 30, (sums, count)) for _ in range(2))
    lift = np.array([0, 3, 1, 2], np.uint64)
    dealt = rng.integers(0, WORD - 1, (2 * count, size), np.uint64, endpoint=True)
    out = np.empty((size, sums), np.uint64)
    waves.wave_share(delta, width, *table, sine, cosine, lift, dealt, waves.scratch(sums), out)
    for e in {0, size // 2, size - 1}:
        harmonics = turned(int(delta[e]), width, count)
        for p in range(sums):
            expected = 0
            for k, (c, s) in enumerate(harmonics):
                a, b = int(sine[p, k]), int(cosine[p, k])
                by_c = (a * s + b * c + HALF) >> waves.ONE_BITS
                by_s = (b * s - a * c + HALF) >> waves.ONE_BITS
                pair = by_c * int(dealt[2 * k, e]) + by_s * int(dealt[2 * k + 1, e])
                expected += pair << int(lift[k])
            assert int(out[e, p]) == expected % WORD
