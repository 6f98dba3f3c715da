"""Comparisons, logic, choices, casts and rounding, held against onnxruntime: exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from mpcserve.compiler import compile_model
from mpcserve.compiler.builder import Builder
from mpcserve.compiler.pipeline import encoded_weights
from mpcserve.compiler.registry import registry
from mpcserve.compiler.widths import assign_widths, extended
from mpcserve.errors import ModelError
from mpcserve.plan import bill_of
from mpcserve.protocol import Together
from tests.onnx_cases import Array, agree, model_of, node, on_grid, ops_of, plain, rng_of
from tests.plans import inside

SHAPE = (3, 4)
BOOL, INT64 = onnx.TensorProto.BOOL, onnx.TensorProto.INT64


def steps(rng: np.random.Generator, *shape: int) -> Array:
    """Numbers on a coarse grid, many of them equal, some ties of rounding."""
    return (rng.integers(-12, 13, shape) / 4).astype(np.float32)


def bits_model(nodes: list[Any], inputs: Any, constants: Any = None, kind: int = BOOL) -> Any:
    model = model_of(nodes, inputs, constants)
    model.graph.output[0].type.tensor_type.elem_type = kind
    return model


def served(model: Any, inputs: list[Array], **options: Any) -> Any:
    """The real protocol, equal to onnxruntime."""
    compiled = compile_model(model, **{"input_range": (-8.0, 8.0)} | options)
    got, bill = Together(compiled.plan, compiled.weights).infer(inputs)
    assert bill == bill_of(compiled.plan)
    for mine, expected in zip(got, plain(model, *inputs), strict=True):
        assert mine.dtype == expected.dtype
        assert np.array_equal(mine, expected)
    return compiled.plan


@pytest.mark.parametrize("op", ["Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal"])
@pytest.mark.parametrize("other", ["secret", "weight", "zero"])
def test_comparisons_are_exact_bits(op: str, other: str) -> None:
    rng = rng_of(1)
    x, y = steps(rng, 5, 13), steps(rng, 13)
    y = np.zeros(13, np.float32) if other == "zero" else y
    inputs: Any = {"x": (5, 13)} | ({"w": (13,)} if other == "secret" else {})
    model = bits_model([node(op, ["x", "w"])], inputs, {} if other == "secret" else {"w": y})
    plan = served(model, [x, y] if other == "secret" else [x])
    assert bill_of(plan).rounds <= 3
    if other == "zero" and op != "Equal":
        assert ops_of(plan)[:2] in (["sign"], ["sign", "xor"], ["scale", "sign"])


@pytest.mark.parametrize("op", ["Less", "LessOrEqual", "Greater", "Equal"])
def test_no_secret_is_as_large_as_infinity(op: str) -> None:
    x = steps(rng_of(10), 3, 4)
    ends = np.array([-np.inf, 0.5, np.inf, -np.inf], np.float32)
    for w in (ends, np.float32(-np.inf)):
        b = Builder(16, 21)
        held = b.input("x", "float32", (3, 4), (-4.0, 4.0, "proved"))
        lowering = registry().find(op, 21)
        assert lowering is not None
        b.output("y", "bool", lowering.function(b, held, w))
        plan = assign_widths(extended(b.draft()), "compared")
        (got,), _ = Together(plan, encoded_weights(plan, b.draft())).infer([x])
        expected = {"Less": np.less, "LessOrEqual": np.less_equal, "Greater": np.greater}
        assert np.array_equal(got, expected.get(op, np.equal)(x, w))


def test_logic_on_secret_bits_joins_what_comparisons_say() -> None:
    rng = rng_of(2)
    x, y = steps(rng, *SHAPE), steps(rng, *SHAPE)
    nodes = [
        node("Less", ["x", "w"], ["a"]),
        node("Greater", ["x", "z"], ["b"]),
        node("Or", ["a", "b"], ["c"]),
        node("Not", ["c"], ["d"]),
        node("Xor", ["a", "d"], ["e"]),
        node("And", ["e", "mask"], ["f"]),
        node("Equal", ["f", "a"], ["g"]),
        node("Transpose", ["g"], ["h"]),
        node("Where", ["h", "u", "v"]),
    ]
    constants = {"z": np.float32(0), "mask": rng.random(SHAPE) < 0.5}
    u, v = steps(rng, 4, 3), steps(rng, 4, 1)
    model = model_of(nodes, {"x": SHAPE, "w": SHAPE, "u": (4, 3), "v": (4, 1)}, constants)
    served(model, [x, y, u, v])


def test_where_with_a_public_condition_is_local() -> None:
    rng = rng_of(3)
    model = model_of(
        [node("Where", ["c", "x", "w"])],
        {"x": (3, 4), "w": (4,)},
        {"c": rng.random((2, 1, 4)) < 0.5},
    )
    plan = served(model, [steps(rng, 3, 4), steps(rng, 4)])
    assert bill_of(plan).rounds == 0


def test_a_boolean_input_is_a_secret_that_logic_reads_for_free() -> None:
    rng = rng_of(4)
    x = rng.random(SHAPE) < 0.5
    model = model_of([node("Not", ["x"])], {"x": SHAPE}, kind=BOOL)
    plan = served(model, [x])
    assert bill_of(plan).rounds == 0


@pytest.mark.parametrize(("to", "kind"), [(1, np.float32), (7, np.int64), (9, np.bool_)])
def test_casts_of_booleans_and_to_whole_numbers(to: int, kind: Any) -> None:
    rng = rng_of(5)
    x = np.concatenate([steps(rng, 3, 20), [[-0.25] * 20]]).astype(np.float32)
    bits = [node("Less", ["x", "z"], ["h"]), node("Cast", ["h"], to=to)]
    model = bits_model(bits, {"x": (4, 20)}, {"z": np.float32(0)}, to)
    served(model, [x])
    served(bits_model([node("Cast", ["x"], to=to)], {"x": (4, 20)}, kind=to), [x])


@pytest.mark.parametrize("op", ["Floor", "Ceil", "Round", "Sign"])
def test_rounding_is_exact(op: str) -> None:
    rng = rng_of(6)
    ulp = np.float32(2.0**-16)
    x = np.concatenate([steps(rng, 40), [1 - ulp, -1 + ulp, ulp, -ulp, 0.5, 1.5, 2.5, -2.5, 7.5]])
    plan = served(model_of([node(op, ["x"])], {"x": (49,)}), [x.astype(np.float32)])
    assert bill_of(inside(plan)).rounds == {"Round": 4}.get(op, 3)


def test_the_sign_of_small_whole_numbers_takes_two_rounds() -> None:
    x = np.arange(-4, 5, dtype=np.int8)
    model = model_of([node("Sign", ["x"])], {"x": (9,)}, kind=onnx.TensorProto.INT8)
    assert bill_of(inside(served(model, [x]))).rounds == 2


@pytest.mark.skipif(onnx.defs.onnx_opset_version() < 28, reason="onnx lacks this remainder")
@pytest.mark.parametrize("divisor", [1.0, 0.5, 2.0])
def test_a_remainder_by_a_power_of_two_is_low_bits(divisor: float) -> None:
    x = steps(rng_of(7), 60)
    model = model_of([node("Mod", ["x", "w"])], {"x": (60,)}, {"w": np.float32(divisor)}, opset=28)
    compiled = compile_model(model, input_range=(-8.0, 8.0))
    (got,), bill = Together(compiled.plan, compiled.weights).infer([x])
    assert np.array_equal(got, np.mod(x, np.float32(divisor)))
    assert bill.rounds == 3


@pytest.mark.parametrize("constant", [True, False])
def test_a_remainder_has_the_sign_that_is_asked_for(constant: bool) -> None:
    rng = rng_of(8)
    x = steps(rng, 64)
    y = rng.choice(np.array([-3.25, -1.5, 1.25, 2.75], np.float32), 64)
    y = y if constant else np.abs(y)
    inputs: Any = {"x": (64,)} | ({} if constant else {"w": (64,)})
    model = model_of([node("Mod", ["x", "w"], fmod=1)], inputs, {"w": y} if constant else {})
    ranges = {"x": (-4.0, 4.0)} | ({} if constant else {"w": (1.0, 4.0)})
    agree(model, [x] if constant else [x, y], ulps=0, rng=rng, input_range=ranges)


@pytest.mark.parametrize("divisor", [1.5, 2.0])
@pytest.mark.parametrize("fmod", [0, 1])
def test_a_remainder_by_one_constant_has_one_inverse(divisor: float, fmod: int) -> None:
    model = model_of([node("Mod", ["x", "k"], fmod=fmod)], {"x": [40]}, {"k": np.float32(divisor)})
    x = rng_of(5).uniform(-8, 8, 40).astype(np.float32)
    agree(model, [x], ulps=0)


def test_guards_against_infinity_vanish() -> None:
    """Where(x > 0 and IsInf(x), a huge number, x), as nan_to_num is exported."""
    nodes = [
        node("IsInf", ["x"], ["i"]),
        node("Greater", ["x", "zero"], ["p"]),
        node("And", ["p", "i"], ["b"]),
        node("Where", ["b", "huge", "x"], ["w"]),
        node("Add", ["w", "w"]),
    ]
    huge = np.finfo(np.float32).max
    model = model_of(nodes, {"x": [4]}, {"zero": np.float32(0), "huge": huge})
    compiled = agree(model, [np.array([-1, 0, 1, 3], np.float32)], ulps=0)
    assert bill_of(compiled.plan).rounds == 0


def test_a_shape_that_would_depend_on_secrets_is_refused_with_the_reason() -> None:
    model = model_of([node("NonZero", ["x"])], {"x": SHAPE})
    with pytest.raises(ModelError, match="would depend on secret data"):
        compile_model(model)


def test_shrink_and_thresholded_relu_choose_side_by_side() -> None:
    rng = rng_of(9)
    x = steps(rng, 60)
    for op, attrs in (("Shrink", {"lambd": 1.0, "bias": 0.5}), ("ThresholdedRelu", {"alpha": 1.0})):
        plan = served(model_of([node(op, ["x"], **attrs)], {"x": (60,)}), [x])
        assert bill_of(inside(plan)).rounds == 3


def test_numbers_are_compared_on_the_grid_of_the_plan() -> None:
    x = np.array([0.3, 0.3 + 2.0**-19, 0.3 + 2.0**-15], np.float32)
    model = bits_model([node("Equal", ["x", "c"])], {"x": (3,)}, {"c": np.float32(0.3)})
    compiled = compile_model(model, input_range=(-8.0, 8.0))
    (got,), _ = Together(compiled.plan, compiled.weights).infer([on_grid(compiled.plan, 0, x)])
    assert got.tolist() == [True, True, False]
