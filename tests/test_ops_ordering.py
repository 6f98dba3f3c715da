"""ArgMax, TopK, Hardmax, OneHot: the right elements, ties as ONNX asks, rounds as stated."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from mpcserve.compiler import compile_model
from mpcserve.plan import bill_of
from mpcserve.plan.estimate import Line
from mpcserve.protocol import Together
from tests.onnx_cases import Array, model_of, node, plain, rng_of
from tests.plans import inside

FAR = Line("far", 1e9, 0.1)


def tied(rng: np.random.Generator, *shape: int) -> Array:
    """Numbers of which many are equal."""
    return (rng.integers(-6, 7, shape) / 4).astype(np.float32)


def served(model: Any, x: Array, **options: Any) -> Any:
    """The real protocol, equal to onnxruntime; its plan."""
    compiled = compile_model(model, **{"input_range": (-4.0, 4.0), "ring": 64} | options)
    got, bill = Together(compiled.plan, compiled.weights).infer([x])
    assert bill == bill_of(compiled.plan)
    for mine, expected in zip(got, plain(model, x), strict=True):
        assert mine.dtype == expected.dtype
        assert np.array_equal(mine, expected)
    return compiled.plan


def top_k(shape: tuple[int, ...], k: int, **attrs: Any) -> Any:
    model = model_of(
        [node("TopK", ["x", "k"], ["v", "i"], **attrs)], {"x": shape}, {"k": np.array([k])},
        outputs=("v", "i"),
    )  # fmt: skip
    model.graph.output[1].type.tensor_type.elem_type = onnx.TensorProto.INT64
    return model


@pytest.mark.parametrize("largest", [0, 1])
@pytest.mark.parametrize(
    ("shape", "k", "axis"), [((3, 7), 3, 1), ((3, 7), 7, -1), ((5, 2, 3), 1, 0), ((2, 1), 1, 1)]
)
def test_top_k_ranks_all_in_five_rounds(
    shape: tuple[int, ...], k: int, axis: int, largest: int
) -> None:
    plan = served(top_k(shape, k, axis=axis, largest=largest), tied(rng_of(1), *shape))
    assert bill_of(inside(plan)).rounds <= 5


def test_the_few_largest_of_many_are_found_by_groups() -> None:
    plan = served(top_k((2, 100), 2), tied(rng_of(2), 2, 100))
    compared = sum(i.value.size for i in plan.instructions if i.op == "sign")
    assert bill_of(plan).rounds == 10
    assert compared < 2 * (100 * 99 / 2) / 2


@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("op", ["ArgMax", "ArgMin"])
@pytest.mark.parametrize("line", [None, FAR])
def test_an_index_of_ties_is_the_first_or_the_last(op: str, last: int, line: Line | None) -> None:
    model = model_of([node(op, ["x"], axis=1, select_last_index=last)], {"x": (4, 9)})
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    plan = served(model, tied(rng_of(3), 4, 9), line=line)
    assert bill_of(inside(plan)).rounds == (5 if line else 12)


@pytest.mark.parametrize("shape", [(3, 5), (2, 20), (4, 1)])
def test_hardmax_marks_the_first_of_the_largest(shape: tuple[int, ...]) -> None:
    served(model_of([node("Hardmax", ["x"], axis=1)], {"x": shape}), tied(rng_of(4), *shape))


@pytest.mark.parametrize(("low", "axis"), [(0, -1), (-4, 0), (-4, 1)])
def test_one_hot_finds_the_place_of_a_secret_index(low: int, axis: int) -> None:
    x = rng_of(5).integers(low, 4, (3, 5)).astype(np.int8)
    nodes = [
        node("Cast", ["x"], ["h"], to=onnx.TensorProto.INT64),
        node("OneHot", ["h", "depth", "values"], axis=axis),
    ]
    constants = {"depth": np.int64(4), "values": np.array([-1.5, 3.0], np.float32)}
    model = model_of(nodes, {"x": (3, 5)}, constants, kind=onnx.TensorProto.INT8)
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    served(model, x)


def test_an_index_may_be_computed_with() -> None:
    nodes = [
        node("ArgMax", ["x"], ["i"], axis=1, keepdims=0),
        node("Equal", ["i", "two"], ["b"]),
        node("Cast", ["b"], to=onnx.TensorProto.FLOAT),
    ]
    model = model_of(nodes, {"x": (6, 3)}, {"two": np.int64(2)})
    served(model, tied(rng_of(6), 6, 3))
