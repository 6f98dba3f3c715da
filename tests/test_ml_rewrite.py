"""Operators of ai.onnx.ml in standard operators: onnxruntime runs both and answers the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from mpcserve.compiler import check_model, importing
from mpcserve.compiler.ml.rewrite import ML, rewriters
from tests.ml_cases import (
    classifier,
    ml_model,
    random_forest,
    regressor,
    rewritten,
    same_in_standard_operators,
)
from tests.onnx_cases import rng_of
from tests.test_ops_activation import close

NEAR_HALF = 1e-3
"""What onnxruntime itself loses of a probit near one half, as a root of what is nearly zero."""

TRANSFORMS = ("NONE", "LOGISTIC", "SOFTMAX", "SOFTMAX_ZERO", "PROBIT")
CLASSES: list[dict[str, Any]] = [
    {"classlabels_ints": [0, 1, 2]},
    {"classlabels_ints": [5, 1, 2]},
    {"classlabels_strings": ["a", "b", "c"]},
]
FEATURES = 3


def rows(count: int = 48) -> Any:
    return rng_of(7).normal(size=(count, FEATURES)).astype(np.float32)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("classes", CLASSES, ids=str)
@pytest.mark.parametrize("targets", [1, 3])
def test_linear_classifiers(transform: str, classes: dict[str, Any], targets: int) -> None:
    rng = rng_of(1)
    ((kind, labels),) = classes.items()
    labels = labels if targets == 3 else labels[:2]
    spread = 0.1 if transform == "PROBIT" else 1.0
    model = classifier(
        "LinearClassifier",
        FEATURES,
        coefficients=(spread * rng.normal(size=FEATURES * targets)).tolist(),
        intercepts=[0.5] * targets,
        post_transform=transform,
        **{kind: labels},
    )
    if targets == 1 and transform == "PROBIT":
        assert rewritten(model).graph.node[0].op_type == "LinearClassifier"  # has no right answer
    else:
        within = NEAR_HALF if transform == "PROBIT" else 1e-5
        same_in_standard_operators(model, rows(), within=within)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("targets", [1, 2])
def test_linear_regressors(transform: str, targets: int) -> None:
    same_in_standard_operators(
        regressor(
            "LinearRegressor",
            FEATURES,
            coefficients=[0.1, 0.02, -0.05, 0.03, -0.04, 0.06][: 3 * targets],
            intercepts=[0.5, 0.4][:targets],
            targets=targets,
            post_transform=transform,
        ),
        rows(),
        within=NEAR_HALF if transform == "PROBIT" else 1e-5,
    )


def test_a_probit_is_right_near_one_half_as_well() -> None:
    p = np.linspace(0.02, 0.98, 2001, dtype=np.float32).reshape(-1, 1)
    model = regressor("LinearRegressor", 1, coefficients=[1.0], post_transform="PROBIT")
    close(model, [p], 1e-3, input_range=(0.02, 0.98), batch=len(p))


@pytest.mark.parametrize(
    ("op", "attrs"),
    [
        ("Scaler", {"offset": [1.0, 2.0, 3.0], "scale": [0.1, 2.0, 3.0]}),
        ("Scaler", {"offset": [1.0], "scale": [0.5]}),
        ("Normalizer", {"norm": "L1"}),
        ("Normalizer", {"norm": "L2"}),
        ("Normalizer", {"norm": "MAX"}),
        ("Binarizer", {"threshold": 0.3}),
        ("Imputer", {"imputed_value_floats": [7.0, 8.0, 9.0], "replaced_value_float": 2.0}),
        ("Imputer", {"imputed_value_floats": [7.0], "replaced_value_float": float("nan")}),
        ("OneHotEncoder", {"cats_int64s": [2, 0, -1, 5]}),
        ("LabelEncoder", {"keys_floats": [1.0, 2.0, -1.0], "values_floats": [5.0, 0.5, 3.0]}),
    ],
)
def test_preparation_of_features(op: str, attrs: dict[str, Any]) -> None:
    whole = np.rint(2 * rows()) if op in ("Imputer", "OneHotEncoder", "LabelEncoder") else rows()
    result = same_in_standard_operators(regressor(op, FEATURES, **attrs), whole)
    assert op not in {n.op_type for n in result.graph.node}


def test_whole_numbers_are_encoded() -> None:
    values = {"keys_int64s": [3, 1, -1], "values_int64s": [10, 20, 30]}
    for outcome, attrs in ((7, values), (1, {"cats_int64s": [3, 1]})):
        op = "LabelEncoder" if outcome == 7 else "OneHotEncoder"
        model = ml_model(op, FEATURES, {"y": outcome}, kind=7, **attrs)
        result = same_in_standard_operators(model, np.rint(2 * rows()).astype(np.int64))
        assert op not in {n.op_type for n in result.graph.node}


def test_features_side_by_side() -> None:
    model = ml_model(
        "FeatureVectorizer", FEATURES, {"y": 1}, inputs=2, inputdimensions=[FEATURES] * 2
    )
    same_in_standard_operators(model, rows(), 2 * rows())


KERNELS = ["LINEAR", "POLY", "RBF", "SIGMOID"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_of_a_regressor(kernel: str) -> None:
    rng = rng_of(2)
    model = regressor(
        "SVMRegressor",
        FEATURES,
        coefficients=rng.normal(size=5).tolist(),
        kernel_params=[0.3, 0.2, 3.0],
        kernel_type=kernel,
        n_supports=5,
        rho=[0.4],
        support_vectors=rng.normal(size=5 * FEATURES).tolist(),
    )
    same_in_standard_operators(model, rows())


def test_distances_to_many_support_vectors_are_products() -> None:
    rng, count = rng_of(8), 700
    model = regressor(
        "SVMRegressor",
        FEATURES,
        coefficients=rng.normal(size=count).tolist(),
        kernel_params=[0.3, 0.0, 3.0],
        kernel_type="RBF",
        n_supports=count,
        rho=[0.4],
        support_vectors=rng.normal(size=count * FEATURES).tolist(),
    )
    result = same_in_standard_operators(model, rows(), within=1e-4)
    assert "Relu" in {n.op_type for n in result.graph.node}


def support_machine(count: int, **attrs: Any) -> onnx.ModelProto:
    rng = rng_of(3)
    per_class = [2, 3, 2, 4][:count]
    pairs, total = count * (count - 1) // 2, sum(per_class)
    return classifier(
        "SVMClassifier",
        FEATURES,
        coefficients=rng.normal(size=(count - 1) * total).tolist(),
        support_vectors=rng.normal(size=total * FEATURES).tolist(),
        vectors_per_class=per_class,
        kernel_params=[0.3, 0.1, 3.0],
        rho=rng.normal(size=pairs).tolist(),
        classlabels_ints=[4, 2, 3, 1][:count],
        **attrs,
    )


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("kernel", KERNELS)
def test_pairs_of_classes_vote(kernel: str, count: int) -> None:
    same_in_standard_operators(support_machine(count, kernel_type=kernel), rows())


@pytest.mark.parametrize("count", [2, 3])
def test_probabilities_are_platts(count: int) -> None:
    """onnxruntime iterates until its change is below 2.5e-3; the rewritten model is exact."""
    a, b = [-1.2, -0.8, -1.5], [0.3, -0.2, 0.1]
    pairs = count * (count - 1) // 2
    model = support_machine(count, kernel_type="RBF", prob_a=a[:pairs], prob_b=b[:pairs])
    same_in_standard_operators(model, rows(), within=5e-3)


@pytest.mark.parametrize("count", [2, 3])
def test_a_support_machine_without_support_vectors_is_linear(count: int) -> None:
    model = classifier(
        "SVMClassifier",
        FEATURES,
        coefficients=rng_of(4).normal(size=FEATURES * count).tolist(),
        kernel_params=[0.0, 0.0, 3.0],
        kernel_type="LINEAR",
        rho=[0.2],
        classlabels_ints=[3, 4, 5][:count],
        post_transform="LOGISTIC",
    )
    same_in_standard_operators(model, rows())


@pytest.mark.parametrize("transform", ["NONE", "LOGISTIC", "SOFTMAX"])
@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize(
    ("column", "base"),
    [(0, 0), (0, 1), (1, 0), (1, 1), (None, 0), (None, 1), (None, 2)],  # else it reads garbage
)
def test_trees_for_two_classes(
    transform: str, positive: bool, column: int | None, base: int
) -> None:
    rng = rng_of(5)
    forest = random_forest(rng, 3, FEATURES, 3, 2, only=column, low=0.0 if positive else -1.0)
    more = {"base_values": rng.uniform(0, 1, size=base).tolist()} if base else {}
    labels = {"classlabels_strings": ["a", "b"]}
    same_in_standard_operators(
        classifier(
            "TreeEnsembleClassifier", FEATURES, post_transform=transform, **forest, **more, **labels
        ),
        rows(),
    )


@pytest.mark.parametrize("transform", TRANSFORMS[:4])
@pytest.mark.parametrize("classes", CLASSES, ids=str)
def test_trees_for_three_classes(transform: str, classes: dict[str, Any]) -> None:
    forest = random_forest(rng_of(6), 3, FEATURES, 3, 3)
    labels = {k.replace("ints", "int64s"): v for k, v in classes.items()}
    base = {"base_values": [0.1, 0.2, -0.3]}
    same_in_standard_operators(
        classifier(
            "TreeEnsembleClassifier", FEATURES, post_transform=transform, **forest, **base, **labels
        ),
        rows(),
    )


def test_scores_that_are_shares_already_are_not_normalised_again() -> None:
    model = classifier(
        "LinearClassifier",
        FEATURES,
        coefficients=list(np.linspace(-1, 1, 3 * FEATURES)),
        intercepts=[0.0] * 3,
        classlabels_ints=[0, 1, 2],
        post_transform="SOFTMAX",
    )
    model.graph.node.append(helper.make_node("Normalizer", ["scores"], ["y"], domain=ML, norm="L1"))
    model.graph.output[1].name = "y"
    result = same_in_standard_operators(model, rows())
    assert "Div" not in {n.op_type for n in result.graph.node}


def test_maps_of_probabilities_become_a_matrix() -> None:
    model = classifier(
        "LinearClassifier",
        FEATURES,
        coefficients=[1.0] * 6,
        intercepts=[0.0, 0.1],
        classlabels_ints=[0, 1],
    )
    zipmap = helper.make_node("ZipMap", ["scores"], ["maps"], domain=ML, classlabels_int64s=[0, 1])
    model.graph.node.append(zipmap)
    model.graph.output[1].CopyFrom(onnx.ValueInfoProto(name="maps"))
    dropped = importing.named(model)
    assert "ZipMap" not in {n.op_type for n in dropped.graph.node}
    assert dropped.graph.output[1].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            support_machine(4, kernel_type="RBF", prob_a=[-1.0] * 6, prob_b=[0.0] * 6),
            "probabilities of 4 classes, computed for up to 3",
        ),
        (regressor("OneHotEncoder", FEATURES, cats_strings=["a", "b"]), "encodes text"),
        (regressor("Normalizer", FEATURES, norm="L7"), "norm 'L7' is unknown"),
    ],
    ids=["probabilities", "text", "norm"],
)
def test_what_is_refused_is_told_with_its_reason(model: onnx.ModelProto, reason: str) -> None:
    (report,) = [r for r in check_model(model) if r.status == "unsupported"]
    assert reason in report.reason
    assert report.op == model.graph.node[0].op_type


def test_every_rewriting_says_what_it_does() -> None:
    assert all(function.__doc__ for function in rewriters().values())
