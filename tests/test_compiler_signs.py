"""What is known of a value's sign, and of whole numbers, whatever the input is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from mpcserve.compiler import compile_model
from mpcserve.errors import ModelError
from mpcserve.plan import bill_of
from mpcserve.protocol import Together
from tests.onnx_cases import Array, agree, model_of, node, ops_of, plain, rng_of

F32 = np.float32


def weighed(sign: float) -> Any:
    """Neighbours weighed by 1 / max(sign · distance, 1e-6): two distances, two values."""
    nodes = [
        node("Sub", ["x", "points"], ["gap"]),
        node("ReduceSumSquare", ["gap", "last"], ["square"], keepdims=0),
        node("Sqrt", ["square"], ["distance"]),
        node("Mul", ["distance", "sign"], ["signed"]),
        node("Max", ["signed", "least"], ["far"]),
        node("Reciprocal", ["far"], ["weight"]),
        node("Mul", ["weight", "values"], ["part"]),
        node("ReduceSum", ["part", "one"], ["sum"]),
        node("ReduceSum", ["weight", "one"], ["whole"]),
        node("Div", ["sum", "whole"], ["mean"]),
        node("ReduceSum", ["x", "last"], ["moved"], keepdims=0),
        node("Add", ["mean", "moved"]),
    ]
    constants = {
        "points": np.array([[[0, 0, 1], [1, 2, 0], [-2, 0, 1]]]),
        "values": np.array([[3.0, -1, 0.5]]),
        "sign": F32(sign),
        "least": F32(1e-6),
        "last": np.array([2]),
        "one": np.array([1]),
    }
    constants = {k: v.astype(F32) if k == "points" else v for k, v in constants.items()}
    return model_of(nodes, {"x": ("N", 1, 3)}, constants)


def served(model: Any, x: Array, **options: Any) -> tuple[Any, Array]:
    made = compile_model(model, batch=len(x), **options)
    (got,), bill = Together(made.plan, made.weights).infer([x])
    assert bill == bill_of(made.plan)
    return made.plan, got


def test_the_larger_of_a_negated_distance_and_a_constant_is_the_constant() -> None:
    x = rng_of(1).uniform(-3, 3, (6, 1, 3)).astype(F32)
    plan, got = served(weighed(-1.0), x, calibrate=x)
    assert np.abs(got - plain(weighed(-1.0), x)[0]).max() < 1e-4
    assert "sign" not in ops_of(plan)


def test_inverse_distances_weigh_neighbours_even_if_samples_were_some_of_them() -> None:
    model = weighed(1.0)
    points = np.array([[0, 0, 1], [1, 2, 0], [-2, 0, 1]], F32)[:, None]
    x = np.concatenate([rng_of(2).uniform(-3, 3, (5, 1, 3)).astype(F32), points])
    # Every sample lies on a point: no sum of weights is below 10^6, where the others' is about 1.
    _, got = served(model, x, calibrate=np.repeat(points, 6, 0))
    assert np.abs(got - plain(model, x)[0]).max() < 2e-3


@pytest.mark.parametrize("op", ["Max", "Min"])
def test_only_what_has_a_known_sign_yields_to_a_constant(op: str) -> None:
    side = 1.0 if op == "Max" else -1.0
    nodes = [node("Abs", ["x"], ["a"]), node("Mul", ["a", "turn"], ["b"]),
             node("Add", ["x", "b"], ["c"]), node(op, ["c", "end"], ["d"]),
             node("Add", ["d", "x"])]  # fmt: skip
    constants = {"turn": F32(-side), "end": F32(side)}
    # x − |x| is never positive; that follows from no sign of its parts.
    plan = agree(model_of(nodes, {"x": (2, 3)}, constants),
                 [rng_of(3).uniform(-2, 2, (2, 3)).astype(F32)], ulps=2).plan  # fmt: skip
    assert "sign" in ops_of(plan)
    nodes[2] = node("Identity", ["b"], ["c"])
    plan = agree(model_of(nodes, {"x": (2, 3)}, constants),
                 [rng_of(3).uniform(-2, 2, (2, 3)).astype(F32)], ulps=2).plan  # fmt: skip
    assert "sign" not in ops_of(plan)


def test_whole_numbers_times_zero_are_zero() -> None:
    """As QuantileTransformer makes the first places of its binary search."""
    nodes = [
        node("Cast", ["x"], ["k"], to=TensorProto.INT64),
        node("Mul", ["k", "zero"], ["none"]),
        node("Add", ["none", "begin"], ["low"]),
        node("Add", ["none", "end"], ["high"]),
        node("GreaterOrEqual", ["x", "middle"], ["right"]),
        node("Where", ["right", "high", "low"], ["place"]),
        node("Gather", ["table", "place"]),
    ]
    constants = {"zero": np.array(0), "begin": np.array([[0, 3]]), "end": np.array([[2, 5]])}
    constants |= {"middle": np.array([[0.5, -0.5]]), "table": np.arange(6) / 7}
    x = rng_of(4).uniform(-2, 2, (3, 2)).astype(F32)
    model = model_of(nodes, {"x": (3, 2)}, constants)
    _, got = served_whole(model, x)
    assert np.abs(got - plain(model, x)[0]).max() < 1e-4


def served_whole(model: Any, x: Array) -> tuple[Any, Array]:
    made = compile_model(model, input_range=(-2.0, 2.0))
    (got,), _ = Together(made.plan, made.weights).infer([x])
    return made.plan, got


def test_double_constants_beside_floats_are_calibrated() -> None:
    """As KNeighborsRegressor: targets are double, looked up, and cast to float."""
    nodes = [
        node("ArgMax", ["x"], ["k"], axis=1, keepdims=0),
        node("Gather", ["targets", "k"], ["found"]),
        node("Cast", ["found"], ["t"], to=TensorProto.FLOAT),
        node("ReduceMax", ["x", "one"], ["best"], keepdims=0),
        node("Mul", ["t", "best"]),
    ]
    model = model_of(nodes, {"x": (4, 3)}, {"one": np.array([1])})
    from onnx import numpy_helper

    targets = np.array([0.5, -1.25, 3.0])
    model.graph.initializer.append(numpy_helper.from_array(targets, "targets"))
    x = rng_of(5).permuted(np.linspace(-2, 2, 12)).reshape(4, 3).astype(F32)
    made = compile_model(model, calibrate=x)
    (got,), _ = Together(made.plan, made.weights).infer([x])
    assert np.abs(got - plain(model, x)[0]).max() < 1e-3


def test_what_a_guard_makes_of_nan_is_calibrated() -> None:
    """As PowerTransformer: each side's power is NaN on the other, imputed, and masked away."""
    nodes = [
        node("Log", ["x"], ["log"]),
        node("IsNaN", ["log"], ["bad"]),
        node("Where", ["bad", "zero", "log"], ["sound"]),
        node("Greater", ["x", "zero"], ["above"]),
        node("Cast", ["above"], ["mask"], to=TensorProto.FLOAT),
        node("Mul", ["sound", "mask"], ["part"]),
        node("Neg", ["x"], ["turned"]),
        node("Relu", ["turned"], ["below"]),
        node("Add", ["part", "below"]),
    ]
    model = model_of(nodes, {"x": ("N", 4)}, {"zero": F32(0)})
    x = rng_of(6).uniform(-60, 3, (30, 4)).astype(F32)
    x[np.abs(x) < 0.1] = 1.0
    plan, got = served(model, x[:8], calibrate=x)
    assert np.abs(got - plain(model, x[:8])[0]).max() < 1e-3
    # Rounding is random: once in thirty runs the largest of 32 errors is a little above.
    made = compile_model(model, calibrate=x, batch=8, target_error=1e-3)
    runs = [Together(made.plan, made.weights).infer([x[:8]])[0][0] for _ in range(5)]
    assert np.median([np.abs(run - plain(model, x[:8])[0]).max() for run in runs]) < 1e-3
    # The guard itself costs nothing.
    assert plan.value(plan.outputs[0].id).bound - plan.value(plan.outputs[0].id).frac_bits >= 6


def test_an_output_that_is_nan_on_samples_has_no_target_error() -> None:
    model = model_of([node("Log", ["x"])], {"x": ("N", 2)})
    x = np.array([[1.0, -2.0], [3.0, 2.0]], F32)
    with pytest.raises(ModelError, match="'y' is NaN on samples"):
        compile_model(model, calibrate=x, target_error=1e-3)
