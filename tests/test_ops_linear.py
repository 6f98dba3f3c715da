"""Gemm, MatMul, Conv, BatchNormalization against onnxruntime.

Weights lie on a grid of 2^-8 and inputs on the plan's grid, so the only errors are one truncation
(1 ulp) and onnxruntime's own float32 sums (below 1 ulp at these sizes).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.onnx_cases import Array, agree, model_of, node, ops_of, rng_of

pytestmark = pytest.mark.slow

ULPS = 2.0


def weights(rng: np.random.Generator, *shape: int) -> Array:
    return (rng.integers(-256, 257, shape) / 256).astype(np.float32)


def sample(rng: np.random.Generator, *shape: int) -> Array:
    return rng.uniform(-4, 4, shape).astype(np.float32)


@pytest.mark.parametrize("transpose", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_gemm_transposes_either_operand(transpose: tuple[int, int]) -> None:
    rng = rng_of(1)
    a, b = transpose
    x, w = sample(rng, *((5, 3) if a else (3, 5))), weights(rng, *((4, 5) if b else (5, 4)))
    model = model_of(
        [node("Gemm", ["x", "w", "c"], transA=a, transB=b)],
        {"x": x.shape},
        {"w": w, "c": weights(rng, 4)},
    )
    compiled = agree(model, [x], ulps=ULPS, rng=rng)
    assert ops_of(compiled.plan)[-1] == "matmul"


def test_gemm_scales_by_alpha_and_beta() -> None:
    rng = rng_of(2)
    x, w, c = sample(rng, 2, 5), weights(rng, 5, 4), weights(rng, 2, 4)
    model = model_of(
        [node("Gemm", ["x", "w", "c"], alpha=0.5, beta=-2.0)], {"x": x.shape}, {"w": w, "c": c}
    )
    assert ops_of(agree(model, [x], ulps=ULPS, rng=rng).plan) == ["matmul"]


def test_gemm_multiplies_two_secret_operands_and_adds_a_secret_third() -> None:
    rng = rng_of(3)
    x, y, z = sample(rng, 2, 5), sample(rng, 5, 4), sample(rng, 4)
    model = model_of(
        [node("Gemm", ["x", "w", "c"], alpha=0.25, beta=3.0)],
        {"x": x.shape, "w": y.shape, "c": z.shape},
    )
    agree(model, [x, y, z], ulps=3, rng=rng)


def test_gemm_takes_a_constant_on_the_left() -> None:
    rng = rng_of(4)
    x = sample(rng, 5, 4)
    model = model_of([node("Gemm", ["w", "x"])], {"x": x.shape}, {"w": weights(rng, 3, 5)})
    agree(model, [x], ulps=ULPS, rng=rng)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((3, 5), (5, 4)),
        ((5,), (5, 4)),
        ((3, 5), (5,)),
        ((5,), (5,)),
        ((2, 3, 5), (5, 4)),
        ((2, 1, 3, 5), (3, 5, 4)),
        ((2, 3, 5), (5,)),
        ((5,), (2, 5, 4)),
    ],
)
@pytest.mark.parametrize("secret", ["left", "right", "both"])
def test_matmul_broadcasts_as_numpy_does(left: Any, right: Any, secret: str) -> None:
    rng = rng_of(5)
    arrays = {"a": weights(rng, *left), "b": weights(rng, *right)}
    names = {"left": ["a"], "right": ["b"], "both": ["a", "b"]}[secret]
    model = model_of(
        [node("MatMul", ["a", "b"])],
        {n: arrays[n].shape for n in names},
        {n: v for n, v in arrays.items() if n not in names},
    )
    agree(model, [arrays[n] for n in names], ulps=ULPS, rng=rng)


@pytest.mark.parametrize(
    ("x", "w", "attrs"),
    [
        ((2, 3, 6, 7), (4, 3, 3, 2), {}),
        ((1, 3, 6, 7), (4, 3, 3, 3), {"pads": [1, 0, 2, 1], "strides": [2, 1]}),
        ((1, 2, 8, 8), (3, 2, 3, 3), {"dilations": [2, 1], "pads": [0, 1, 0, 1]}),
        ((1, 4, 5, 5), (6, 2, 3, 3), {"group": 2}),
        ((1, 4, 5, 5), (4, 1, 3, 3), {"group": 4, "pads": [1] * 4}),
        ((1, 2, 7, 6), (3, 2, 3, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
        ((1, 2, 7, 6), (3, 2, 2, 2), {"auto_pad": "SAME_LOWER"}),
        ((1, 2, 7, 6), (3, 2, 2, 2), {"auto_pad": "VALID", "kernel_shape": [2, 2]}),
        ((2, 3, 9), (4, 3, 3), {}),
        ((1, 4, 9), (4, 2, 3), {"group": 2, "pads": [2, 0], "strides": [2], "dilations": [2]}),
    ],
)
def test_conv_understands_every_attribute(x: Any, w: Any, attrs: dict[str, Any]) -> None:
    rng = rng_of(6)
    data = sample(rng, *x)
    model = model_of(
        [node("Conv", ["x", "w", "b"], **attrs)],
        {"x": x},
        {"w": weights(rng, *w), "b": weights(rng, w[0])},
    )
    compiled = agree(model, [data], ulps=ULPS, rng=rng)
    assert [o for o in ops_of(compiled.plan) if o != "reshape"] == ["conv"]


def test_conv_takes_its_weights_and_bias_from_a_secret_input() -> None:
    rng = rng_of(7)
    x, w, c = sample(rng, 1, 2, 5, 5), sample(rng, 3, 2, 2, 2), sample(rng, 3)
    model = model_of([node("Conv", ["x", "w", "c"])], {"x": x.shape, "w": w.shape, "c": c.shape})
    agree(model, [x, w, c], ulps=3, rng=rng)


def test_batch_normalization_that_stands_alone_is_one_product() -> None:
    rng = rng_of(8)
    x = sample(rng, 2, 3, 2, 2)
    statistics = {k: np.array([0.5, 1.0, 1.5], np.float32) for k in "abcd"}
    model = model_of(
        [
            node("Relu", ["x"], ["h"]),
            node("BatchNormalization", ["h", *"abcd"], epsilon=0.0),
        ],
        {"x": x.shape},
        statistics,
    )
    compiled = agree(model, [x], ulps=4, rng=rng)
    assert ops_of(compiled.plan).count("mul") == 1
