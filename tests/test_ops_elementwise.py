"""Elementwise operators against onnxruntime: equal where no product is involved."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from mpcserve.compiler import compile_model
from mpcserve.errors import ModelError
from mpcserve.plan import bill_of
from tests.onnx_cases import NEWEST, Array, agree, model_of, node, ops_of, rng_of
from tests.plans import inside

pytestmark = pytest.mark.slow

SHAPE = (2, 3, 4)


def sample(rng: np.random.Generator, *shape: int) -> Array:
    return rng.uniform(-4, 4, shape).astype(np.float32)


def on_grid(rng: np.random.Generator, *shape: int) -> Array:
    return (rng.integers(-512, 513, shape) / 256).astype(np.float32)


@pytest.mark.parametrize("op", ["Add", "Sub", "Sum", "Max", "Min"])
@pytest.mark.parametrize("other", [SHAPE, (3, 1), (1,), (5, 1, 3, 4), ()])
@pytest.mark.parametrize("constant", [True, False])
def test_exact_operators_broadcast_secret_and_constant_operands(
    op: str, other: Any, constant: bool
) -> None:
    rng = rng_of(1)
    x, y = sample(rng, *SHAPE), on_grid(rng, *other)
    inputs: dict[str, Any] = {"x": SHAPE} | ({} if constant else {"c": other})
    model = model_of([node(op, ["x", "c"])], inputs, {"c": y} if constant else {})
    agree(model, [x] if constant else [x, y], ulps=0, rng=rng)


@pytest.mark.parametrize("op", ["Sum", "Max", "Min"])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_variadic_operators_take_any_number_of_operands(op: str, count: int) -> None:
    rng = rng_of(2)
    names = [f"x{i}" for i in range(count)]
    model = model_of([node(op, names)], dict.fromkeys(names, SHAPE))
    agree(model, [sample(rng, *SHAPE) for _ in names], ulps=0, rng=rng)


def test_subtraction_from_a_constant_is_local() -> None:
    rng = rng_of(3)
    model = model_of([node("Sub", ["c", "x"])], {"x": SHAPE}, {"c": on_grid(rng, 4)})
    assert ops_of(agree(model, [sample(rng, *SHAPE)], ulps=0, rng=rng).plan) == ["sub"]


@pytest.mark.parametrize("other", [SHAPE, (3, 1), ()])
@pytest.mark.parametrize("constant", [True, False])
def test_mul_is_one_product(other: Any, constant: bool) -> None:
    rng = rng_of(4)
    x, y = sample(rng, *SHAPE), on_grid(rng, *other)
    inputs: dict[str, Any] = {"x": SHAPE} | ({} if constant else {"c": other})
    model = model_of([node("Mul", ["x", "c"])], inputs, {"c": y} if constant else {})
    compiled = agree(model, [x] if constant else [x, y], ulps=1.5, rng=rng)
    assert ops_of(compiled.plan) == ["mul"]


def test_a_square_is_known_to_be_positive() -> None:
    rng = rng_of(5)
    model = model_of([node("Mul", ["x", "x"], ["h"]), node("Relu", ["h"])], {"x": SHAPE})
    assert "select" in ops_of(agree(model, [sample(rng, *SHAPE)], ulps=1.5, rng=rng).plan)


def test_div_by_a_constant_is_a_product_with_its_inverse() -> None:
    rng = rng_of(6)
    model = model_of(
        [node("Div", ["x", "c"])], {"x": SHAPE}, {"c": np.array([0.5, 2, -4, 8], np.float32)}
    )
    assert ops_of(agree(model, [sample(rng, *SHAPE)], ulps=1.5, rng=rng).plan) == ["mul"]


@pytest.mark.parametrize("op", ["Neg", "Abs", "Relu", "Identity"])
def test_unary_operators_are_exact(op: str) -> None:
    rng = rng_of(7)
    agree(model_of([node(op, ["x"])], {"x": SHAPE}), [sample(rng, *SHAPE)], ulps=0, rng=rng)


@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.25, 0.3, 1.0, 1.7, -0.2])
def test_leaky_relu_errs_by_less_than_two_ulp(alpha: float) -> None:
    rng = rng_of(8)
    model = model_of([node("LeakyRelu", ["x"], alpha=alpha)], {"x": SHAPE})
    agree(model, [sample(rng, *SHAPE)], ulps=2, rng=rng)


@pytest.mark.parametrize("slope", [(3, 1), (1,), SHAPE])
@pytest.mark.parametrize("constant", [True, False])
def test_prelu_multiplies_the_negative_part_by_a_secret_slope(slope: Any, constant: bool) -> None:
    rng = rng_of(9)
    x, s = sample(rng, *SHAPE), on_grid(rng, *slope)
    inputs: dict[str, Any] = {"x": SHAPE} | ({} if constant else {"s": slope})
    model = model_of([node("PRelu", ["x", "s"])], inputs, {"s": s} if constant else {})
    agree(model, [x] if constant else [x, s], ulps=1.5, rng=rng)


@pytest.mark.parametrize("opset", [7, 11, NEWEST])
@pytest.mark.parametrize("ends", [(0.0, 6.0), (-1.5, 2.25), (None, 1.0), (1.0, None), (None, None)])
def test_clip_takes_its_ends_as_attributes_or_inputs(opset: int, ends: Any) -> None:
    rng = rng_of(10)
    low, high = ends
    if opset < 11:
        attrs = {k: v for k, v in (("min", low), ("max", high)) if v is not None}
        model = model_of([node("Clip", ["x"], **attrs)], {"x": SHAPE}, opset=opset)
    else:
        given = {k: np.float32(v) for k, v in (("a", low), ("b", high)) if v is not None}
        names = ["x", *(k if k in given else "" for k in "ab")]
        model = model_of([node("Clip", names)], {"x": SHAPE}, given, opset=opset)
    agree(model, [sample(rng, *SHAPE)], ulps=0, rng=rng)


def test_clip_with_crossed_ends_gives_the_upper_one() -> None:
    rng = rng_of(10)
    given = {"a": np.float32(2), "b": np.float32(-1)}
    model = model_of([node("Clip", ["x", "a", "b"])], {"x": SHAPE}, given)
    agree(model, [sample(rng, *SHAPE)], ulps=0, rng=rng)


@pytest.mark.parametrize("ends", [(0.0, 6.0), (-1.5, 2.25), (0.5, 0.5), (-7.875, -7.75)])
def test_a_clip_is_exact_at_its_ends_and_the_steps_beside_them(ends: tuple[float, float]) -> None:
    at = np.float32([[e + k * 2.0**-16 for e in (*ends, -8, 7.9) for k in (-2, -1, 0, 1, 2)]])
    at = at.clip(-8, 8)
    given = {k: np.float32(v) for k, v in zip("ab", ends, strict=True)}
    model = model_of([node("Clip", ["x", "a", "b"])], {"x": at.shape}, given)
    agree(model, [at], ulps=0, rng=rng_of(14))


@pytest.mark.parametrize(
    ("op", "attrs", "rounds", "online", "dealt"),
    [
        # Both ways together. One select of 20 bits where there were two of 21.
        ("Relu", {}, 3, 7.0, 22.75),
        ("Clip", {}, 3, 8.75, 45.5),
        ("HardSigmoid", {"alpha": 0.25}, 3, 8.25, 36.5),
        ("HardSwish", {}, 4, 18.0, 53.25),
        ("Shrink", {"lambd": 1.0, "bias": 0.5}, 3, 9.0, 46.0),
    ],
)
def test_two_comparisons_take_the_rounds_and_the_select_of_one(
    op: str, attrs: dict[str, Any], rounds: int, online: float, dealt: float
) -> None:
    ends = {"a": np.float32(0), "b": np.float32(6)} if op == "Clip" else {}
    model = model_of([node(op, ["x", *ends], **attrs)], {"x": (1000,)}, ends)
    bill = bill_of(inside(compile_model(model, input_range=(-8.0, 8.0)).plan))
    sent = bill.bytes["alice->bob"] + bill.bytes["bob->alice"]
    assert (bill.rounds, sent / 1000, bill.dealt_bytes / 1000) == (rounds, online, dealt)


RUNS = {
    "ReLU6 as Relu and Min": ([("Relu", []), ("Min", ["six"])], (0.0, 6.0)),
    "hard sigmoid as Min and Max": ([("Min", ["one"]), ("Max", ["zero"])], (0.0, 1.0)),
    "crossed, the last one wins": ([("Max", ["six"]), ("Min", ["one"])], (1.0, 1.0)),
    "three": ([("Clip", ["zero", "six"]), ("Max", ["one"]), ("Clip", ["", "six"])], (1.0, 6.0)),
}


@pytest.mark.parametrize("run", RUNS)
def test_clips_one_after_the_other_are_one(run: str) -> None:
    steps, ends = RUNS[run]
    names = ["x", *(f"h{k}" for k in range(len(steps) - 1)), "y"]
    nodes = [node(op, [names[k], *more], [names[k + 1]]) for k, (op, more) in enumerate(steps)]
    given = {"zero": np.float32(0), "one": np.float32(1), "six": np.float32(6)}
    rng = rng_of(16)
    compiled = agree(model_of(nodes, {"x": SHAPE}, given), [2 * sample(rng, *SHAPE)], ulps=0)
    bill = bill_of(compiled.plan)
    assert bill.rounds <= 3
    assert ops_of(compiled.plan).count("select") <= 1
    given = {"a": np.float32(ends[0]), "b": np.float32(ends[1])}
    alone = model_of([node("Clip", ["x", "a", "b"])], {"x": SHAPE}, given)
    assert bill == bill_of(compile_model(alone, input_range=(-8.0, 8.0), ring=64).plan)


@pytest.mark.parametrize("op", ["Less", "LessOrEqual", "Greater", "GreaterOrEqual"])
@pytest.mark.parametrize("compared", [["x", "one"], ["one", "x"]])
@pytest.mark.parametrize("branches", [["x", "one"], ["one", "x"]])
def test_a_choice_between_a_value_and_what_it_is_compared_with_is_a_clip(
    op: str, compared: list[str], branches: list[str]
) -> None:
    nodes = [node(op, compared, ["c"]), node("Where", ["c", *branches], ["h"])]
    nodes.append(node("Clip", ["h", "low", "high"]))
    given = {"one": np.float32(1), "low": np.float32(-2), "high": np.float32(3)}
    compiled = agree(model_of(nodes, {"x": SHAPE}, given), [sample(rng_of(18), *SHAPE)], ulps=0)
    assert bill_of(compiled.plan).rounds == 3
    assert ops_of(compiled.plan).count("select") == 1


def test_other_choices_stay() -> None:
    nodes = [node("Less", ["x", "one"], ["c"]), node("Where", ["c", "six", "x"])]
    given = {"one": np.float32(1), "six": np.float32(6)}
    agree(model_of(nodes, {"x": SHAPE}, given), [sample(rng_of(19), *SHAPE)], ulps=0)


def test_a_choice_between_words_is_refused_and_not_read_as_numbers() -> None:
    nodes = [node("Less", ["x", "one"], ["c"]), node("Where", ["c", "young", "old"])]
    words = {k: np.array([k], object) for k in ("young", "old")}
    model = model_of(nodes, {"x": SHAPE}, {"one": np.float32(1)} | words)
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.STRING
    with pytest.raises(ModelError):
        compile_model(model, input_range=(-8.0, 8.0))


def test_a_clip_whose_operand_others_read_stays() -> None:
    nodes = [node("Relu", ["x"], ["h"]), node("Min", ["h", "six"], ["m"]), node("Sub", ["h", "m"])]
    model = model_of(nodes, {"x": SHAPE}, {"six": np.float32(6)})
    agree(model, [2 * sample(rng_of(17), *SHAPE)], ulps=0)


def test_clip_after_relu_compares_with_the_upper_end_only() -> None:
    rng = rng_of(11)
    model = model_of(
        [node("Relu", ["x"], ["h"]), node("Clip", ["h", "a", "b"])],
        {"x": SHAPE},
        {"a": np.float32(0), "b": np.float32(6)},
    )
    compiled = agree(model, [2 * sample(rng, *SHAPE)], ulps=0, rng=rng)
    assert ops_of(compiled.plan).count("sign") == 2


def test_a_clip_that_never_clips_costs_nothing() -> None:
    model = model_of(
        [node("Clip", ["x", "a", "b"])], {"x": SHAPE}, {"a": np.float32(-9), "b": np.float32(9)}
    )
    assert ops_of(compile_model(model, input_range=(-8, 8)).plan) == []


@pytest.mark.parametrize("to", [onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT])
def test_casts_between_floats_are_free(to: int) -> None:
    rng = rng_of(12)
    model = model_of([node("Cast", ["x"], to=to)], {"x": SHAPE})
    model.graph.output[0].type.tensor_type.elem_type = to
    assert ops_of(agree(model, [sample(rng, *SHAPE)], ulps=0, rng=rng).plan) == []


@pytest.mark.parametrize("kind", ["uint8", "int32", "bool"])
def test_whole_numbers_cast_to_float_need_no_fraction_bits(kind: str) -> None:
    rng = rng_of(13)
    x = rng.integers(0, 2, SHAPE).astype(kind)
    model = model_of(
        [node("Cast", ["x"], ["h"], to=1), node("Mul", ["h", "c"])],
        {"x": SHAPE},
        {"c": np.float32(0.3)},
        kind=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind)),
    )
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    compiled = agree(model, [x], ulps=1)
    assert compiled.plan.value(compiled.plan.inputs[0].id).frac_bits == 0


@pytest.mark.parametrize(
    ("op", "more", "attrs"),
    [
        ("Add", [0.3], {}),
        ("Max", [0.3], {}),
        ("Concat", [np.full(SHAPE, 0.3)], {"axis": 1}),
        ("Clip", [0.3, 1.7], {}),
        ("Pad", [np.array([0, 0, 0, 0, 0, 1]), 0.3], {}),
        ("LeakyRelu", [], {"alpha": 0.3}),
        ("PRelu", [0.3], {}),
        ("ReduceMean", [np.array([1])], {}),
        ("Mul", [0.3], {}),
        ("BatchNormalization", [np.full(3, v) for v in (0.5, 0.3, 0.3, 2.0)], {}),
    ],
)
def test_whole_numbers_become_fractions_where_they_must(op: str, more: Any, attrs: Any) -> None:
    rng = rng_of(14)
    x = rng.integers(-3, 4, SHAPE).astype(np.int8)
    constants = {f"c{i}": np.asarray(v, np.float32) for i, v in enumerate(more)}
    integers = {k: v.astype(np.int64) for k, v in constants.items() if op == "ReduceMean"}
    if op == "Pad":
        integers = {"c0": constants["c0"].astype(np.int64)}
    nodes = [node("Cast", ["x"], ["h"], to=1), node(op, ["h", *constants], **attrs)]
    model = model_of(nodes, {"x": SHAPE}, constants | integers, kind=onnx.TensorProto.INT8)
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    agree(model, [x], ulps=4, rng=rng)


@pytest.mark.parametrize("constant", [True, False])
def test_a_division_by_numbers_of_either_sign_errs_by_little(constant: bool) -> None:
    rng = rng_of(15)
    x, z = sample(rng, *SHAPE), sample(rng, *SHAPE)
    z += np.copysign(np.float32(0.25), z)
    inputs: dict[str, Any] = {"x": SHAPE} | ({} if constant else {"z": SHAPE})
    model = model_of([node("Div", ["x", "z"])], inputs, {"z": z} if constant else {})
    agree(model, [x] if constant else [x, z], ulps=40, rng=rng)


def test_the_extremes_of_the_declared_range_do_not_wrap() -> None:
    edges = np.array([[-8.0, 8.0, 0.0, -(2.0**-16)]], np.float32)
    model = model_of(
        [node("Abs", ["x"], ["a"]), node("Max", ["x", "c"], ["b"]), node("Add", ["a", "b"])],
        {"x": (1, 4)},
        {"c": np.float32(-8)},
    )
    agree(model, [edges], ulps=0)
