"""Weighted sums against Python integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpcserve.kernels.weighing import weighed
from tests.onnx_cases import rng_of


@pytest.mark.parametrize("word", [np.uint32, np.uint64])
@pytest.mark.parametrize(("lead", "length", "tail"), [(1, 5, 1), (3, 7, 1), (2, 4, 9)])
@pytest.mark.parametrize("taps", [1, 2, 5])
def test_weighed_sums_wrap_in_their_word(
    word: Any, lead: int, length: int, tail: int, taps: int
) -> None:
    rng, most = rng_of(taps), np.iinfo(word).max
    x = rng.integers(0, most, (lead, length, tail), word, endpoint=True)
    factors = rng.integers(0, most, (6, taps), word, endpoint=True)
    indices = rng.integers(0, length, (6, taps))
    out = np.empty((lead, 6, tail), word)
    weighed(x, indices, factors, out)
    for at in np.ndindex(out.shape):
        i, k, j = at
        total = sum(int(x[i, n, j]) * int(f) for n, f in zip(indices[k], factors[k], strict=True))
        assert int(out[at]) == total % (int(most) + 1)
