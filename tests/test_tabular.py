"""One small model of each classical family: trained, exported, through the three roles."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("skl2onnx")

from models import tabular, tabular_cases

CASES = {case.name: case for family in tabular.FAMILIES[:5] for case in family()}

QUICK = (
    "linear scaler + logistic regression wine",
    "linear Gaussian naive Bayes wine",
    "SVM SVC RBF wine",
    "MLP MLP tanh wine",
    "trees decision tree breast_cancer",
    "boosting gradient boosting, 100 breast_cancer",
    "boosting AdaBoost, 20 diabetes",
    "neighbours 5 nearest, weighted wine",
    "pipelines calibrated logistic regression wine",
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
        "neighbours local outliers wine",
    ],
)
def test_models_of_many_operators_agree(name: str) -> None:
    result = tabular.measured(CASES[name])
    assert result.agreement == 1.0
    assert result.max_abs_error < 2e-3


def test_every_case_has_a_name_of_its_own() -> None:
    listed = [case.name for family in tabular.FAMILIES[:5] for case in family()]
    assert len(set(listed)) == len(listed)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["xgboost", "lightgbm"])
def test_boosted_trees_of_other_libraries_agree(family: str) -> None:
    for module in (family, "onnxmltools"):
        pytest.importorskip(module)
    case = next(tabular_cases.xgboosted() if family == "xgboost" else tabular_cases.lightgbms())
    assert tabular.measured(case).agreement == 1.0


def test_a_library_that_is_missing_is_named_and_its_models_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "xgboost", None)
    monkeypatch.setattr(tabular, "FAMILIES", (tabular_cases.xgboosted, tabular_cases.pipelines))
    assert {c.family for c in tabular.wanted("ridge", False)} == {"pipelines"}
    assert "is not installed, so its models are left out" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--write needs all of them"):
        list(tabular.wanted("", True))
