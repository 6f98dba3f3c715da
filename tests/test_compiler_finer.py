"""Values that are divided by their own size, or meet large weights: small ones are as exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

from mpcserve.compiler import CompiledModel, compile_model
from mpcserve.plan import bill_of
from mpcserve.protocol import Together
from tests.onnx_cases import Array, model_of, node, plain, rng_of

TOLERANCE = 8e-4
"""Of outputs of size one; at 16 fraction bits those of inputs of size 0.01 err by 2e-3 and more."""

ROWS, WIDTH = 4, 256
SIZES = (1.0, 0.1, 0.01, 0.001)


def layer_norm() -> onnx.ModelProto:
    nodes = [node("LayerNormalization", ["x", "s", "t"], epsilon=1e-12)]
    return model_of(nodes, {"x": [1, ROWS, WIDTH]}, {"s": np.ones(WIDTH), "t": np.zeros(WIDTH)})


def all_three_outputs() -> onnx.ModelProto:
    """The normalised values, and the mean and the inverse deviation that it tells."""
    nodes = [
        node("LayerNormalization", ["x", "s", "t"], ["n", "m", "i"]),
        node("Mul", ["x", "i"], ["a"]),
        node("Mul", ["m", "i"], ["b"]),
        node("Sub", ["a", "b"], ["c"]),
        node("Add", ["n", "c"]),
    ]
    return model_of(nodes, {"x": [1, ROWS, WIDTH]}, {"s": np.ones(WIDTH), "t": np.zeros(WIDTH)})


def written_out() -> onnx.ModelProto:
    """ReduceMean, Sub, Pow, Sqrt, Div."""
    nodes = [
        node("ReduceMean", ["x", "axis"], ["m"]),
        node("Sub", ["x", "m"], ["d"]),
        node("Pow", ["d", "two"], ["p"]),
        node("ReduceMean", ["p", "axis"], ["v"]),
        node("Add", ["v", "eps"], ["e"]),
        node("Sqrt", ["e"], ["r"]),
        node("Div", ["d", "r"]),
    ]
    constants = {"axis": np.array([-1]), "two": np.float32(2), "eps": np.float32(1e-12)}
    return model_of(nodes, {"x": [1, ROWS, WIDTH]}, constants)


def rms_norm() -> onnx.ModelProto:
    nodes = [node("RMSNormalization", ["x", "s"], epsilon=1e-12)]
    return model_of(nodes, {"x": [1, ROWS, WIDTH]}, {"s": np.ones(WIDTH)})


def instance_norm() -> onnx.ModelProto:
    nodes = [node("InstanceNormalization", ["x", "s", "t"], epsilon=1e-12)]
    return model_of(nodes, {"x": [1, ROWS, 16, 16]}, {"s": np.ones(ROWS), "t": np.zeros(ROWS)})


def mean_variance() -> onnx.ModelProto:
    return model_of([node("MeanVarianceNormalization", ["x"], axes=[2])], {"x": [1, ROWS, WIDTH]})


def length() -> onnx.ModelProto:
    nodes = [node("LpNormalization", ["x"], ["n"]), node("Mul", ["n", "k"])]
    return model_of(nodes, {"x": [1, ROWS, WIDTH]}, {"k": np.float32(16)})


def quotient() -> onnx.ModelProto:
    nodes = [
        node("Abs", ["x"], ["a"]),
        node("ReduceMean", ["a", "axis"], ["m"]),
        node("Div", ["x", "m"]),
    ]
    return model_of(nodes, {"x": [1, ROWS, WIDTH]}, {"axis": np.array([-1])})


def behind_a_layer() -> onnx.ModelProto:
    """What is normalised is computed from values that are as small."""
    weights = rng_of(2).standard_normal((WIDTH, WIDTH)) / 16
    nodes = [
        node("MatMul", ["x", "w"], ["h"]),
        node("Relu", ["h"], ["r"]),
        node("LayerNormalization", ["r", "s", "t"], epsilon=1e-12),
    ]
    constants = {"w": weights, "s": np.ones(WIDTH), "t": np.zeros(WIDTH)}
    return model_of(nodes, {"x": [1, ROWS, WIDTH]}, constants)


def large_weights() -> onnx.ModelProto:
    """A small value between two layers, of which the second has weights to match."""
    rng = rng_of(3)
    nodes = [
        node("MatMul", ["x", "w"], ["h"]),
        node("Tanh", ["h"], ["t"]),
        node("MatMul", ["t", "v"], ["s"]),
        node("Softmax", ["s"], axis=-1),
    ]
    constants = {
        "w": rng.standard_normal((WIDTH, 32)) / 16000,
        "v": rng.standard_normal((32, 10)) * 250,
    }
    return model_of(nodes, {"x": [1, ROWS, WIDTH]}, constants)


def rows_of(model: onnx.ModelProto, size: float, count: int = 20) -> Array:
    dims = model.graph.input[0].type.tensor_type.shape.dim
    shape = (count, *(d.dim_value for d in dims[1:]))
    return (size * rng_of(1).standard_normal(shape)).astype(np.float32)


def error_of(compiled: CompiledModel, model: onnx.ModelProto, rows: Array) -> float:
    parties = Together(compiled.plan, compiled.weights)
    return max(
        float(np.abs(parties.infer([row[None]])[0][0] - plain(model, row[None])[0]).max())
        for row in rows
    )


def input_bits(compiled: CompiledModel) -> int:
    return compiled.plan.value(compiled.plan.inputs[0].id).frac_bits


NETWORKS: list[Callable[[], onnx.ModelProto]] = [
    layer_norm,
    all_three_outputs,
    written_out,
    rms_norm,
    instance_norm,
    mean_variance,
    length,
    quotient,
    behind_a_layer,
    large_weights,
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("network", NETWORKS)
def test_small_values_are_as_exact_as_large_ones(
    network: Callable[[], onnx.ModelProto], size: float
) -> None:
    model = network()
    rows = rows_of(model, size)
    compiled = compile_model(model, calibrate=rows[:16])
    error = error_of(compiled, model, rows[16:])
    print(f"error {error:.1e}")
    assert error < TOLERANCE


@pytest.mark.parametrize("network", [layer_norm, rms_norm, instance_norm, behind_a_layer])
def test_small_values_cost_what_large_ones_do(network: Callable[[], onnx.ModelProto]) -> None:
    model = network()
    bills = [
        bill_of(compile_model(model, calibrate=rows_of(model, s)).plan) for s in (1.0, 2.0**-7)
    ]
    assert bills[1].online_bytes <= 1.02 * bills[0].online_bytes
    assert bills[1].dealt_bytes <= 1.05 * bills[0].dealt_bytes
    assert bills[1].rounds <= bills[0].rounds


def test_fraction_bits_grow_by_as_much_as_values_shrink() -> None:
    model = layer_norm()
    found = [
        input_bits(compile_model(model, calibrate=rows_of(model, 2.0**-k))) for k in range(0, 12, 3)
    ]
    assert found == [16, 19, 22, 25]


def test_an_epsilon_says_how_small_values_may_count() -> None:
    """Beside 2^-4, the root of an epsilon of 2^-8, errors of what is smaller do not grow."""
    nodes = [node("LayerNormalization", ["x", "s", "t"], epsilon=2.0**-8)]
    constants = {"s": np.ones(WIDTH), "t": np.zeros(WIDTH)}
    model = model_of(nodes, {"x": [1, ROWS, WIDTH]}, constants)
    assert input_bits(compile_model(model, calibrate=rows_of(model, 2.0**-9))) == 20


def test_small_values_beside_large_ones_share_their_scale() -> None:
    nodes = [
        node("LayerNormalization", ["x", "s", "t"], ["n"]),
        node("Mul", ["n", "k"], ["large"]),
        node("Add", ["x", "large"], ["sum"]),
        node("LayerNormalization", ["sum", "s", "t"]),
    ]
    constants = {"s": np.ones(WIDTH), "t": np.zeros(WIDTH), "k": np.float32(3)}
    model = model_of(nodes, {"x": [1, ROWS, WIDTH]}, constants)
    assert input_bits(compile_model(model, calibrate=rows_of(model, 0.01))) == 16


@pytest.mark.parametrize("options", [{"frac_bits": 16}, {"calibrate": None}])
def test_given_fraction_bits_are_kept_and_unknown_sizes_are_not_guessed(
    options: dict[str, Any],
) -> None:
    model = layer_norm()
    assert input_bits(compile_model(model, **{"calibrate": rows_of(model, 0.01)} | options)) == 16
