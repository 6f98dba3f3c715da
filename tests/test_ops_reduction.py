"""Sums, means and ArgMax against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from tests.onnx_cases import NEWEST, agree, model_of, node, ops_of, rng_of

pytestmark = pytest.mark.slow

SHAPE = (2, 3, 5)


@pytest.mark.parametrize("op", ["ReduceSum", "ReduceMean"])
@pytest.mark.parametrize("opset", [7, 13, 18, NEWEST])
@pytest.mark.parametrize("axes", [None, [1], [0, 2], [-1]])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_reductions_take_axes_as_attribute_or_input(
    op: str, opset: int, axes: Any, keepdims: int
) -> None:
    rng = rng_of(1)
    x = rng.uniform(-4, 4, SHAPE).astype(np.float32)
    as_input = opset >= (13 if op == "ReduceSum" else 18)
    names, constants = ["x"], {}
    attrs: dict[str, Any] = {"keepdims": keepdims}
    if axes is not None and as_input:
        names, constants = ["x", "a"], {"a": np.array(axes)}
    elif axes is not None:
        attrs["axes"] = axes
    model = model_of([node(op, names, **attrs)], {"x": SHAPE}, constants, opset=opset)
    compiled = agree(model, [x], ulps=0 if op == "ReduceSum" else 2, rng=rng)
    assert not {"mul", "matmul"} & set(ops_of(compiled.plan))


def test_a_reduction_over_no_axes_is_nothing_if_asked_so() -> None:
    rng = rng_of(2)
    x = rng.uniform(-4, 4, SHAPE).astype(np.float32)
    model = model_of([node("ReduceSum", ["x"], noop_with_empty_axes=1)], {"x": SHAPE})
    assert ops_of(agree(model, [x], ulps=0, rng=rng).plan) == []


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("last", [0, 1])
def test_argmax_breaks_ties_as_asked(axis: int, keepdims: int, last: int) -> None:
    rng = rng_of(3)
    # Few different values, so that ties are many.
    x = rng.integers(-1, 2, (4, 7, 6)).astype(np.float32)
    attrs: dict[str, Any] = {"axis": axis, "keepdims": keepdims, "select_last_index": last}
    model = model_of([node("ArgMax", ["x"], **attrs)], {"x": x.shape})
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    compiled = agree(model, [x], ulps=0, rng=rng)
    output = compiled.plan.outputs[0]
    assert (output.dtype, compiled.plan.value(output.id).frac_bits) == ("int64", 0)


def test_argmax_reveals_the_label_only() -> None:
    model = model_of([node("ArgMax", ["x"], axis=1, keepdims=0)], {"x": ("N", 10)})
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    x = np.arange(40, dtype=np.float32).reshape(4, 10) % 7
    compiled = agree(model, [x], ulps=0, batch=4)
    plan = compiled.plan
    assert [(o.shape, plan.value(o.id).width) for o in plan.outputs] == [((4,), 5)]
