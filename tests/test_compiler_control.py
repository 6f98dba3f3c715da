"""Control flow that is public is unrolled; what a secret would decide is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mpcserve.compiler import check_model, compile_model
from mpcserve.errors import ModelError
from mpcserve.onnx_backend import prepare
from tests.onnx_cases import NEWEST, Array, model_of, node, ops_of, plain, rng_of

F32 = np.float32


def graph_of(
    nodes: list[Any], inputs: dict[str, Any], outputs: list[str], **constants: Any
) -> onnx.GraphProto:
    """A subgraph; inputs by name: (element type, shape)."""
    ins = [helper.make_tensor_value_info(k, t, s) for k, (t, s) in inputs.items()]
    outs = [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs]
    if outputs and outputs[0] == "going":
        outs[0] = helper.make_tensor_value_info("going", TensorProto.BOOL, [])
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    return helper.make_graph(nodes, "body", ins, outs, tensors)


def agrees(model: onnx.ModelProto, *inputs: Array, tolerance: float = 1e-3) -> None:
    """The protocol computes what onnxruntime does."""
    for got, want in zip(prepare(model).run(list(inputs)), plain(model, *inputs), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        assert np.abs(got - want).max(initial=0) <= tolerance


def loop(condition: Any = None) -> onnx.ModelProto:
    """h ← h·w + turn for as many turns as `turns` says; the rows are an output too."""
    body = graph_of(
        [
            condition or node("Identity", ["on"], ["going"]),
            node("Cast", ["turn"], ["t"], to=TensorProto.FLOAT),
            node("Mul", ["h", "w"], ["hw"]),
            node("Add", ["hw", "t"], ["next"]),
            node("Identity", ["next"], ["row"]),
        ],
        {
            "turn": (TensorProto.INT64, []),
            "on": (TensorProto.BOOL, []),
            "h": (TensorProto.FLOAT, [2, 3]),
        },
        ["going", "next", "row"],
    )
    return model_of(
        [node("Loop", ["turns", "", "x"], ["y", "rows"], body=body)],
        {"x": (2, 3)},
        {"turns": np.array(3), "w": np.array([0.5, -1.0, 2.0])},
        outputs=["y", "rows"],
    )


def test_a_loop_becomes_its_turns() -> None:
    agrees(loop(), rng_of(1).uniform(-2, 2, (2, 3)).astype(F32))


def test_a_loop_ends_when_its_condition_says_so() -> None:
    model = loop(node("Less", ["turn", "last"], ["going"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array(1), "last"))
    x = rng_of(2).uniform(-2, 2, (2, 3)).astype(F32)
    agrees(model, x)
    assert prepare(model).run([x])[1].shape == (2, 2, 3)


def test_a_loop_of_no_turns_gives_back_what_it_was_given() -> None:
    model = loop()
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.array(0), "turns"))
    model.graph.output.pop()
    agrees(model, np.ones((2, 3), F32), tolerance=0)


@pytest.mark.parametrize("backward", [0, 1])
def test_a_scan_walks_along_its_axis_in_either_direction(backward: int) -> None:
    body = graph_of(
        [node("Add", ["h", "item"], ["next"]), node("Relu", ["next"], ["row"])],
        {"h": (TensorProto.FLOAT, [2]), "item": (TensorProto.FLOAT, [2])},
        ["next", "row"],
    )
    scan = node(
        "Scan", ["h0", "x"], ["y", "rows"], body=body, num_scan_inputs=1, scan_input_axes=[1],
        scan_input_directions=[backward], scan_output_axes=[1], scan_output_directions=[backward],
    )  # fmt: skip
    model = model_of([scan], {"h0": (2,), "x": (2, 4)}, outputs=["y", "rows"])
    rng = rng_of(3)
    h0, x = (rng.uniform(-2, 2, shape).astype(F32) for shape in ((2,), (2, 4)))
    items = x.T[::-1] if backward else x.T
    rows = np.maximum(h0 + np.cumsum(items, axis=0), 0).T
    got = prepare(model).run([h0, x])
    assert np.abs(got[0] - (h0 + x.sum(axis=1))).max() <= 1e-3
    assert np.abs(got[1] - (rows[:, ::-1] if backward else rows)).max() <= 1e-3


@pytest.mark.parametrize("taken", [True, False])
def test_of_a_public_branch_only_one_side_is_in_the_plan(taken: bool) -> None:
    sides = {
        "then_branch": graph_of([node("Relu", ["x"], ["a"])], {}, ["a"]),
        "else_branch": graph_of([node("Mul", ["x", "w"], ["b"])], {}, ["b"]),
    }
    model = model_of(
        [node("If", ["c"], ["h"], **sides), node("Neg", ["h"])],
        {"x": (2, 3)},
        {"c": np.array(taken), "w": np.array([0.5, 2.0, 4.0])},
    )
    assert ("sign" in ops_of(compile_model(model).plan)) == taken
    agrees(model, rng_of(4).uniform(-2, 2, (2, 3)).astype(F32))


def test_control_flow_on_a_secret_is_refused_with_its_node() -> None:
    side = graph_of([node("Relu", ["x"], ["a"])], {}, ["a"])
    model = model_of(
        [
            node("ReduceSum", ["x"], ["s"], keepdims=0),
            node("Greater", ["s", "zero"], ["c"]),
            node("If", ["c"], ["h"], then_branch=side, else_branch=side),
            node("Relu", ["h"]),
        ],
        {"x": (2, 3)},
        {"zero": 0.0},
    )
    with pytest.raises(ModelError) as caught:
        compile_model(model)
    (problem,) = (p for p in caught.value.problems if "'If:h'" in p)
    assert "its condition depends on a secret input" in problem and "Where" in problem
    assert [r.op for r in check_model(model) if r.reason.startswith("its condition")] == ["If"]


def test_functions_of_the_model_are_inlined_with_their_attributes() -> None:
    model = model_of([node("Scaled", ["x"])], {"x": (2, 3)})
    model.graph.node[0].domain = "own"
    model.graph.node[0].attribute.append(helper.make_attribute("by", 2.5))
    factor = helper.make_node("Constant", [], ["f"])
    factor.attribute.append(onnx.AttributeProto(name="value_float", ref_attr_name="by", type=1))
    body = [factor, helper.make_node("Mul", ["a", "f"], ["b"])]
    opsets = [helper.make_opsetid("", NEWEST)]
    model.functions.append(
        helper.make_function("own", "Scaled", ["a"], ["b"], body, opsets, ["by"])
    )
    model.opset_import.append(helper.make_opsetid("own", 1))
    x = rng_of(5).uniform(-2, 2, (2, 3)).astype(F32)
    assert np.abs(prepare(model).run([x])[0] - 2.5 * x).max() <= 1e-3


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64"])
def test_results_come_back_in_the_declared_type(kind: str) -> None:
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    model = model_of(
        [node("Mul", ["x", "w"], ["h"]), node("Relu", ["h"])], {"x": (2, 3)}, kind=dtype
    )
    w = np.array([0.5, -2.0, 1.5]).astype(kind)
    model.graph.initializer.append(numpy_helper.from_array(w, "w"))
    x = rng_of(6).uniform(-2, 2, (2, 3)).astype(kind)
    (y,) = prepare(model).run([x])
    assert y.dtype == np.dtype(kind)
    expected = np.maximum(x.astype(np.float64) * w.astype(np.float64), 0)
    assert np.abs(y.astype(np.float64) - expected).max() <= {"bfloat16": 2**-6}.get(kind, 2e-3)


def test_random_numbers_are_refused() -> None:
    model = model_of([node("RandomNormal", [], ["r"], shape=[2, 3]), node("Add", ["x", "r"])],
                     {"x": (2, 3)})  # fmt: skip
    with pytest.raises(ModelError, match=r"'RandomNormal:r' .*: draws random numbers"):
        compile_model(model)


@pytest.mark.parametrize("test", ["IsNaN", "IsInf", "Equal"])
def test_no_secret_is_infinite_so_guards_against_it_cost_nothing(test: str) -> None:
    inputs = ["x", "endless"] if test == "Equal" else ["x"]
    nodes = [node(test, inputs, ["bad"]), node("Where", ["bad", "zero", "x"], ["h"])]
    constants = {"endless": -np.inf, "zero": 0.0}
    model = model_of([*nodes, node("Relu", ["h"])], {"x": (2, 3)}, constants)
    assert ops_of(compile_model(model).plan) == ["sign", "select"]


def test_statistics_of_a_layer_norm_are_computed_when_they_are_read() -> None:
    nodes = [node("LayerNormalization", ["x", "g"], ["y", "mean", "inverse"])]
    model = model_of(nodes, {"x": (2, 8)}, {"g": np.ones(8)}, outputs=["y", "mean", "inverse"])
    agrees(model, rng_of(7).uniform(-2, 2, (2, 8)).astype(F32))
