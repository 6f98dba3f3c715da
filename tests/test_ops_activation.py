"""Smooth operators as ONNX models, through the real protocol, against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from mpcserve.compiler import CompiledModel, compile_model
from mpcserve.errors import ModelError
from mpcserve.plan import bill_of
from mpcserve.protocol import Together
from tests.onnx_cases import NEWEST, Array, model_of, node, on_grid, plain, rng_of

pytestmark = pytest.mark.slow

SHAPE = (2, 3, 50)


def close(
    model: onnx.ModelProto, inputs: list[Array], error: float, **options: Any
) -> CompiledModel:
    """Compile, run all three roles, compare with onnxruntime: |error| ≤ error·max(1, |y|)."""
    made = compile_model(model, **({"input_range": (-8.0, 8.0)} | options))
    grid = [on_grid(made.plan, k, x) for k, x in enumerate(inputs)]
    outputs, bill = Together(made.plan, made.weights).infer(grid)
    assert bill == bill_of(made.plan)
    for got, expected in zip(outputs, plain(model, *grid), strict=True):
        assert got.shape == expected.shape and got.dtype == expected.dtype
        assert np.all(np.abs(got - expected) <= error * np.maximum(1, np.abs(expected)))
    return made


def spread(rng: np.random.Generator, low: float, high: float, *shape: int) -> Array:
    """Uniform, with both ends among them."""
    x = rng.uniform(low, high, shape).astype(np.float32)
    x.ravel()[:2] = low, high
    return x


@pytest.mark.parametrize("reach", [4.0, 100.0])
@pytest.mark.parametrize(
    ("op", "attrs"),
    [
        ("Sigmoid", {}),
        ("Tanh", {}),
        ("Erf", {}),
        ("Gelu", {}),
        ("Gelu", {"approximate": "tanh"}),
        ("Softplus", {}),
        ("Softsign", {}),
        ("Elu", {}),
        ("Elu", {"alpha": 2.0}),
        ("Selu", {}),
        ("Celu", {"alpha": 2.0}),
        ("HardSigmoid", {"alpha": 0.3, "beta": 0.4}),
        ("HardSwish", {}),
        ("Sin", {}),
        ("Cos", {}),
    ],
)
def test_activations_agree_on_the_whole_line(op: str, attrs: Any, reach: float) -> None:
    model = model_of([node(op, ["x"], **attrs)], {"x": SHAPE})
    x = spread(rng_of(1), -reach, reach, *SHAPE)
    made = close(model, [x], 2e-4, input_range=(-reach, reach))
    assert bill_of(made.plan).rounds <= (9 if op == "Softsign" else 5)


def test_silu_as_it_is_exported_needs_two_rounds_and_a_product() -> None:
    model = model_of([node("Sigmoid", ["x"], ["s"]), node("Mul", ["x", "s"])], {"x": SHAPE})
    made = close(model, [spread(rng_of(3), -8, 8, *SHAPE)], 2e-4)
    assert bill_of(made.plan).rounds <= 3


@pytest.mark.parametrize(
    ("op", "low", "high"),
    [
        ("Exp", -16, 0),
        ("Exp", -9, 6),
        ("Log", 0.01, 50),
        ("Sqrt", 0, 50),
        ("Sqrt", 0.5, 2),
        ("Reciprocal", 0.25, 64),
    ],
)
def test_functions_of_positive_ranges_agree(op: str, low: float, high: float) -> None:
    model = model_of([node(op, ["x"])], {"x": SHAPE})
    x = spread(rng_of(4), max(low, 2**-10) if op == "Sqrt" else low, high, *SHAPE)
    close(model, [x], 2e-4, input_range=(low, high))


@pytest.mark.parametrize("other", [SHAPE, (3, 1), ()])
def test_a_quotient_of_secrets_broadcasts(other: Any) -> None:
    rng = rng_of(5)
    model = model_of([node("Div", ["x", "z"])], {"x": SHAPE, "z": other})
    inputs = [spread(rng, 0.5, 8, *SHAPE), rng.uniform(0.5, 8, other).astype(np.float32)]
    close(model, inputs, 2e-4, input_range=(0.5, 8.0))
    model = model_of([node("Div", ["c", "x"])], {"x": SHAPE}, {"c": np.float32(-3.0)})
    close(model, [spread(rng, 0.5, 8, *SHAPE)], 2e-4, input_range=(0.5, 8.0))


@pytest.mark.parametrize("exponent", [2.0, 3.0, 0.5, -0.5, -1.0, 1.7, 0.0])
def test_constant_powers_agree(exponent: float) -> None:
    model = model_of([node("Pow", ["x", "p"])], {"x": SHAPE}, {"p": np.float32(exponent)})
    close(model, [spread(rng_of(6), 0.5, 4, *SHAPE)], 5e-4, input_range=(0.5, 4.0))


def test_a_power_may_differ_between_elements() -> None:
    powers = np.array([2, 1, 3, 2], np.float32)
    model = model_of([node("Pow", ["x", "p"])], {"x": (3, 4)}, {"p": powers})
    made = close(model, [spread(rng_of(7), -4, 4, 3, 4)], 2e-4, input_range=(-4.0, 4.0))
    assert bill_of(made.plan).rounds == 2


def test_a_power_may_be_secret() -> None:
    rng = rng_of(8)
    model = model_of([node("Pow", ["x", "z"])], {"x": SHAPE, "z": SHAPE})
    x, z = spread(rng, 0.5, 2, *SHAPE), spread(rng, 0.5, 2, *SHAPE)
    close(model, [x, z], 5e-4, input_range=(0.5, 2.0))


def test_a_pole_within_a_declared_range_is_refused_with_a_way_out() -> None:
    model = model_of([node("Log", ["x"])], {"x": SHAPE})
    with pytest.raises(ModelError, match="expected to be positive") as caught:
        compile_model(model, input_range=(-1.0, 1.0))
    assert "calibrate" in caught.value.hint
    samples = spread(rng_of(9), 0.5, 4, *SHAPE)
    close(model, [samples], 3e-4, input_range=None, calibrate=samples)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("reach", [4.0, 40.0])
@pytest.mark.parametrize(("opset", "axis"), [(11, 1), (NEWEST, 1), (NEWEST, -1), (NEWEST, 0)])
def test_softmax_agrees_on_every_axis(op: str, reach: float, opset: int, axis: int) -> None:
    model = model_of([node(op, ["x"], axis=axis)], {"x": (3, 4, 10)}, opset=opset)
    x = spread(rng_of(10), -reach, reach, 3, 4, 10)
    close(model, [x], 5e-4, input_range=(-reach, reach))


@pytest.mark.parametrize("keepdims", [0, 1])
def test_log_sum_exp_over_several_axes_agrees(keepdims: int) -> None:
    model = model_of(
        [node("ReduceLogSumExp", ["x", "a"], keepdims=keepdims)],
        {"x": (2, 3, 4)},
        {"a": np.array([0, 2])},
    )
    close(model, [spread(rng_of(11), -20, 20, 2, 3, 4)], 2e-4, input_range=(-20.0, 20.0))
