"""Pooling against onnxruntime: maxima are equal, means err by less than two ulp."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpcserve.compiler import compile_model
from mpcserve.plan import bill_of
from tests.onnx_cases import Array, agree, model_of, node, ops_of, rng_of
from tests.plans import inside

pytestmark = pytest.mark.slow

WINDOWS: list[dict[str, Any]] = [
    {"kernel_shape": [2, 2], "strides": [2, 2]},
    {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
    {"kernel_shape": [3, 2], "strides": [1, 2], "pads": [1, 0, 0, 1], "dilations": [2, 1]},
    {"kernel_shape": [3, 3]},
    {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
    {"kernel_shape": [2, 3], "strides": [2, 2], "auto_pad": "SAME_LOWER"},
    {"kernel_shape": [5, 1], "strides": [3, 3]},
]


def sample(rng: np.random.Generator, *shape: int) -> Array:
    return rng.uniform(-4, 4, shape).astype(np.float32)


@pytest.mark.parametrize("ceil_mode", [0, 1])
@pytest.mark.parametrize("window", WINDOWS)
def test_max_pool_is_exact(window: dict[str, Any], ceil_mode: int) -> None:
    rng = rng_of(1)
    attrs = window if "auto_pad" in window else window | {"ceil_mode": ceil_mode}
    model = model_of([node("MaxPool", ["x"], **attrs)], {"x": (1, 2, 6, 7)})
    agree(model, [sample(rng, 1, 2, 6, 7) - 4], ulps=0, rng=rng, input_range=(-8, 0))


@pytest.mark.parametrize("count_include_pad", [0, 1])
@pytest.mark.parametrize("ceil_mode", [0, 1])
@pytest.mark.parametrize("window", WINDOWS)
def test_average_pool_errs_by_less_than_two_ulp(
    window: dict[str, Any], ceil_mode: int, count_include_pad: int
) -> None:
    rng = rng_of(2)
    attrs = window | {"count_include_pad": count_include_pad}
    attrs |= {} if "auto_pad" in window else {"ceil_mode": ceil_mode}
    model = model_of([node("AveragePool", ["x"], **attrs)], {"x": (1, 2, 6, 7)})
    compiled = agree(model, [sample(rng, 1, 2, 6, 7)], ulps=2, rng=rng)
    assert not {"mul", "sign"} & set(ops_of(compiled.plan))


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize(("shape", "kernel"), [((1, 2, 9), [3]), ((1, 1, 4, 5, 6), [2, 3, 2])])
def test_pools_work_along_one_and_three_axes(op: str, shape: Any, kernel: list[int]) -> None:
    rng = rng_of(3)
    model = model_of([node(op, ["x"], kernel_shape=kernel)], {"x": shape})
    agree(model, [sample(rng, *shape)], ulps=0 if op == "MaxPool" else 2, rng=rng)


@pytest.mark.parametrize("shape", [(1, 2, 7, 7), (2, 1, 4, 8), (1, 3, 5)])
def test_global_pools(shape: Any) -> None:
    rng = rng_of(4)
    x = sample(rng, *shape)
    agree(model_of([node("GlobalMaxPool", ["x"])], {"x": shape}), [x], ulps=0, rng=rng)
    agree(model_of([node("GlobalAveragePool", ["x"])], {"x": shape}), [x], ulps=2, rng=rng)


def test_a_max_pool_of_separable_windows_compares_axis_by_axis() -> None:
    model = model_of(
        [node("MaxPool", ["x"], kernel_shape=[3, 3], strides=[2, 2])], {"x": (1, 1, 7, 7)}
    )
    plan = compile_model(model).plan
    compared = sum(i.value.size for i in plan.instructions if i.op in ("sign", "rectify"))
    # Two per row of three (7 rows × 3 windows), then two per column: 42 + 18, not 9 · 8 = 72.
    assert compared == 60


def test_padding_never_wins_and_never_widens_the_bound() -> None:
    model = model_of(
        [node("MaxPool", ["x"], kernel_shape=[2, 2], pads=[1, 1, 1, 1])], {"x": (1, 1, 2, 2)}
    )
    compiled = agree(model, [np.full((1, 1, 2, 2), -7.0, np.float32)], ulps=0)
    plan = compiled.plan
    assert plan.value(plan.outputs[0].id).bound == plan.value(plan.inputs[0].id).bound


@pytest.mark.parametrize("storage_order", [0, 1])
@pytest.mark.parametrize("window", WINDOWS)
def test_the_indices_of_a_max_pool_are_those_of_the_first_maxima(
    window: dict[str, Any], storage_order: int
) -> None:
    rng = rng_of(5)
    attrs = window | {"storage_order": storage_order}
    model = model_of(
        [node("MaxPool", ["x"], ["y", "z"], **attrs)], {"x": (2, 2, 6, 7)}, outputs="yz"
    )
    model.graph.output[1].type.tensor_type.elem_type = 7
    # Whole numbers: ties are common.
    agree(model, [np.rint(sample(rng, 2, 2, 6, 7))], ulps=0, rng=rng)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_powers_are_pooled(p: int) -> None:
    rng = rng_of(6)
    x = sample(rng, 1, 2, 5, 6) / 2
    attrs = {"kernel_shape": [2, 3], "strides": [1, 2], "pads": [0, 1, 0, 1], "p": p}
    for op, given in (("LpPool", attrs), ("GlobalLpPool", {"p": p})):
        model = model_of([node(op, ["x"], **given)], {"x": x.shape}, opset=21)
        agree(model, [x], ulps=40, rng=rng, input_range=(-2, 2))


@pytest.mark.parametrize(("alpha", "rounds"), [(1e-3, 3), (4.0, None)])
def test_lrn_divides_by_a_power_of_its_neighbours(alpha: float, rounds: int | None) -> None:
    rng = rng_of(7)
    x = sample(rng, 1, 6, 2, 3)
    model = model_of([node("LRN", ["x"], size=3, alpha=alpha, beta=0.75)], {"x": x.shape})
    compiled = agree(model, [x], ulps=60, rng=rng, input_range=(-4, 4))
    assert rounds in (None, bill_of(inside(compiled.plan)).rounds)


def test_overlapping_windows_share_their_comparisons() -> None:
    attrs = {"kernel_shape": [9], "pads": [4, 4]}
    model = model_of([node("MaxPool", ["x"], **attrs)], {"x": (1, 1, 64)})
    compiled = agree(model, [sample(rng_of(8), 1, 1, 64)], ulps=0)
    compared = sum(i.value.size for i in compiled.plan.instructions if i.op == "sign")
    assert compared < 5 * 72 < 8 * 64
