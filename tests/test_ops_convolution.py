"""Convolutions over any number of axes, transposed and deformed: one product, nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

from mpcserve.compiler import compile_model
from tests.onnx_cases import agree, model_of, node, on_grid, ops_of, rng_of
from tests.plan_interpreter import Interpreter

ULPS = 2.0


def weights(rng: np.random.Generator, *shape: int) -> Any:
    return (rng.integers(-256, 257, shape) / 256).astype(np.float32)


def one_product(
    op: str, x: Any, w: Any, c: int, secret_weights: bool = False, **attrs: Any
) -> None:
    """As onnxruntime; one interactive instruction."""
    rng = rng_of(1)
    sample, kernel = rng.uniform(-4, 4, x).astype(np.float32), weights(rng, *w)
    given = {"c": weights(rng, c)}
    if secret_weights:
        model = model_of([node(op, ["x", "w"], **attrs)], {"x": x, "w": w})
        agree(model, [sample, kernel], ulps=3, rng=rng)
        return
    model = model_of([node(op, ["x", "w", "c"], **attrs)], {"x": x}, {"w": kernel, **given})
    compiled = agree(model, [sample], ulps=ULPS, rng=rng)
    products = [o for o in ops_of(compiled.plan) if o in ("conv", "mul", "matmul", "extend")]
    assert products == ["conv"]


SPACES: list[tuple[Any, Any, dict[str, Any]]] = [
    ((2, 4, 9), (6, 2, 3), {"strides": [2], "pads": [1, 2], "group": 2}),
    ((1, 2, 5, 4, 6), (3, 2, 2, 3, 2), {"strides": [2, 1, 2], "pads": [1, 0, 1, 0, 1, 1]}),
    ((2, 4, 6, 4, 4), (4, 1, 3, 2, 2), {"dilations": [2, 1, 1], "group": 4}),
    ((1, 1, 5, 4, 4), (2, 1, 3, 3, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 2, 2]}),
]


@pytest.mark.parametrize(("x", "w", "attrs"), SPACES)
def test_conv_over_one_and_three_axes_is_one_product(x: Any, w: Any, attrs: Any) -> None:
    one_product("Conv", x, w, w[0], **attrs)


def test_conv_over_three_axes_of_two_secrets() -> None:
    one_product("Conv", (1, 2, 4, 4, 3), (2, 2, 2, 2, 2), 2, secret_weights=True)


TRANSPOSED: list[tuple[Any, Any, dict[str, Any]]] = [
    ((1, 3, 5), (3, 2, 4), {"strides": [2], "pads": [1, 1]}),
    ((1, 2, 4, 3), (2, 3, 3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ((2, 2, 3, 4), (2, 2, 2, 3), {"strides": [3, 2], "output_padding": [1, 1]}),
    ((1, 4, 3, 3), (4, 2, 3, 3), {"strides": [2, 1], "group": 2, "dilations": [2, 2]}),
    ((1, 2, 3, 3), (2, 1, 3, 3), {"strides": [2, 2], "output_shape": [6, 5]}),
    ((1, 2, 3, 4), (2, 1, 4, 4), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    ((1, 2, 3, 2, 3), (2, 2, 2, 3, 2), {"strides": [2, 1, 2], "pads": [0, 1, 0, 1, 0, 1]}),
]


@pytest.mark.parametrize(("x", "w", "attrs"), TRANSPOSED)
def test_a_transposed_convolution_is_one_product(x: Any, w: Any, attrs: Any) -> None:
    one_product("ConvTranspose", x, w, w[1] * attrs.get("group", 1), **attrs)


def test_a_transposed_convolution_of_two_secrets() -> None:
    one_product("ConvTranspose", (1, 2, 3, 3), (2, 2, 3, 3), 2, secret_weights=True, strides=[2, 2])


def test_a_transposed_convolution_multiplies_no_zeros_in() -> None:
    model = model_of(
        [node("ConvTranspose", ["x", "w"], strides=[2, 2])],
        {"x": (1, 3, 8, 8)},
        {"w": weights(rng_of(5), 3, 4, 2, 2)},
    )
    plan = compile_model(model).plan
    (product,) = [i for i in plan.instructions if i.op == "conv"]
    assert product.value.shape == (1, 16, 8, 8)
    assert plan.value(product.inputs[1]).shape == (16, 3, 1, 1)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_deformed_convolution_samples_at_public_offsets(groups: int) -> None:
    rng = rng_of(6)
    x, mask = (
        rng.uniform(-1, 1, s).astype(np.float32) for s in ((1, 4, 5, 5), (1, 4 * groups, 4, 4))
    )
    given = {
        "w": weights(rng, 2, 2, 2, 2),
        "o": rng.uniform(-2, 2, (1, 8 * groups, 4, 4)).astype(np.float32),
        "c": weights(rng, 2),
        "m": mask,
    }
    attrs = {"kernel_shape": [2, 2], "offset_group": groups, "group": 2}
    model = model_of(
        [node("DeformConv", ["x", "w", "o", "c", "m"], **attrs)], {"x": x.shape}, given
    )
    compiled = compile_model(model, input_range=(-1, 1), ring=64)
    grid = on_grid(compiled.plan, 0, x)
    (got,) = Interpreter(compiled.plan, compiled.weights, rng).run(grid)
    (expected,) = ReferenceEvaluator(model).run(None, {"x": grid})
    assert np.abs(got - expected).max() < 20 * 2.0**-16
