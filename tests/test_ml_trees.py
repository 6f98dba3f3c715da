"""Trees whose features, thresholds, shape and scores are secret, against onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from mpcserve.compiler import CompiledModel, check_model, compile_model
from mpcserve.errors import ConfigError, ModelError
from mpcserve.plan import plan_text
from mpcserve.protocol import Together
from tests.ml_cases import ML, OPSET, classifier, random_forest, regressor
from tests.onnx_cases import ops_of, plain, rng_of

Array = Any
FEATURES = 5
GRID = np.round(np.arange(-1.5, 1.5, 0.1), 1).tolist()
INEQUALITIES = ("BRANCH_LEQ", "BRANCH_LT", "BRANCH_GT", "BRANCH_GTE")
EQUALITIES = ("BRANCH_EQ", "BRANCH_NEQ", "BRANCH_LEQ")


def rows(count: int = 32) -> Array:
    """On the thresholds' grid, so that many values equal a threshold; whole numbers first."""
    values = np.round(rng_of(1).normal(size=(count, FEATURES)), 1)
    values[:, 0] = np.rint(2 * values[:, 0])
    return values.astype(np.float32)


def forest(depth: int, targets: int, seed: int = 2, trees: int = 4, **attrs: Any) -> dict[str, Any]:
    rng = rng_of(seed)
    return random_forest(
        rng, trees, FEATURES, depth, targets, prefix="target", grid=GRID, **attrs
    ) | {"n_targets": targets}


def run(compiled: CompiledModel, x: Array) -> list[Array]:
    outputs, _ = Together(compiled.plan, compiled.weights).infer([x])
    return list(outputs)


def agree(model: onnx.ModelProto, within: float = 2.0**-14, **options: Any) -> CompiledModel:
    x = rows()
    compiled = compile_model(model, calibrate=x, batch=len(x), **options)
    (y,), (expected,) = run(compiled, x), plain(model, x)
    assert y.shape == expected.shape
    np.testing.assert_allclose(y, expected, atol=within)
    return compiled


@pytest.mark.parametrize("depth", [1, 3, 7])
@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("modes", [INEQUALITIES, EQUALITIES], ids=["order", "equality"])
def test_rows_reach_the_same_leaves(depth: int, targets: int, modes: Sequence[str]) -> None:
    agree(regressor("TreeEnsembleRegressor", FEATURES, **forest(depth, targets, modes=modes)))


@pytest.mark.parametrize("modes", [INEQUALITIES, EQUALITIES], ids=["order", "equality"])
def test_whole_numbers_are_compared_with_halves(modes: Sequence[str]) -> None:
    attrs = random_forest(rng_of(3), 4, FEATURES, 4, 3, modes=modes, grid=GRID)
    attrs["nodes_values"] = [np.rint(10 * v) / 2 for v in attrs["nodes_values"]]
    labels = {"classlabels_int64s": [0, 1, 2]}
    model = classifier(
        "TreeEnsembleClassifier", FEATURES, kind=onnx.TensorProto.INT64, **attrs, **labels
    )
    x = np.rint(3 * rows()).astype(np.int64)
    got, expected = run(compile_model(model, calibrate=x, batch=len(x)), x), plain(model, x)
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_allclose(got[1], expected[1], atol=2.0**-14)


def test_columns_of_several_inputs_are_as_fine_as_the_finest() -> None:
    """A tree over a whole number, a large and a small column, each an input of its own."""
    tree = regressor("TreeEnsembleRegressor", 3, **one_split_each()).graph.node[0]
    names = ("count", "large", "small")
    kinds = (onnx.TensorProto.INT64, onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT)
    nodes = [
        helper.make_node("Cast", ["count"], ["c"], to=onnx.TensorProto.FLOAT, name="cast"),
        helper.make_node("Concat", ["c", "large", "small"], ["x"], axis=1, name="join"),
        tree,
    ]
    ins = [helper.make_tensor_value_info(n, k, ["N", 1]) for n, k in zip(names, kinds, strict=True)]
    outs = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)]
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(ML, 3)]
    model = helper.make_model(
        helper.make_graph(nodes, "columns", ins, outs), opset_imports=opsets, ir_version=10
    )
    rng = rng_of(9)
    feed = {
        "count": rng.integers(0, 5, (64, 1)),
        "large": (1000 * rng.random((64, 1))).astype(np.float32),
        "small": (1e-3 * rng.random((64, 1))).astype(np.float32),
    }
    compiled = compile_model(model, calibrate=feed, batch=64)
    bits = [compiled.plan.value(i.id).frac_bits for i in compiled.plan.inputs]
    assert bits[0] == 0 and bits[1] == bits[2] > 30
    outputs, _ = Together(compiled.plan, compiled.weights).infer(list(feed.values()))
    np.testing.assert_allclose(outputs[0], plain(model, *feed.values())[0], atol=2.0**-14)


def one_split_each() -> dict[str, Any]:
    """count ≤ 2.5, large ≤ 500, small ≤ 0.0005: eight leaves."""
    splits, nodes = (2.5, 500.0, 0.0005), range(15)
    level = [int(k + 1).bit_length() - 1 for k in nodes]
    inner = [lv < 3 for lv in level]
    return {
        "nodes_treeids": [0] * 15,
        "nodes_nodeids": list(nodes),
        "nodes_featureids": [lv if i else 0 for lv, i in zip(level, inner, strict=True)],
        "nodes_values": [splits[lv] if i else 0.0 for lv, i in zip(level, inner, strict=True)],
        "nodes_modes": ["BRANCH_LEQ" if i else "LEAF" for i in inner],
        "nodes_truenodeids": [2 * k + 1 if i else 0 for k, i in zip(nodes, inner, strict=True)],
        "nodes_falsenodeids": [2 * k + 2 if i else 0 for k, i in zip(nodes, inner, strict=True)],
        "target_treeids": [0] * 8,
        "target_nodeids": list(range(7, 15)),
        "target_ids": [0] * 8,
        "target_weights": [0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5],
        "n_targets": 1,
    }


@pytest.mark.parametrize("how", ["SUM", "AVERAGE", "MIN", "MAX"])
@pytest.mark.parametrize("targets", [1, 2])
def test_trees_are_joined_as_the_model_asks(how: str, targets: int) -> None:
    attrs = forest(3, targets, trees=5) | {"aggregate_function": how}
    base = {"base_values": [0.25] * targets}
    agree(regressor("TreeEnsembleRegressor", FEATURES, **attrs, **base))


def test_a_shallow_tree_of_any_shape_takes_five_rounds() -> None:
    plan = agree(regressor("TreeEnsembleRegressor", FEATURES, **forest(3, 1))).plan
    assert [o for o in ops_of(plan) if o in ("matmul", "sign", "all", "select")] == [
        "matmul",
        "sign",
        "all",
        "select",
    ]


def test_a_deep_tree_costs_its_leaves_not_its_depth() -> None:
    """A chain of 40 nodes: a complete tree of that depth has 2^40 leaves."""
    count = 40
    nodes = [(k, "BRANCH_LEQ", 2 * k + 1, 2 * k + 2) for k in range(count)]
    ids: list[int] = []
    attrs: dict[str, list[Any]] = {
        f"nodes_{k}": [] for k in ("featureids", "values", "modes", "truenodeids", "falsenodeids")
    }
    for k, mode, yes, no in nodes:
        # Inner nodes are 0, 2, 4, …; each has a leaf behind it.
        for id, row in (
            (2 * k, (k % FEATURES, 0.1 * (k % 9) - 0.4, mode, yes, no)),
            (2 * k + 1, (0, 0.0, "LEAF", 0, 0)),
        ):
            ids.append(id)
            for column, value in zip(attrs.values(), row, strict=True):
                column.append(value)
    ids.append(2 * count)
    for column, value in zip(attrs.values(), (0, 0.0, "LEAF", 0, 0), strict=True):
        column.append(value)
    leaves = [k for k, mode in zip(ids, attrs["nodes_modes"], strict=True) if mode == "LEAF"]
    model = regressor(
        "TreeEnsembleRegressor",
        FEATURES,
        nodes_treeids=[0] * len(ids),
        nodes_nodeids=ids,
        target_treeids=[0] * len(leaves),
        target_nodeids=leaves,
        target_ids=[0] * len(leaves),
        target_weights=np.linspace(-1, 1, len(leaves)).tolist(),
        n_targets=1,
        **attrs,
    )
    plan = agree(model).plan
    assert max(plan.value(k).size for k in range(len(plan.instructions))) < 60 * 48 * 32


def newest_form(**attrs: Any) -> onnx.ModelProto:
    """x1 < 0 ? (x0 ∈ {1, 2, −1} ? 1 : 2) : (x2 ≥ 0.2 ? 3 : 4), and a stump."""
    tensors = {
        "nodes_modes": np.array([1, 6, 2, 4], np.uint8),
        "nodes_splits": np.array([0.0, 0.0, 0.2, 0.5], np.float32),
        "leaf_weights": np.array([1, 2, 3, 4, 0.5, -0.5], np.float32),
        "membership_values": np.array([1, 2, -1, np.nan], np.float32),
    }
    node = helper.make_node(
        "TreeEnsemble",
        ["x"],
        ["y"],
        name="trees",
        domain=ML,
        nodes_featureids=[1, 0, 2, 3],
        nodes_truenodeids=[1, 0, 2, 4],
        nodes_trueleafs=[0, 1, 1, 1],
        nodes_falsenodeids=[2, 1, 3, 5],
        nodes_falseleafs=[0, 1, 1, 1],
        leaf_targetids=[0, 0, 0, 0, 0, 0],
        tree_roots=[0, 3],
        n_targets=1,
        **{k: numpy_helper.from_array(v) for k, v in tensors.items()},
        **attrs,
    )
    ins = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", FEATURES])]
    outs = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)]
    graph = helper.make_graph([node], "newest", ins, outs)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(ML, 5)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize("how", [0, 1, 2, 3])
def test_the_newest_form_with_sets_of_values(how: int) -> None:
    agree(newest_form(aggregate_function=how, post_transform=0))


@pytest.mark.parametrize("transform", ["NONE", "LOGISTIC", "SOFTMAX"])
@pytest.mark.parametrize("targets", [1, 2])
def test_a_post_transform_follows_the_scores(transform: str, targets: int) -> None:
    attrs = forest(2, targets) | {"post_transform": transform}
    agree(regressor("TreeEnsembleRegressor", FEATURES, **attrs), within=1e-3)


@pytest.mark.parametrize("targets", [1, 2])
def test_whole_numbers_come_out_whole(targets: int) -> None:
    """The number of a leaf may be looked up next."""
    attrs = forest(4, targets)
    attrs["target_weights"] = list(map(float, range(len(attrs["target_weights"]))))
    agree(regressor("TreeEnsembleRegressor", FEATURES, **attrs), within=0.0)


def test_a_classifier_names_the_class() -> None:
    attrs = random_forest(rng_of(4), 5, FEATURES, 4, 3, grid=GRID)
    names = {"classlabels_strings": ["low", "middle", "high"]}
    model = classifier("TreeEnsembleClassifier", FEATURES, **attrs, **names)
    x = rows()
    label, scores = run(compile_model(model, calibrate=x, batch=len(x)), x)
    expected = plain(model, x)
    np.testing.assert_array_equal(label, expected[0])
    np.testing.assert_allclose(scores, expected[1], atol=2.0**-14)


# secrecy


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("targets", [1, 3])
def test_two_forests_of_one_padding_have_the_same_plan(deep: bool, targets: int) -> None:
    """Other features, thresholds, shapes and scores: not one letter of the plan differs."""
    padding = {"tree_depth": 9, "tree_leaves": 96} if deep else {"tree_depth": 4}
    plans = []
    for seed in (5, 6):
        attrs = forest(6 if deep else 4, targets, seed=seed, modes=INEQUALITIES)
        attrs["target_weights"][0] = 0.9  # the same range of scores
        model = regressor("TreeEnsembleRegressor", FEATURES, **attrs)
        plans.append(compile_model(model, input_range=(-4.0, 4.0), frac_bits=16, **padding).plan)
    assert plan_text(plans[0]) == plan_text(plans[1])
    assert plans[0].to_json()["instructions"] == plans[1].to_json()["instructions"]
    assert plans[0].digest == plans[1].digest


def test_the_plan_holds_no_number_of_the_model() -> None:
    attrs = forest(4, 1, seed=7)
    attrs["nodes_values"] = [v + 0.0123 for v in attrs["nodes_values"]]
    model = regressor("TreeEnsembleRegressor", FEATURES, **attrs)
    plan = compile_model(model, input_range=(-4.0, 4.0)).plan
    constants = [i for i in plan.instructions if i.op == "constant"]
    assert not constants
    assert (
        plan.model_digest
        == compile_model(
            regressor("TreeEnsembleRegressor", FEATURES, **forest(4, 1, seed=8)),
            input_range=(-4.0, 4.0),
        ).plan.model_digest
    )


# what is refused


def test_a_tree_larger_than_declared_is_refused() -> None:
    model = regressor("TreeEnsembleRegressor", FEATURES, **forest(4, 1))
    with pytest.raises(ModelError, match="depth 4, padded to 3"):
        compile_model(model, tree_depth=3)


def test_trees_are_not_compared_in_32_bits() -> None:
    model = regressor("TreeEnsembleRegressor", FEATURES, **forest(2, 1))
    with pytest.raises(ConfigError, match="64 bits"):
        compile_model(model, ring=32)


def test_an_unknown_mode_is_named() -> None:
    model = regressor("TreeEnsembleRegressor", FEATURES, **forest(2, 1, modes=["BRANCH_ODD"]))
    reports = [r for r in check_model(model) if r.status == "unsupported"]
    assert reports
