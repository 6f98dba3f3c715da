"""Ten million random products with truncation: none wraps, every error is below one ulp."""

from __future__ import annotations

import numpy as np
import pytest

from mpcserve.protocol import Together
from tests.plans import PlanWriter

PER_RUN = 500_000
TRIED = 10_000_000


@pytest.mark.parametrize("truncate", [13, 16])
def test_ten_million_truncated_products_are_each_within_one_ulp(truncate: int) -> None:
    rng = np.random.default_rng([7, truncate])
    p = PlanWriter()
    ring = 62
    a, b = p.input((PER_RUN,), ring, bound=30), p.input((PER_RUN,), ring, bound=30)
    z = p.emit(
        "mul", [a, b], width=ring - truncate, frac_bits=-truncate, bound=61 - truncate - 1,
        ring=ring, truncate=truncate,
    )  # fmt: skip
    together, worst, up, tried = Together(p.done(z), {}), 0.0, 0.0, 0
    for run in range(TRIED // PER_RUN // 2):
        x = rng.integers(-(2**29), 2**29, PER_RUN)
        y = rng.integers(-(2**29), 2**29, PER_RUN)
        if run == 0:
            x[: PER_RUN // 2] = 2**29 - 1
            y[: PER_RUN // 4] = -(2**29) + 1
        outputs, _ = together.infer([x.astype(np.float64), y.astype(np.float64)])
        got = np.ldexp(outputs[0], -truncate).astype(np.int64)
        # exact in int64: |x·y| < 2^58, and got·2^t differs from it by less than 2^t
        error = (got << truncate) - x * y
        worst = max(worst, float(np.abs(error).max()) / 2.0**truncate)
        up += float(error.mean()) / 2.0**truncate
        tried += error.size
    print(f"{tried} products, truncate {truncate}: worst error {worst:.6f} ulp")
    assert worst < 1
    assert abs(up / (TRIED // PER_RUN // 2)) < 1e-3


def test_exact_multiples_stay_exact() -> None:
    p = PlanWriter()
    a, b = p.input((4096,), 40, bound=12), p.input((1,), 40, bound=17)
    z = p.emit("mul", [a, b], width=24, frac_bits=-16, bound=13, ring=40, truncate=16)
    x = np.arange(-2048, 2048)
    outputs, _ = Together(p.done(z), {}).infer([x, np.array([65536.0])])
    assert np.array_equal(outputs[0] / 65536, x)
