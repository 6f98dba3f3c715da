"""A data owner's arrays: every mistake is named before anything is sent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mpcserve.errors import InputError
from mpcserve.plan import Plan
from mpcserve.serving.inprocess import simulate
from mpcserve.serving.inputs import batches, check_inputs, join_outputs
from tests.serving_support import as_model, dense_relu, dense_relu_plan, dense_weights, some_rows

PLAN = dense_relu_plan(batch=2)
GOOD = some_rows(PLAN, 5)


def with_value(value: float) -> NDArray[Any]:
    x = GOOD.copy()
    x[3, 1] = value
    return x


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (GOOD.astype(np.int64), r"'x': expected float32, got int64"),
        (GOOD.astype(bool), r"'x': expected float32, got bool"),
        (np.array([["a"] * 6]), r"'x': expected float32, got <U1"),
        (GOOD[:, :5], r"'x': expected shape \[rows, 6\], got \[5, 5\]"),
        (GOOD[0], r"'x': expected shape \[rows, 6\], got \[6\]"),
        (GOOD[:0], r"'x': no rows"),
        (with_value(np.nan), r"'x': not a finite number at \(3, 1\)"),
        (with_value(np.inf), r"'x': not a finite number at \(3, 1\)"),
        (with_value(8.5), r"'x': 1 values outside the range \[-8, 8\] \(proved\).*\(3, 1\)"),
        ({"z": GOOD}, r"expected inputs named x, got z"),
        ({}, r"expected inputs named x, got none"),
        ({"x": GOOD, "z": GOOD}, r"expected inputs named x, got x, z"),
    ],
)
def test_a_mistake_is_named(x: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        check_inputs(PLAN, x, "error")
    assert caught.value.exit_code == 2 and caught.value.hint


def test_clamping_brings_values_into_the_range() -> None:
    (x,) = check_inputs(PLAN, with_value(-1000.0), "clamp")
    assert x[3, 1] == -8.0 and np.array_equal(np.delete(x, 3, 0), np.delete(GOOD, 3, 0))


def test_clamping_does_not_accept_what_is_not_a_number() -> None:
    with pytest.raises(InputError, match="finite"):
        check_inputs(PLAN, with_value(np.nan), "clamp")


def test_double_precision_is_accepted() -> None:
    (x,) = check_inputs(PLAN, GOOD.astype(np.float64), "error")
    assert np.array_equal(x, GOOD)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_batches_hold_every_row_once_and_join_again(rows: int) -> None:
    x = GOOD[:rows]
    parts = list(batches(PLAN, [x]))
    assert all(a.shape == PLAN.inputs[0].shape for _, arrays in parts for a in arrays)
    joined = join_outputs(PLAN, [(count, [a]) for count, (a,) in parts])
    assert np.array_equal(joined["y"], x)


def test_inputs_must_have_equally_many_rows() -> None:
    second = replace(PLAN.inputs[0], name="z")
    two = replace(PLAN, inputs=(*PLAN.inputs, second))
    with pytest.raises(InputError, match="'x' 5, 'z' 3"):
        check_inputs(two, {"x": GOOD, "z": GOOD[:3]}, "error")


def test_simulating_runs_the_protocol_in_this_process() -> None:
    weights = dense_weights(PLAN)
    y, bill = simulate(as_model(PLAN, weights), GOOD[:1])
    assert isinstance(y, np.ndarray) and y.shape == (1, 4)
    assert np.abs(y - dense_relu(GOOD[:1], weights)).max() < 2.0**-8
    assert bill.rounds == 3
    with pytest.raises(InputError, match="3 batches of 2 rows"):
        simulate(as_model(PLAN, weights), GOOD)


def test_a_plan_without_a_batch_takes_exactly_its_shape() -> None:
    whole: Plan = replace(PLAN, outputs=(replace(PLAN.outputs[0], shape=(8,)),))
    with pytest.raises(InputError, match=r"expected shape \[2, 6\], got \[5, 6\]"):
        check_inputs(whole, GOOD, "error")
    check_inputs(whole, GOOD[:2], "error")
