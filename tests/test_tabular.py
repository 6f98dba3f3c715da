"""One small model of each classical family: trained, exported, through the three roles."""

from __future__ import annotations

import pytest

pytest.importorskip("skl2onnx")

from models import tabular, tabular_cases

CASES = {case.name: case for family in tabular.FAMILIES[:4] for case in family()}

QUICK = (
    "linear scaler + logistic regression wine",
    "linear Gaussian naive Bayes wine",
    "SVM SVC RBF wine",
    "MLP MLP tanh wine",
    "trees decision tree breast_cancer",
    "boosting gradient boosting, 100 breast_cancer",
    "tables one-hot + logistic regression passengers",
    "tables ordinal + gradient boosting, 50 passengers",
    "tables target + logistic regression passengers",
)


@pytest.mark.parametrize("name", QUICK)
def test_labels_agree_on_the_whole_test_split(name: str) -> None:
    result = tabular.measured(CASES[name])
    assert result.agreement == 1.0
    assert result.max_abs_error < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "neighbours 5 nearest wine",
        "boosting AdaBoost, 20 wine",
    ],
)
def test_models_of_many_operators_agree(name: str) -> None:
    result = tabular.measured(CASES[name])
    assert result.agreement == 1.0
    assert result.max_abs_error < 2e-3


def test_every_case_has_a_name_of_its_own() -> None:
    listed = [case.name for family in tabular.FAMILIES[:4] for case in family()]
    assert len(set(listed)) == len(listed)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["xgboost", "lightgbm"])
def test_boosted_trees_of_other_libraries_agree(family: str) -> None:
    for module in (family, "onnxmltools"):
        pytest.importorskip(module)
    case = next(tabular_cases.xgboosted() if family == "xgboost" else tabular_cases.lightgbms())
    assert tabular.measured(case).agreement == 1.0
