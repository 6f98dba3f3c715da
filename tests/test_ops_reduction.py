"""Reductions, running sums and losses against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from mpcserve.compiler.builder import Builder
from mpcserve.compiler.ops.cumulative import cum_prod
from mpcserve.compiler.widths import assign_widths, extended
from mpcserve.plan import bill_of, verify_plan
from tests.onnx_cases import NEWEST, agree, model_of, node, ops_of, rng_of
from tests.plan_interpreter import Interpreter

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


@pytest.mark.parametrize(
    ("op", "low", "ulps"),
    [
        ("ReduceMax", -2, 0),
        ("ReduceMin", -2, 0),
        ("ReduceL1", -2, 0),
        ("ReduceSumSquare", -2, 2),
        ("ReduceL2", -2, 20),
        ("ReduceProd", -2, 200),
        ("ReduceLogSum", 0.5, 8),
    ],
)
@pytest.mark.parametrize("axes", [None, [1], [0, -1]])
def test_norms_products_and_extrema_over_axes(op: str, low: float, ulps: int, axes: Any) -> None:
    rng = rng_of(4)
    x = rng.uniform(low, 2, (2, 3, 2)).astype(np.float32)
    constants = {} if axes is None else {"a": np.array(axes)}
    model = model_of([node(op, ["x", *constants], keepdims=0)], {"x": x.shape}, constants)
    agree(model, [x], ulps=ulps, rng=rng, input_range=(float(low), 2.0))


def test_a_product_of_many_gives_up_fraction_bits_rather_than_wrap() -> None:
    rng = rng_of(5)
    x = rng.uniform(-4, 4, (1, 16)).astype(np.float32)
    model = model_of([node("ReduceProd", ["x", "a"])], {"x": x.shape}, {"a": np.array([1])})
    agree(model, [x], ulps=2.0**16 * 4, rng=rng, input_range=(-4.0, 4.0))


@pytest.mark.parametrize("op", ["CumSum", "CumProd"])
@pytest.mark.parametrize(("exclusive", "reverse"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_running_sums_are_local_and_products_take_log_rounds(
    op: str, exclusive: int, reverse: int
) -> None:
    rng = rng_of(6)
    x = (rng.integers(-8, 9, (3, 7)) / 4).astype(np.float32)
    attrs = {"exclusive": exclusive, "reverse": reverse}
    if op == "CumSum":
        model = model_of([node(op, ["x", "a"], **attrs)], {"x": (3, 7)}, {"a": np.int64(1)})
        plan = agree(model, [x], ulps=0, rng=rng, input_range=(-2.0, 2.0)).plan
        assert bill_of(plan).rounds == 0
        return
    turned = x[:, ::-1] if reverse else x
    shifted = np.c_[np.ones((3, 1)), turned[:, :-1]] if exclusive else turned
    expected = np.cumprod(shifted, axis=1)
    b = Builder(16, 26)
    y = cum_prod(b, b.input("x", "float32", (3, 7), (-2.0, 2.0, "proved")), np.int64(1), **attrs)
    b.output("y", "float32", y)
    plan = assign_widths(extended(b.draft()), "product")
    verify_plan(plan)
    (got,) = Interpreter(plan, {}, rng).run(x)
    assert np.abs(got - (expected[:, ::-1] if reverse else expected)).max() < 1e-2
    assert bill_of(plan).rounds <= 4  # three products, and an extend as ranges grow


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("op", ["NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss"])
def test_losses_pick_public_labels(op: str, weighted: bool, reduction: str) -> None:
    rng = rng_of(7)
    x = rng.uniform(-2, 2, (4, 5, 3)).astype(np.float32)
    labels = rng.integers(0, 5, (4, 3))
    constants = {"t": labels} | (
        {"w": rng.uniform(0.5, 2, 5).astype(np.float32)} if weighted else {}
    )
    attrs = {"reduction": reduction, "ignore_index": int(labels[0, 0])}
    model = model_of([node(op, ["x", *constants], **attrs)], {"x": x.shape}, constants)
    agree(model, [x], ulps=40, rng=rng, input_range=(-2.0, 2.0))
