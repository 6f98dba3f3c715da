"""Graph passes keep the function (onnxruntime before and after) and leave what they promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

from mpcserve.compiler import compile_model
from mpcserve.compiler.check import import_model
from mpcserve.compiler.graph import Graph, to_onnx
from mpcserve.compiler.passes import PASSES, rewritten
from mpcserve.compiler.passes.fold_affine import fold_affine
from mpcserve.compiler.passes.identities import remove_identities
from mpcserve.compiler.passes.relu_after_maxpool import relu_after_maxpool
from mpcserve.compiler.passes.select_early import select_early
from mpcserve.compiler.registry import registry
from mpcserve.protocol import Together
from tests.onnx_cases import agree, model_of, node, ops_of, plain, rng_of

SHAPE = (1, 3, 6, 6)


def passed(model: onnx.ModelProto, *passes: Callable[[Graph], Graph]) -> list[str]:
    """Operators after the passes, which must not have changed the function."""
    rng = rng_of(7)
    graph = import_model(model, 1, registry()).graph
    assert graph is not None
    x = rng.uniform(-2, 2, graph.inputs[0].shape).astype(np.float32)
    for run in passes:
        graph = run(graph)
        onnx.checker.check_model(to_onnx(graph), full_check=True)
    for got, expected in zip(plain(to_onnx(graph), x), plain(model, x), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    return [n.op for n in graph.nodes]


def some(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).uniform(0.5, 1.5, shape)


def affine_nodes(x: str, y: str) -> tuple[list[Any], dict[str, Any]]:
    """y = (x − m) / s per channel."""
    nodes = [node("Sub", [x, "m"], ["centred"]), node("Div", ["centred", "s"], [y])]
    return nodes, {"m": some(3, 1, 1), "s": some(3, 1, 1)}


STATISTICS = {k: some(3) + i for i, k in enumerate("abcd")}


def batch_norm(x: str, y: str) -> Any:
    return node("BatchNormalization", [x, *"abcd"], [y])


def test_relu_moves_behind_the_max_pool() -> None:
    model = model_of(
        [
            node("Relu", ["x"], ["h"]),
            node("MaxPool", ["h"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
        ],
        {"x": SHAPE},
    )
    assert passed(model, relu_after_maxpool) == ["MaxPool", "Relu"]


@pytest.mark.parametrize("other", ["output", "reader"])
def test_a_relu_that_is_read_elsewhere_stays_in_front(other: str) -> None:
    nodes = [node("Relu", ["x"], ["h"]), node("GlobalMaxPool", ["h"], ["y"])]
    if other == "reader":
        nodes.append(node("Neg", ["h"], ["z"]))
    outputs = ["y", "h" if other == "output" else "z"]
    model = model_of(nodes, {"x": SHAPE}, outputs=outputs)
    assert passed(model, relu_after_maxpool)[:2] == ["Relu", "GlobalMaxPool"]


def test_the_swap_compares_fewer_elements_with_zero() -> None:
    nodes = [
        node("Relu", ["x"], ["h"]),
        node("MaxPool", ["h"], kernel_shape=[2, 2], strides=[2, 2]),
    ]
    plan = compile_model(model_of(nodes, {"x": SHAPE})).plan
    last = [i for i in plan.instructions if i.op in ("sign", "rectify")][-1]
    assert last.value.shape == (1, 3, 3, 3)


def test_a_cast_of_whole_numbers_stays() -> None:
    """onnxruntime multiplies floats with floats alone, and ranges are measured by running it."""
    nodes = [
        node("ArgMax", ["x"], ["i"], axis=1, keepdims=1),
        node("Transpose", ["i"], ["t"], perm=[1, 0]),
        node("Cast", ["t"], ["f"], to=1),
        node("MatMul", ["f", "w"]),
    ]
    model = model_of(nodes, {"x": [4, 3]}, {"w": np.ones((4, 2))})
    rows = rng_of(1).normal(size=(4, 3)).astype(np.float32)
    agree(model, [rows], ulps=4, calibrate=rows)


def test_identities_disappear() -> None:
    model = model_of(
        [
            node("Relu", ["x"], ["a"]),
            node("Dropout", ["a"], ["b"]),
            node("Cast", ["b"], ["c"], to=onnx.TensorProto.DOUBLE),
            node("Cast", ["c"], ["d"], to=onnx.TensorProto.FLOAT),
            node("Identity", ["d"], ["e"]),
            node("Neg", ["e"]),
        ],
        {"x": SHAPE},
    )
    assert passed(model, remove_identities) == ["Relu", "Neg"]


@pytest.mark.parametrize("bias", [True, False])
def test_scaling_and_offset_behind_a_conv_go_into_it(bias: bool) -> None:
    nodes, constants = affine_nodes("h", "y")
    constants |= {"w": some(3, 3, 3, 3)} | ({"v": some(3)} if bias else {})
    conv = node("Conv", ["x", "w", *(["v"] if bias else [])], ["h"])
    assert passed(model_of([conv, *nodes], {"x": SHAPE}, constants), fold_affine) == ["Conv"]


@pytest.mark.parametrize("group", [1, 3])
def test_scaling_and_offset_before_a_conv_without_padding_go_into_it(group: int) -> None:
    nodes, constants = affine_nodes("x", "h")
    constants |= {"w": some(6, 3 // group, 3, 3)}
    conv = node("Conv", ["h", "w"], group=group)
    assert passed(model_of([*nodes, conv], {"x": SHAPE}, constants), fold_affine) == ["Conv"]


def test_before_a_padded_conv_only_an_offset_stays() -> None:
    nodes, constants = affine_nodes("x", "h")
    constants |= {"w": some(6, 3, 3, 3)}
    conv = node("Conv", ["h", "w"], pads=[1, 1, 1, 1])
    model = model_of([*nodes, conv], {"x": SHAPE}, constants)
    assert passed(model, fold_affine) == ["Add", "Conv"]
    assert ops_of(compile_model(model).plan) == ["add", "conv"]


def test_batch_normalization_goes_into_the_next_conv() -> None:
    nodes = [node("Relu", ["x"], ["r"]), batch_norm("r", "h"), node("Conv", ["h", "w"])]
    model = model_of(nodes, {"x": SHAPE}, STATISTICS | {"w": some(2, 3, 1, 1)})
    assert passed(model, fold_affine) == ["Relu", "Conv"]


def test_standardisation_goes_through_a_flatten_into_the_gemm() -> None:
    nodes, constants = affine_nodes("x", "h")
    constants |= {"w": some(108, 5), "c": some(5)}
    nodes += [node("Flatten", ["h"], ["f"]), node("Gemm", ["f", "w", "c"], alpha=0.5, beta=2.0)]
    assert passed(model_of(nodes, {"x": SHAPE}, constants), fold_affine) == ["Flatten", "Gemm"]


def test_standardisation_before_a_matmul_of_matrices_makes_it_a_gemm() -> None:
    nodes = [
        node("Sub", ["x", "m"], ["a"]),
        node("Mul", ["a", "s"], ["b"]),
        node("MatMul", ["b", "w"], ["c"]),
        node("Add", ["c", "v"]),
    ]
    constants = {"m": some(4), "s": some(4), "w": some(4, 3), "v": some(3)}
    assert passed(model_of(nodes, {"x": (2, 4)}, constants), fold_affine) == ["Gemm"]


def test_with_batch_axes_the_offset_stays_behind_the_matmul() -> None:
    nodes = [
        node("Sub", ["x", "m"], ["a"]),
        node("MatMul", ["a", "w"], ["c"]),
        node("Mul", ["c", "s"]),
    ]
    constants = {"m": some(4), "s": some(3), "w": some(4, 3)}
    model = model_of(nodes, {"x": (2, 3, 4)}, constants)
    assert passed(model, fold_affine) == ["MatMul", "Add"]


def test_affine_maps_join_into_one() -> None:
    nodes = [
        node("Mul", ["x", "p"], ["h1"]),
        node("Add", ["h1", "q"], ["h2"]),
        node("Div", ["h2", "r"], ["h3"]),
        node("Sub", ["t", "h3"], ["h4"]),
        batch_norm("h4", "h5"),
        node("Neg", ["h5"]),
    ]
    constants = STATISTICS | {"p": some(3, 1, 1), "q": some(1), "r": some(6), "t": some(1)}
    model = model_of(nodes, {"x": SHAPE}, constants)
    assert passed(model, fold_affine) == ["Mul", "Add"]


def test_a_negation_never_becomes_a_product() -> None:
    nodes = [node("Neg", ["x"], ["a"]), node("Add", ["a", "q"])]
    plan = compile_model(model_of(nodes, {"x": SHAPE}, {"q": some(1)})).plan
    assert "mul" not in ops_of(plan)


@pytest.mark.parametrize("op", ["GlobalAveragePool", "ReduceMean"])
def test_the_divisor_of_a_mean_goes_into_the_next_weights(op: str) -> None:
    shape = (1, 3, 7, 7)
    attrs = {"keepdims": 1} if op == "ReduceMean" else {}
    names = ["r", "axes"] if op == "ReduceMean" else ["r"]
    nodes = [
        node("Relu", ["x"], ["r"]),
        node(op, names, ["h"], **attrs),
        node("Flatten", ["h"], ["f"]),
        node("Gemm", ["f", "w", "c"]),
    ]
    constants: dict[str, Any] = {"w": some(3, 5), "c": some(5)}
    if op == "ReduceMean":
        constants["axes"] = np.array([2, 3])
    model = model_of(nodes, {"x": shape}, constants)
    assert passed(model, fold_affine) == ["Relu", "ReduceSum", "Flatten", "Gemm"]
    assert not {"shift", "scale"} & set(ops_of(compile_model(model, ring=64).plan))


def test_a_mean_of_a_power_of_two_stays_a_free_shift() -> None:
    nodes = [
        node("GlobalAveragePool", ["x"], ["h"]),
        node("Conv", ["h", "w"]),
    ]
    model = model_of(nodes, {"x": (1, 3, 4, 4)}, {"w": some(5, 3, 1, 1)})
    assert ops_of(compile_model(model).plan) == ["sum", "shift", "reshape", "conv"]


def test_constants_that_are_read_twice_are_not_folded_twice() -> None:
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Mul", ["a", "s"], ["b"]),
        node("Relu", ["a"], ["c"]),
        node("Add", ["b", "c"]),
    ]
    model = model_of(nodes, {"x": SHAPE}, {"w": some(3, 3, 1, 1), "s": np.float32(3)})
    assert passed(model, fold_affine) == ["Conv", "Mul", "Relu", "Add"]


def test_an_output_in_the_middle_keeps_its_value() -> None:
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Mul", ["a", "s"])]
    constants = {"w": some(3, 3, 1, 1), "s": np.float32(3)}
    model = model_of(nodes, {"x": SHAPE}, constants, outputs=["a", "y"])
    assert passed(model, *PASSES) == ["Conv", "Mul"]


def test_equal_steps_are_computed_once() -> None:
    nodes = [
        node("Relu", ["x"], ["a"]),
        node("Relu", ["x"], ["b"]),
        node("MatMul", ["a", "w"], ["c"]),
        node("MatMul", ["b", "v"], ["d"]),
        node("Add", ["c", "d"]),
    ]
    w = some(4, 3)
    compiled = compile_model(model_of(nodes, {"x": (2, 4)}, {"w": w, "v": w}))
    assert ops_of(compiled.plan) == ["sign", "select", "matmul", "add"]
    assert len(compiled.weights) == 1


def test_what_no_output_needs_is_not_computed() -> None:
    nodes = [
        node("Relu", ["x"]),
        node("Split", ["z"], ["p", "q"], axis=0, num_outputs=2),
        node("Abs", ["p"], ["u"]),
    ]
    model = model_of(nodes, {"x": (2, 2), "z": (2, 2)})
    plan = compile_model(model).plan
    assert ops_of(plan) == ["sign", "select"]
    assert [i.name for i in plan.inputs] == ["x", "z"]


@pytest.mark.parametrize(
    ("op", "attrs"),
    [
        ("SpaceToDepth", {"blocksize": 2}),
        ("DepthToSpace", {"blocksize": 2, "mode": "CRD"}),
        ("ReduceL1", {}),
        ("HardSwish", {}),
        ("HardSigmoid", {"alpha": 0.25, "beta": 0.5}),
    ],
)
def test_operators_that_onnx_defines_by_others_are_expanded(op: str, attrs: Any) -> None:
    shape = (1, 4, 2, 2)
    x = rng_of(5).uniform(-4, 4, shape).astype(np.float32)
    agree(model_of([node(op, ["x"], **attrs)], {"x": shape}), [x], ulps=8)


@pytest.mark.parametrize("groups", [1, 3])
def test_a_transposed_convolution_takes_in_what_surrounds_it(groups: int) -> None:
    before, constants = affine_nodes("x", "h")
    transposed = node(
        "ConvTranspose", ["h", "w", "bias"], ["z"], strides=[2, 2], pads=[1, 0, 0, 1], group=groups
    )
    model = model_of(
        [*before, transposed, batch_norm("z", "y")],
        {"x": SHAPE},
        constants | STATISTICS | {"w": some(3, 3 // groups, 3, 2), "bias": some(3)},
    )
    assert passed(model, fold_affine) == ["Add", "ConvTranspose"]


def test_a_block_of_which_one_token_is_read_computes_that_one() -> None:
    weights = {"q": some(6, 6), "k": some(6, 6), "up": some(6, 8), "down": some(8, 6)}
    norm = {"gain": some(6), "zero": some(6)}
    attended = [
        node("LayerNormalization", ["x", "gain", "zero"], ["n"]),
        node("MatMul", ["n", "q"], ["query"]),
        node("MatMul", ["n", "k"], ["key"]),
        node("Transpose", ["key"], ["turned"], perm=[0, 2, 1]),
        node("MatMul", ["query", "turned"], ["scores"]),
        node("Add", ["scores", "mask"], ["masked"]),
        node("Softmax", ["masked"], ["share"]),
        node("MatMul", ["share", "n"], ["mixed"]),
        node("Add", ["x", "mixed"], ["sum"]),
    ]
    dense = [
        node("MatMul", ["sum", "up"], ["wide"]),
        node("Relu", ["wide"], ["active"]),
        node("MatMul", ["active", "down"], ["narrow"]),
        node("Add", ["sum", "narrow"], ["y"]),
        node("Gather", ["y", "last"], ["answer"], axis=1),
    ]
    constants = weights | norm | {"mask": some(5, 5), "last": np.array(-1)}
    model = model_of([*attended, *dense], {"x": (1, 5, 6)}, constants, outputs=["answer"])
    graph = import_model(model, 1, registry()).graph
    assert graph is not None
    shapes = select_early(graph).shapes
    rows = {n.name: shapes[n.outputs[0]] for n in select_early(graph).nodes if n.op == "MatMul"}
    assert sorted(rows.values()) == sorted(
        [(1, 1, 6), (1, 5, 6), (1, 1, 5), (1, 1, 6), (1, 1, 8), (1, 1, 6)]
    )
    passed(model, select_early)


SELECTED = {
    "rows of a product": [node("MatMul", ["x", "w"], ["h"])],
    "a product of products": [node("MatMul", ["x", "x2"], ["h"])],
    "another order": [node("Transpose", ["x"], ["h"], perm=[0, 2, 1, 3])],
    "another shape": [node("Reshape", ["x", "shape"], ["h"])],
    "a constant of that length": [node("Mul", ["x", "c"], ["h"])],
    "a mean": [node("ReduceMean", ["x", "axis"], ["h"])],
    "a choice": [node("Less", ["x", "c"], ["b"]), node("Where", ["b", "x", "c"], ["h"])],
    "several joined": [node("Concat", ["x", "x"], ["h"], axis=3)],
    "one of two axes": [node("Softmax", ["x"], ["h"], axis=1)],
}


@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize("name", SELECTED)
def test_selecting_early_keeps_the_function(name: str, axis: int) -> None:
    constants = {
        "w": some(6, 4), "x2": some(1, 3, 6, 5), "shape": np.array([1, 3, 6, 6]), "c": some(6, 1),
        "axis": np.array([3]), "s": np.array([1]), "e": np.array([3]), "a": np.array([axis]),
    }  # fmt: skip
    if name == "a mean" and axis == 3:
        constants["e"] = np.array([1])
        constants["s"] = np.array([0])
    nodes = [*SELECTED[name], node("Slice", ["h", "s", "e", "a"], ["y"])]
    passed(model_of(nodes, {"x": SHAPE}, constants, outputs=["y"]), select_early)


def test_what_is_read_whole_elsewhere_is_not_selected_early() -> None:
    nodes = [
        node("Relu", ["x"], ["h"]),
        node("Gather", ["h", "k"], ["y"], axis=1),
        node("Neg", ["h"], ["z"]),
    ]
    model = model_of(nodes, {"x": SHAPE}, {"k": np.array(1)}, outputs=["y", "z"])
    assert passed(model, select_early) == ["Relu", "Gather", "Neg"]


def _largest_of(*nodes: Any, **constants: Any) -> Any:
    """ArgMax of "p" along the last axis of three numbers."""
    every = [*nodes, node("ArgMax", ["p"], ["y"], axis=-1, keepdims=0)]
    return model_of(every, {"x": (2, 3)}, {k: np.array(v) for k, v in constants.items()})


SHARES = [
    node("Sigmoid", ["x"], ["s"]),
    node("ReduceSum", ["s", "last"], ["total"]),
    node("Add", ["total", "tiny"], ["more"]),
    node("Div", ["s", "more"], ["d"]),
    node("Mul", ["d", "three"], ["p"]),
]


def test_the_largest_share_is_that_of_the_largest_score() -> None:
    made = compile_model(
        _largest_of(*SHARES, last=[1], tiny=0.5, three=3.0), input_range=(-100.0, 100.0)
    )
    assert "spectral" not in ops_of(made.plan)
    x = np.array([[-90.0, -70.0, -80.0], [60.0, 70.0, 80.0]], np.float32)
    (got,), _ = Together(made.plan, made.weights).infer([x])
    assert got.tolist() == [1, 2]


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Mul", ["x", "minus"], ["p"])],
        [node("Relu", ["x"], ["p"])],
        [node("Softmax", ["x"], ["p"], axis=0)],
        [node("ReduceSum", ["x", "last"], ["total"]), node("Div", ["x", "total"], ["p"])],
        [node("Add", ["x", "own"], ["p"])],
    ],
    ids=lambda nodes: nodes[-1].op_type,
)
def test_what_may_change_the_order_stays_before_an_argmax(nodes: Any) -> None:
    model = _largest_of(*nodes, minus=-1.0, last=[1], own=[0.0, 5.0, 0.0])
    graph = import_model(model, 1, registry()).graph
    assert graph is not None
    (largest,) = [n for n in rewritten(graph).nodes if n.op == "ArgMax"]
    assert largest.inputs[0] == "p"
