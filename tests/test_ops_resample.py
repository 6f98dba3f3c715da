"""Interpolation with public weights: local, exact where it copies, else within a few ulp."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpcserve.compiler import compile_model
from mpcserve.compiler.sampling import Resampling, resized
from mpcserve.errors import ModelError
from mpcserve.plan import bill_of
from mpcserve.plan.store import plan_bytes
from tests.onnx_cases import agree, model_of, node, rng_of

SHAPE = (1, 2, 5, 6)


def resampled(nodes: list[Any], constants: Any, ulps: float, shape: Any = SHAPE) -> None:
    """As onnxruntime does it, without a round."""
    rng = rng_of(1)
    x = rng.uniform(-4, 4, shape).astype(np.float32)
    compiled = agree(model_of(nodes, {"x": shape}, constants), [x], ulps=ulps, rng=rng)
    assert bill_of(compiled.plan).rounds == 0


@pytest.mark.parametrize("nearest_mode", ["round_prefer_floor", "round_prefer_ceil", "floor"])
@pytest.mark.parametrize("transform", ["half_pixel", "asymmetric", "align_corners"])
def test_resize_copies_exactly(transform: str, nearest_mode: str) -> None:
    given = {"s": np.array([1.0, 1.0, 2.0, 0.5], np.float32)}
    attrs = {"coordinate_transformation_mode": transform, "nearest_mode": nearest_mode}
    resampled([node("Resize", ["x", "", "s"], **attrs)], given, 0)


@pytest.mark.parametrize("sizes", [(8, 3), (5, 13), (2, 2)])
@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("transform", ["half_pixel", "pytorch_half_pixel", "align_corners"])
def test_resize_interpolates_within_six_ulp(transform: str, mode: str, sizes: Any) -> None:
    given = {"n": np.array([1, 2, *sizes], np.int64)}
    attrs = {"coordinate_transformation_mode": transform, "mode": mode}
    resampled([node("Resize", ["x", "", "", "n"], **attrs)], given, 6)


@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_resize_with_antialias_averages_what_it_drops(mode: str) -> None:
    given = {"n": np.array([1, 2, 2, 3], np.int64)}
    resampled([node("Resize", ["x", "", "", "n"], mode=mode, antialias=1)], given, 6)


def test_doubling_a_picture_needs_two_bits_of_weight() -> None:
    taps = resized(4, 8, 2.0, Resampling("linear", "half_pixel"), (0.0, 1.0))
    assert set(np.unique(taps.weights)) <= {0.25, 0.75}
    given = {"s": np.array([1.0, 1.0, 2.0, 2.0], np.float32)}
    model = model_of([node("Resize", ["x", "", "s"], mode="linear")], {"x": SHAPE}, given)
    plan = compile_model(model).plan
    assert [i.attrs["bits"] for i in plan.instructions if i.op == "shift"] == [2, 2]


def test_a_large_picture_makes_no_large_plan() -> None:
    given = {"s": np.array([1.0, 1.0, 2.0, 2.0], np.float32)}
    model = model_of(
        [node("Resize", ["x", "", "s"], mode="linear")], {"x": (1, 3, 512, 512)}, given
    )
    assert len(plan_bytes(compile_model(model).plan)) < 8000


@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("align_corners", [0, 1])
def test_grid_sample_reads_at_public_points(
    mode: str, padding_mode: str, align_corners: int
) -> None:
    grid = rng_of(7).uniform(-1.3, 1.3, (1, 4, 3, 2)).astype(np.float32)
    attrs = {"mode": mode, "padding_mode": padding_mode, "align_corners": align_corners}
    resampled([node("GridSample", ["x", "g"], **attrs)], {"g": grid}, 0 if mode == "nearest" else 4)


def test_a_secret_grid_is_refused() -> None:
    model = model_of([node("GridSample", ["x", "g"])], {"x": SHAPE, "g": (1, 4, 3, 2)})
    with pytest.raises(ModelError, match="'grid' is computed from a secret value"):
        compile_model(model)


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_regions_are_pooled(mode: str) -> None:
    rng = rng_of(9)
    given = {
        "r": np.array([[0.3, 0.2, 4.1, 3.0], [1.0, 1.0, 5.5, 4.9]], np.float32),
        "i": np.array([0, 0], np.int64),
    }
    attrs = {"output_height": 2, "output_width": 3, "sampling_ratio": 2, "mode": mode}
    model = model_of([node("RoiAlign", ["x", "r", "i"], **attrs)], {"x": SHAPE}, given, opset=16)
    agree(model, [rng.uniform(-4, 4, SHAPE).astype(np.float32)], ulps=6, rng=rng)


def test_the_largest_element_of_a_region_is_exact() -> None:
    rng = rng_of(10)
    given = {"r": np.array([[0, 0, 0, 4, 3], [0, 1, 1, 5, 4]], np.float32)}
    model = model_of(
        [node("MaxRoiPool", ["x", "r"], pooled_shape=[2, 2])], {"x": SHAPE}, given, opset=16
    )
    agree(model, [rng.uniform(-4, 4, SHAPE).astype(np.float32)], ulps=0, rng=rng)


def test_whole_numbers_are_interpolated_as_fractions() -> None:
    nodes = [node("Cast", ["x"], ["f"], to=1), node("Resize", ["f", "", "s"], mode="linear")]
    given = {"s": np.array([1.0, 1.0, 2.0, 2.0], np.float32)}
    model = model_of(nodes, {"x": SHAPE}, given, kind=6)
    model.graph.output[0].type.tensor_type.elem_type = 1
    x = rng_of(11).integers(-8, 9, SHAPE).astype(np.int32)
    agree(model, [x], ulps=4)


def test_weights_that_are_nearly_whole_are_whole() -> None:
    """Three of five samples with scales in single precision: 0.6 · 5 is a little more than 3."""
    nodes = [
        node(
            "Resize",
            ["x", "", "scales"],
            mode="linear",
            coordinate_transformation_mode="align_corners",
        )
    ]
    model = model_of(nodes, {"x": [1, 1, 5, 5]}, {"scales": np.array([1, 1, 0.6, 0.6])})
    x = rng_of(8).uniform(-4, 4, (1, 1, 5, 5)).astype(np.float32)
    agree(model, [x], ulps=6)
