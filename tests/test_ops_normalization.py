"""Normalisations by what the values spread over, through the real protocol, against floats."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from mpcserve.compiler import compile_model
from mpcserve.plan import bill_of
from mpcserve.protocol.together import simulate
from tests.onnx_cases import Array, model_of, node, plain, rng_of
from tests.plan_interpreter import Interpreter
from tests.test_ops_activation import close

pytestmark = pytest.mark.slow


def values(rng: np.random.Generator, *shape: int, size: float = 1.0) -> Array:
    return np.clip(rng.normal(0.3 * size, size, shape), -8, 8).astype(np.float32)


def scale_and_bias(rng: np.random.Generator, *shape: int) -> dict[str, Array]:
    return {
        "s": rng.normal(1, 0.3, shape).astype(np.float32),
        "t": rng.normal(0, 0.3, shape).astype(np.float32),
    }


@pytest.mark.parametrize("size", [0.2, 1.0, 3.0])
def test_layer_normalisation_of_768_takes_ten_rounds(size: float) -> None:
    rng = rng_of(1)
    model = model_of(
        [node("LayerNormalization", ["x", "s", "t"])], {"x": (1, 16, 768)}, scale_and_bias(rng, 768)
    )
    made = close(model, [values(rng, 1, 16, 768, size=size)], 5e-4)
    assert bill_of(made.plan).rounds <= 10


def test_a_row_of_zeros_stays_small_however_small_epsilon_is() -> None:
    rng = rng_of(8)
    x = values(rng, 4, 6, 32)
    x[:, 2] = 0.0
    model = model_of(
        [node("LayerNormalization", ["x", "s", "t"], epsilon=1e-12)],
        {"x": (1, 6, 32)},
        {"s": np.ones(32, np.float32), "t": np.zeros(32, np.float32)},
    )
    made = compile_model(model, calibrate=x)
    Interpreter(made.plan, made.weights, rng).run(x[:1])
    for _ in range(8):
        (y,), _bill = simulate(made.plan, made.weights, [x[:1]])
        assert np.abs(y[0, 2]).max() <= 0.1
        assert np.abs(y - plain(model, x[:1])[0])[0, [0, 1, 3, 4, 5]].max() <= 5e-4


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_layer_normalisation_may_span_several_axes(axis: int) -> None:
    rng = rng_of(2)
    shape = (2, 3, 4, 5)
    model = model_of(
        [node("LayerNormalization", ["x", "s", "t"], axis=axis, epsilon=1e-3)],
        {"x": shape},
        scale_and_bias(rng, *shape[axis:]),
    )
    close(model, [values(rng, *shape)], 5e-4)


def test_layer_normalisation_as_older_exports_spell_it() -> None:
    rng = rng_of(3)
    nodes = [
        node("ReduceMean", ["x", "axis"], ["mean"]),
        node("Sub", ["x", "mean"], ["d"]),
        node("Pow", ["d", "two"], ["square"]),
        node("ReduceMean", ["square", "axis"], ["variance"]),
        node("Add", ["variance", "eps"], ["safe"]),
        node("Sqrt", ["safe"], ["deviation"]),
        node("Div", ["d", "deviation"]),
    ]
    constants = {"axis": np.array([-1]), "two": np.float32(2), "eps": np.float32(1e-5)}
    made = close(model_of(nodes, {"x": (4, 64)}, constants), [values(rng, 4, 64)], 2e-3)
    assert bill_of(made.plan).rounds <= 16


def test_constant_rows_normalise_to_zero() -> None:
    x = np.full((1, 4, 64), 3.0, np.float32)
    x[0, 1] = 0
    model = model_of(
        [node("LayerNormalization", ["x", "s", "t"])],
        {"x": x.shape},
        {"s": np.ones(64, np.float32), "t": np.zeros(64, np.float32)},
    )
    close(model, [x], 2e-2)


def test_rms_normalisation_agrees() -> None:
    if not onnx.defs.has("RMSNormalization"):
        pytest.skip("this onnx has no RMSNormalization")
    rng = rng_of(4)
    model = model_of(
        [node("RMSNormalization", ["x", "s"])],
        {"x": (1, 8, 256)},
        {"s": scale_and_bias(rng, 256)["s"]},
        opset=23,
    )
    made = compile_model(model, input_range=(-8.0, 8.0))
    x = values(rng, 1, 8, 256)
    (got,) = Interpreter(made.plan, made.weights, rng).run(x)
    exact = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    exact = exact * onnx.numpy_helper.to_array(model.graph.initializer[0])
    assert np.abs(got - exact).max() <= 5e-4
    assert bill_of(made.plan).rounds <= 9


def test_instance_normalisation_agrees() -> None:
    rng = rng_of(5)
    model = model_of(
        [node("InstanceNormalization", ["x", "s", "t"])],
        {"x": (2, 3, 8, 8)},
        scale_and_bias(rng, 3),
    )
    close(model, [values(rng, 2, 3, 8, 8)], 5e-4)


def test_group_normalisation_agrees() -> None:
    rng = rng_of(6)
    x, given = values(rng, 2, 6, 5, 5), scale_and_bias(rng, 6)
    model = model_of(
        [node("GroupNormalization", ["x", "s", "t"], num_groups=2)],
        {"x": x.shape},
        given,
    )
    made = compile_model(model, input_range=(-8.0, 8.0))
    (got,) = Interpreter(made.plan, made.weights, rng).run(x)
    rows = x.reshape(2, 2, -1).astype(np.float64)
    rows = (rows - rows.mean(-1, keepdims=True)) / np.sqrt(rows.var(-1, keepdims=True) + 1e-5)
    scale, bias = (given[k][:, None, None] for k in "st")
    assert np.abs(got - (rows.reshape(x.shape) * scale + bias)).max() <= 1e-3


@pytest.mark.parametrize("attrs", [{"axes": [0, 2, 3]}, {"axes": [1, 3]}])
def test_mean_variance_normalisation_agrees(attrs: Any) -> None:
    model = model_of([node("MeanVarianceNormalization", ["x"], **attrs)], {"x": (2, 3, 4, 5)})
    close(model, [values(rng_of(7), 2, 3, 4, 5)], 5e-4)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_lp_normalisation_agrees(p: int, axis: int) -> None:
    model = model_of([node("LpNormalization", ["x"], p=p, axis=axis)], {"x": (3, 4, 5)})
    close(model, [values(rng_of(8), 3, 4, 5)], 2e-4)


def test_no_value_of_a_normalisation_leaves_its_bound() -> None:
    rng = rng_of(9)
    x = values(rng, 1, 6, 32, size=3)
    x[0, 0], x[0, 1], x[0, 2, :16], x[0, 2, 16:] = 8, 0, -8, 8
    x[0, 3], x[0, 3, 0] = -8, 8
    model = model_of(
        [node("LayerNormalization", ["x", "s", "t"])], {"x": x.shape}, scale_and_bias(rng, 32)
    )
    made = compile_model(model, input_range=(-8.0, 8.0))
    Interpreter(made.plan, made.weights, rng).run(x)


@pytest.mark.parametrize("size", [1.0, 3000.0])
def test_a_wide_range_costs_bits_not_the_compilation(size: float) -> None:
    rng = rng_of(9)
    model = model_of(
        [node("LayerNormalization", ["x", "s", "t"])], {"x": (1, 8, 768)}, scale_and_bias(rng, 768)
    )
    x = (size * rng.standard_normal((1, 8, 768))).astype(np.float32)
    compiled = compile_model(model, input_range=(-(2.0**15), 2.0**15))
    (y,), _ = simulate(compiled.plan, compiled.weights, [x])
    (expected,) = plain(model, x)
    np.testing.assert_allclose(y, expected, atol=2e-3)


def test_layer_normalisation_also_gives_its_means_and_deviations() -> None:
    rng = rng_of(11)
    constants = scale_and_bias(rng, 8)
    outputs = ("y", "mean", "deviation")
    one = node("LayerNormalization", ["x", *constants], outputs)
    model = model_of([one], {"x": (3, 8)}, constants, outputs)
    made = close(model, [values(rng, 3, 8)], 1e-3)
    alone = model_of([node("LayerNormalization", ["x", *constants])], {"x": (3, 8)}, constants)
    assert bill_of(made.plan).rounds == bill_of(close(alone, [values(rng, 3, 8)], 1e-3).plan).rounds
