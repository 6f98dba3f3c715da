"""What owners mask and what they are given, against Python's integers."""

from __future__ import annotations

import numpy as np
import pytest

from mpcserve.kernels import handover, packing
from mpcserve.ring import word_type

WIDTHS = [2, 7, 19, 31, 32, 33, 57, 63, 64]
SIZES = [1, 8, 2047, 2048, 5001]


def integers(rng: np.random.Generator, width: int, size: int) -> np.ndarray:
    """Words mod 2^width, its ends among them."""
    words = rng.integers(0, 1 << 64, size, np.uint64) >> np.uint64(64 - width)
    ends = [0, 1, (1 << width) - 1, 1 << (width - 1), (1 << (width - 1)) - 1]
    words[: min(size, len(ends))] = ends[:size]
    return words.astype(word_type(width))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("size", SIZES)
def test_masked_reals_are_rounded_masked_and_packed(width: int, size: int) -> None:
    rng = np.random.default_rng([width, size])
    unit = 2.0 ** (width // 2)
    x = rng.uniform(-1, 1, size) * 2.0 ** (width - 1) / unit
    x[0] = 0.5 / unit  # halves go to the even integer
    lam, other = integers(rng, width, size), integers(rng, width, size)[::-1].copy()
    whole = [round(float(v) * unit) for v in x]
    expected = [
        (v + a + b) % (1 << width)
        for v, a, b in zip(whole, lam.tolist(), other.tolist(), strict=True)
    ]
    space = packing.packed_space(size, width)
    handover.mask_reals(x, unit, lam, other, width, space)
    assert packing.unpack(packing.packed_bytes(space), size, width).tolist() == expected


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("size", SIZES)
def test_two_shares_add_up_to_what_was_masked(width: int, size: int) -> None:
    rng = np.random.default_rng([width, size, 1])
    delta, a, b, r = (integers(rng, width, size) for _ in range(4))
    rng.shuffle(a)
    rng.shuffle(r)
    sent = []
    for half, leader in ((a, True), (b, False)):
        space = packing.packed_space(size, width)
        handover.share_out(delta, half, r.copy(), leader, width, space)
        sent.append(packing.packed_bytes(space))
    q = 1 << width
    lists = [v.tolist() for v in (delta, a, b, r)]
    alice = [(d - x + f) % q for d, x, _, f in zip(*lists, strict=True)]
    assert packing.unpack(sent[0], size, width).tolist() == alice
    expected = [(d - x - y) % q for d, x, y, _ in zip(*lists, strict=True)]
    assert packing.sum_of(*sent, size, width).tolist() == expected


@pytest.mark.parametrize("width", WIDTHS)
def test_words_stand_for_signed_numbers(width: int) -> None:
    words = integers(np.random.default_rng(width), width, 300)
    out = np.empty(300)
    handover.reals_of(words, width, 2.0**-5, out)
    half, q = 1 << (width - 1), 1 << width
    assert out.tolist() == [float((v + half) % q - half) / 32 for v in words.tolist()]


def test_what_is_only_read_may_be_read_only() -> None:
    x, words = np.ones(9), np.arange(9, dtype=np.uint32)
    for given in (x, words):
        given.flags.writeable = False
    space = packing.packed_space(9, 20)
    handover.mask_reals(x, 4.0, words.copy(), words, 20, space)
    assert packing.unpack(packing.packed_bytes(space), 9, 20).tolist() == [*range(4, 22, 2)]
    handover.share_out(words, words, words.copy(), True, 20, space)
    assert packing.unpack(packing.packed_bytes(space), 9, 20).tolist() == [*range(9)]
