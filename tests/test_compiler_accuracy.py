"""Errors of layers, precision by a target error, random samples: what is known of accuracy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from mpcserve.compiler import CompiledModel, check_model, compile_model, layer_errors
from mpcserve.errors import ConfigError, InputError, ModelError
from mpcserve.plan import bill_of
from mpcserve.protocol import simulate
from tests.onnx_cases import Array, model_of, node, plain, rng_of


def network(seed: int = 3) -> onnx.ModelProto:
    """Convolution, Relu, residual, Sigmoid, Gemm."""
    rng = rng_of(seed)
    nodes = [
        node("Conv", ["x", "w", "b"], ["c"], pads=[1] * 4),
        node("Relu", ["c"], ["r"]),
        node("Add", ["r", "c"], ["s"]),
        node("Flatten", ["s"], ["f"]),
        node("Gemm", ["f", "v"], ["g"]),
        node("Sigmoid", ["g"], ["y"]),
    ]
    constants = {
        "w": rng.standard_normal((4, 2, 3, 3)).astype(np.float32) / 3,
        "b": rng.standard_normal(4).astype(np.float32),
        "v": rng.standard_normal((64, 3)).astype(np.float32) / 8,
    }
    return model_of(nodes, {"x": [1, 2, 4, 4]}, constants)


def images(count: int, seed: int = 4) -> Array:
    return rng_of(seed).standard_normal((count, 2, 4, 4)).astype(np.float32)


def worst(compiled: CompiledModel, model: onnx.ModelProto, rows: Array) -> float:
    """Largest error of the real protocol."""
    return max(
        float(np.abs(got - want).max())
        for row in rows
        for (got,), (want,) in [
            (simulate(compiled.plan, compiled.weights, [row[None]])[0], plain(model, row[None]))
        ]
    )


def test_errors_of_layers_are_those_of_the_reference_against_onnxruntime() -> None:
    model, x = network(), images(1)
    compiled = compile_model(model, calibrate=images(16), frac_bits=10, trace=True)
    errors = {e.layer: e for e in layer_errors(compiled, {"x": x})}
    assert list(errors) == ["Conv:c", "Relu:r", "Add:s", "Flatten:f", "Gemm:g", "Sigmoid:y"]
    ulp = 2.0**-10
    # A convolution rounds its input, its weights and its result.
    assert 0 < errors["Conv:c"].max_error < 8 * ulp
    assert 0 < errors["Conv:c"].own * 20 < 16 * ulp
    # These compute exactly what their operands say, but for how exact sums are rounded.
    assert [errors[k].own for k in ("Relu:r", "Flatten:f")] == [0, 0]
    assert errors["Add:s"].own < ulp
    assert errors["Flatten:f"].growth == 1
    assert errors["Add:s"].max_error <= 2 * errors["Conv:c"].max_error
    assert all(e.mean_error <= e.max_error for e in errors.values())


def test_the_layer_whose_weights_are_coarse_is_the_one_that_adds_error() -> None:
    model = network()
    weights = {t.name: t for t in model.graph.initializer}
    # Beside 2^12 the other weights of the layer have few bits left in 32.
    large = onnx.numpy_helper.to_array(weights["v"]).copy()
    large[0, 0] = 2.0**9
    weights["v"].CopyFrom(onnx.numpy_helper.from_array(large, "v"))
    compiled = compile_model(model, calibrate=images(16), frac_bits=6, trace=True)
    errors = layer_errors(compiled, {"x": images(1)})
    assert max(errors, key=lambda e: e.max_error).layer == "Gemm:g"


def test_errors_of_layers_need_a_trace() -> None:
    compiled = compile_model(network(), calibrate=images(16))
    with pytest.raises(ConfigError, match="without a trace"):
        layer_errors(compiled, {"x": images(1)})


@pytest.mark.parametrize("target", [1e-2, 1e-3, 1e-4])
def test_a_target_error_is_met_by_the_protocol_on_other_inputs(target: float) -> None:
    model = network()
    compiled = compile_model(model, calibrate=images(16), target_error=target)
    assert worst(compiled, model, images(6, seed=9)) <= target
    assert f"target error {target:g}" in compiled.plan.notes[-1]


def test_a_larger_target_error_costs_fewer_bytes() -> None:
    def cost(target: float) -> int:
        plan = compile_model(network(), calibrate=images(16), target_error=target).plan
        return bill_of(plan).online_bytes + bill_of(plan).dealt_bytes

    assert cost(1e-1) < cost(1e-3) < cost(1e-4)


def test_a_target_error_of_a_model_that_sends_nothing_is_met() -> None:
    model = model_of([node("Add", ["x", "x"])], {"x": [1, 4]})
    x = np.ones((2, 4), np.float32)
    assert bill_of(compile_model(model, calibrate=x, target_error=1e-3).plan).rounds == 0


def test_a_target_error_is_more_than_a_unit_in_the_last_place() -> None:
    """Samples that no rounding touches say nothing of how much rounding there is."""
    model = model_of([node("MatMul", ["x", "w"])], {"x": [1, 4]}, {"w": np.eye(4)})
    x = rng_of(6).integers(-3, 4, (8, 4)).astype(np.float32)
    plan = compile_model(model, calibrate=x, target_error=0.004).plan
    assert 2.0 ** -plan.value(plan.outputs[0].id).frac_bits < 0.004


def test_a_target_error_out_of_reach_names_layers_and_what_is_reached() -> None:
    with pytest.raises(ModelError, match=r"below 1e-12: simulated \S+e-0\d at best") as caught:
        compile_model(network(), calibrate=images(16), target_error=1e-12)
    assert "enters at layer" in caught.value.hint
    assert any("layer 'Conv:c' (Conv): adds" in p for p in caught.value.problems)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs samples"),
        ({"calibrate": "random:2", "frac_bits": 12}, "fraction bits"),
        ({"calibrate": "random:2", "target_error": -1.0}, "more than 0"),
    ],
)
def test_a_target_error_that_makes_no_sense_is_refused(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        compile_model(network(), **({"target_error": 1e-3} | options))  # type: ignore[arg-type]


def test_random_samples_fill_the_declared_range_and_are_said_to_be_random() -> None:
    compiled = compile_model(network(), calibrate="random:8", input_range=(0.0, 1.0))
    (spec,) = compiled.plan.inputs
    assert (spec.low, spec.high, spec.known) == (0.0, 1.0, "proved")
    assert any("drawn at random" in note for note in compiled.plan.notes)
    rows = np.abs(images(4)) % 1
    assert worst(compiled, network(), rows) < 1e-3


def test_random_samples_without_a_range_are_normal_with_two_margin_bits() -> None:
    (spec,) = compile_model(network(), calibrate="random:8").plan.inputs
    assert (spec.low, spec.high, spec.known) == (-8.0, 8.0, "calibrated")


def test_random_samples_need_a_number() -> None:
    with pytest.raises(InputError, match="no number of rows"):
        compile_model(network(), calibrate="random:many")


def test_few_samples_give_a_wider_margin(tmp_path: Path) -> None:
    few, many = (compile_model(network(), calibrate=images(n)).plan.notes[0] for n in (15, 16))
    assert few == "calibrated on 15 samples with 2 margin bits"
    assert many == "calibrated on 16 samples with 1 margin bit"


def test_check_tells_what_only_needs_a_range_from_what_is_unsupported() -> None:
    model = model_of(
        [node("Mul", ["x", "k"], ["a"]), node("Exp", ["a"], ["y"])],
        {"x": [1, 2]},
        {"k": np.float32(1000.0)},
    )
    assert [r.status for r in check_model(model)] == ["supported", "range"]
    assert [r.status for r in check_model(model, input_range=(-1, 1))][1] == "unsupported"
    assert [r.status for r in check_model(model, input_range=(-0.001, 0.001))][1] == "supported"
    samples = np.full((2, 2), 0.001, np.float32)
    assert [r.status for r in check_model(model, calibrate=samples)][1] == "supported"


def test_a_deep_network_without_samples_is_told_how_to_try_it() -> None:
    nodes = [node("MatMul", ["x" if k == 0 else f"h{k}", "w"], [f"h{k + 1}"]) for k in range(8)]
    weights = {"w": np.full((32, 32), 2.0, np.float32)}
    model = model_of(nodes, {"x": [1, 32]}, weights, outputs=("h8",))
    with pytest.raises(ModelError, match="does not fit 64 bits") as caught:
        compile_model(model)
    assert "random:16" in caught.value.hint


def test_a_model_that_fails_on_its_samples_is_told_so() -> None:
    nodes = [
        node("ArgMax", ["x"], ["i"], axis=1),
        node("Add", ["i", "far"], ["j"]),
        node("Gather", ["table", "j"]),
    ]
    constants = {"far": np.array([99]), "table": np.ones(3)}
    model = model_of(nodes, {"x": [1, 3]}, constants)
    with pytest.raises(ModelError, match="the model fails on a sample"):
        compile_model(model, calibrate=np.ones((2, 3), np.float32))


@pytest.mark.parametrize("op", ["Div", "Reciprocal", "Sqrt", "Log"])
def test_a_count_of_few_is_a_fine_divisor(op: str) -> None:
    """Whole numbers have no fraction bits, yet none is near zero: one neighbour of one, say."""
    nodes = [
        node("Greater", ["x", "zero"], ["g"]),
        node("Cast", ["g"], ["c"], to=int(onnx.TensorProto.FLOAT)),
        node("ReduceSum", ["c", "axis"], ["s"], keepdims=1),
        node(op, ["c", "s"] if op == "Div" else ["s"]),
    ]
    constants = {"zero": np.float32(0), "axis": np.array([1])}
    model = model_of(nodes, {"x": [1, 2]}, constants)
    x = np.array([[1, -1], [-1, 1], [1, 1]], np.float32)
    compiled = compile_model(model, calibrate=x)
    for row in x:
        (got,), _ = simulate(compiled.plan, compiled.weights, [row[None]])
        np.testing.assert_allclose(got, plain(model, row[None])[0], atol=1e-3)
