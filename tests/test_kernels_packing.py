"""Packing of values of any width, against Python integers."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mpcserve.kernels import packing
from mpcserve.ring import Words, reduce, word_type

SIZES = [1, 7, 8, 15, 16, 17, 65, 130, 1000]


def words(seed: int, size: int, width: int) -> Words:
    """Any words of this width, with its least and greatest among them."""
    x = np.random.default_rng(seed).integers(0, 2**64, size, dtype=np.uint64)
    x[: size // 4 * 2 : 2] = np.resize(np.array([0, 2**64 - 1], np.uint64), size // 4)
    return reduce(x, width)


def as_integer(x: Words, width: int) -> bytes:
    """One long integer, little-endian."""
    number = sum(int(v) << (k * width) for k, v in enumerate(x))
    return number.to_bytes((x.size * width + 7) // 8, "little")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("width", range(1, 65))
def test_packed_values_are_one_long_little_endian_integer(width: int, size: int) -> None:
    x, mine = words(width, size, width), words(size, size, width)
    packed = packing.pack(x, width)
    assert bytes(packed) == as_integer(x, width)
    for data in (packed, bytes(packed), bytearray(packed)):
        assert np.array_equal(packing.unpack(data, size, width), x)
    sums = [(int(a) + int(b)) % 2**width for a, b in zip(x, mine, strict=True)]
    assert packing.joined(mine, bytes(packed), width).tolist() == sums


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("width", range(1, 65))
def test_differences_are_packed_as_they_are_mod_2_to_the_width(width: int, size: int) -> None:
    """Bits above the width do not count."""
    x, y = (words(seed, size, 64).astype(word_type(width)) for seed in (width, 100 + size))
    differences = [(int(a) - int(b)) % 2**width for a, b in zip(x, y, strict=True)]
    before = x.copy()
    packed = packing.pack_difference(x, y, width)
    assert packing.unpack(packed, size, width).tolist() == differences
    assert np.array_equal(x, before)


@pytest.mark.parametrize("width", [3, 8, 9, 25, 30, 31, 33, 40, 57, 59, 63])
def test_values_are_packed_wherever_they_begin_and_bytes_wherever_they_lie(width: int) -> None:
    x = words(width, 203, width)
    for skipped in range(1, 5):
        part = x[skipped:]
        packed = bytes(packing.pack(part, width))
        assert packed == as_integer(part, width)
        moved = memoryview(bytes(skipped) + packed)[skipped:]
        assert np.array_equal(packing.unpack(moved, part.size, width), part)


@pytest.mark.parametrize("width", range(1, 65))
def test_packing_writes_zeros_behind_the_values_and_nothing_else(width: int) -> None:
    for size in (1, 16, 33, 72):
        x = words(width, size, width)
        packed, spare = as_integer(x, width), packing.SPARE
        place = np.full(len(packed) + spare + 100, 0xA5, np.uint8)
        packing._pack(x, width, place)
        assert place[: len(packed)].tobytes() == packed
        written = place[len(packed) : len(packed) + spare]
        assert set(written.tolist()) <= {0, 0xA5}
        assert set(place[len(packed) + spare :].tolist()) == {0xA5}


def test_unpacking_reads_nothing_behind_the_last_byte() -> None:
    """Behind the bytes lies a page that nobody may read."""
    page = mmap.PAGESIZE
    pages = mmap.mmap(-1, 2 * page)
    place = np.frombuffer(pages, np.uint8)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    guarded = ctypes.c_void_p(place.ctypes.data + page)
    nothing = 0
    assert protect(guarded, ctypes.c_size_t(page), nothing) == 0
    for width in range(1, 65):
        for size in (1, 15, 16, 33, 72, 200):
            x = words(width, size, width)
            packed = as_integer(x, width)
            data = place[page - len(packed) : page]
            data[:] = np.frombuffer(packed, np.uint8)
            assert np.array_equal(packing.unpack(data.data, size, width), x)


def test_pack_never_aliases_its_operand() -> None:
    for width in (5, 64):
        x = words(1, 100, width)
        packed = packing.pack(x, width)
        before = bytes(packed)
        x += word_type(width)(1)
        assert bytes(packed) == before


OTHER_MACHINE = """
from tests import test_kernels_packing as here

for width in range(1, 65):
    here.test_packed_values_are_one_long_little_endian_integer(width, 203)
print("same")
"""


@pytest.mark.slow
def test_a_machine_without_byte_shuffles_packs_the_same(tmp_path: Path) -> None:
    env = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    env |= {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", OTHER_MACHINE]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("same\n", "")
