"""Labels of secret classes: names in the plan, numbers by comparisons."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from mpcserve.compiler import compile_model
from mpcserve.compiler.ml.rewrite import ML
from mpcserve.plan.plan import plan_from_json
from mpcserve.protocol import Together
from tests.ml_cases import OPSET, classifier
from tests.onnx_cases import ops_of, plain, rng_of

SCALE = {"input_range": (-8.0, 8.0)}


def three_classes(**labels: Any) -> onnx.ModelProto:
    return classifier(
        "LinearClassifier",
        4,
        coefficients=rng_of(1).normal(size=12).tolist(),
        intercepts=[0.1, 0.2, -0.1],
        post_transform="SOFTMAX",
        **labels,
    )


@pytest.mark.parametrize(
    "labels",
    [
        {"classlabels_ints": [0, 1, 2]},
        {"classlabels_ints": [7, 5, 3]},
        {"classlabels_ints": [4, -9, 11]},
        {"classlabels_strings": ["red", "green", "blue"]},
    ],
    ids=str,
)
def test_labels_come_out_as_the_model_names_them(labels: dict[str, Any]) -> None:
    model = three_classes(**labels)
    compiled = compile_model(model, batch=16, **SCALE)
    x = rng_of(2).normal(size=(16, 4)).astype(np.float32)
    (label, scores), _ = Together(compiled.plan, compiled.weights).infer([x])
    expected = plain(model, x)
    np.testing.assert_array_equal(label, expected[0])
    np.testing.assert_allclose(scores, expected[1], atol=1e-3)


def test_names_of_classes_stand_in_the_plan_and_nowhere_else() -> None:
    compiled = compile_model(three_classes(classlabels_strings=["red", "green", "blue"]), **SCALE)
    label, scores = compiled.plan.outputs
    assert (label.labels, label.dtype) == (("red", "green", "blue"), "str")
    assert scores.labels == ()
    again = plan_from_json(compiled.plan.to_json())
    assert again.outputs == compiled.plan.outputs
    assert again.digest == compiled.plan.digest


def test_labels_in_arithmetic_progression_cost_nothing() -> None:
    plans = [
        compile_model(three_classes(classlabels_ints=labels), **SCALE).plan
        for labels in ([0, 1, 2], [7, 5, 3], [4, -9, 11])
    ]
    signs = [ops_of(plan).count("sign") for plan in plans]
    assert signs[0] == signs[1] == signs[2] - 1


def test_other_numbers_of_classes_stay_secret() -> None:
    plans = [
        compile_model(three_classes(classlabels_ints=labels), **SCALE).plan
        for labels in ([4, -9, 11], [5, -8, 10])
    ]
    assert plans[0].digest == plans[1].digest


@pytest.mark.parametrize("cast", [False, True])
def test_a_class_may_be_looked_up_in_a_constant_array(cast: bool) -> None:
    nodes = [
        helper.make_node("ArgMax", ["x"], ["i"], axis=1, keepdims=0, name="argmax"),
        helper.make_node("ArrayFeatureExtractor", ["c", "i"], ["f"], domain=ML, name="pick"),
        helper.make_node("Reshape", ["f", "s"], ["r" if cast else "y"], name="flat"),
    ]
    if cast:
        nodes.append(helper.make_node("Cast", ["r"], ["y"], to=onnx.TensorProto.STRING))
    constants = [
        helper.make_tensor("c", onnx.TensorProto.STRING, [3], [b"p", b"q", b"r"]),
        helper.make_tensor("s", onnx.TensorProto.INT64, [1], [-1]),
    ]
    ins = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 3])]
    outs = [helper.make_tensor_value_info("y", onnx.TensorProto.STRING, None)]
    graph = helper.make_graph(nodes, "pick", ins, outs, constants)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(ML, 3)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    compiled = compile_model(model, batch=4, **SCALE)
    x = rng_of(3).normal(size=(4, 3)).astype(np.float32)
    (got,), _ = Together(compiled.plan, compiled.weights).infer([x])
    np.testing.assert_array_equal(got, plain(model, x)[0])


@pytest.mark.parametrize("keepdims", [0, 1])
def test_the_class_of_a_secret_index_has_the_shape_that_onnxruntime_gives_it(keepdims: int) -> None:
    nodes = [
        helper.make_node("ArgMax", ["x"], ["i"], axis=1, keepdims=keepdims),
        helper.make_node("ArrayFeatureExtractor", ["classes", "i"], ["y"], domain=ML),
    ]
    graph = helper.make_graph(
        nodes,
        "labels",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 3])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.INT64, None)],
        [onnx.numpy_helper.from_array(np.array([5, 7, 9]), "classes")],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(ML, 3)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    compiled = compile_model(model, **SCALE)
    x = np.array([[1, 3, 2], [4, 0, 1]], np.float32)
    (got,), _ = Together(compiled.plan, compiled.weights).infer([x])
    np.testing.assert_array_equal(got, plain(model, x)[0], strict=True)
