"""Whole models: the bundled ones, and the real protocol on a compiled plan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from models import shapes
from mpcserve.compiler import compile_model
from mpcserve.plan import bill_of
from mpcserve.protocol.together import simulate
from mpcserve.reference import evaluate_clear
from tests.onnx_cases import agree, model_of, node, plain, rng_of
from tests.plan_interpreter import Interpreter

pytestmark = pytest.mark.slow

MODELS = Path(__file__).parent.parent / "models"


@pytest.mark.parametrize(
    ("model", "data"),
    [
        ("breast_cancer_logistic", "breast_cancer"),
        ("breast_cancer_mlp", "breast_cancer"),
        ("mnist_mlp", "mnist"),
        ("mnist_cnn", "mnist"),
    ],
)
@pytest.mark.parametrize("ranges", ["calibrated", "declared"])
def test_bundled_models_are_within_two_to_the_minus_ten(model: str, data: str, ranges: str) -> None:
    samples = np.load(MODELS / f"{data}_calibration.npy")
    x = np.load(MODELS / f"{data}_samples.npy")
    low, high = min(samples.min(), x.min()), max(samples.max(), x.max())
    options = {"calibrate": samples} if ranges == "calibrated" else {"input_range": (low, high)}
    compiled = compile_model(MODELS / f"{model}.onnx", batch=len(x), ring=64, **options)
    (expected,) = plain(onnx.load(MODELS / f"{model}.onnx"), x)
    (got,) = evaluate_clear(compiled.plan, compiled.weights, [x])
    assert np.abs(got - expected).max() < 2.0**-10
    assert np.array_equal(got.argmax(axis=1), expected.argmax(axis=1))


def test_the_protocol_runs_a_compiled_plan_as_billed() -> None:
    rng = rng_of(1)
    weights = (rng.integers(-64, 65, (3, 2, 3, 3)) / 128).astype(np.float32)
    dense = (rng.integers(-64, 65, (27, 5)) / 128).astype(np.float32)
    nodes = [
        node("Conv", ["x", "w", "c"], ["h1"]),
        node("LeakyRelu", ["h1"], ["h2"], alpha=0.2),
        node("MaxPool", ["h2"], ["h3"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Flatten", ["h3"], ["h4"]),
        node("MatMul", ["h4", "v"], ["h5"]),
        node("MatMul", ["h5", "u"], ["h6"]),
        node("MatMul", ["h6", "u"], ["h7"]),
        node("MatMul", ["h7", "u"], ["h8"]),
        node("Abs", ["h8"], ["y"]),
    ]
    constants = {"w": weights, "c": np.ones(3), "v": dense, "u": np.eye(5)}
    model = model_of(nodes, {"x": (2, 2, 8, 8)}, constants)
    x = rng.uniform(-2, 2, (2, 2, 8, 8)).astype(np.float32)
    compiled = agree(model, [x], ulps=200, rng=rng)
    assert any(i.op == "extend" for i in compiled.plan.instructions)
    outputs, bill = simulate(compiled.plan, compiled.weights, [x])
    assert bill == bill_of(compiled.plan)
    (expected,) = Interpreter(compiled.plan, compiled.weights).run(x)
    assert np.abs(outputs[0] - expected).max() < 200 * 2.0**-16


@pytest.mark.slow
def test_resnet18_compiles_with_calibration() -> None:
    x = rng_of(2).normal(size=(2, 3, 224, 224)).astype(np.float32)
    compiled = compile_model(shapes.resnet18(), calibrate=x)
    assert max(i.attrs.get("ring", 0) for i in compiled.plan.instructions) <= 48
    assert not any(i.op == "extend" for i in compiled.plan.instructions)


def test_resnet20_is_close_to_onnxruntime() -> None:
    rng = rng_of(3)
    x = rng.normal(size=(4, 3, 32, 32)).astype(np.float32)
    model = shapes.resnet20()
    compiled = compile_model(model, calibrate=x, batch=4)
    (expected,) = plain(model, x)
    (got,) = evaluate_clear(compiled.plan, compiled.weights, [x])
    assert np.abs(got - expected).max() < 2.0**-8
