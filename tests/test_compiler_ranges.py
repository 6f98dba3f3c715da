"""Bounds: what is proved holds for every instruction; what is sampled or assumed is said so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mpcserve.compiler import compile_model
from mpcserve.compiler import interval as iv
from mpcserve.compiler.interval import Interval, bound_of
from mpcserve.errors import InputError, ModelError
from mpcserve.plan import Plan
from mpcserve.protocol import Together
from tests.onnx_cases import model_of, node, rng_of
from tests.plan_interpreter import Interpreter


def weights(rng: np.random.Generator, *shape: int) -> Any:
    return rng.normal(0, 1 / np.sqrt(np.prod(shape[1:])), shape).astype(np.float32)


def network(seed: int) -> onnx.ModelProto:
    """Every kind of instruction between input and output."""
    rng = np.random.default_rng(seed)
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c"], pads=[1, 1, 1, 1]),
        node("LeakyRelu", ["c"], ["l"], alpha=0.1),
        node("MaxPool", ["l"], ["m"], kernel_shape=[2, 2], strides=[2, 2]),
        node("PRelu", ["m", "slope"], ["p"]),
        node("AveragePool", ["p"], ["a"], kernel_shape=[3, 3], strides=[1, 1]),
        node("Mul", ["a", "a"], ["sq"]),
        node("Abs", ["a"], ["ab"]),
        node("Max", ["sq", "ab"], ["mx"]),
        node("Clip", ["mx", "low", "high"], ["cl"]),
        node("Flatten", ["cl"], ["f"]),
        node("Gemm", ["f", "w2", "b2"], ["g"]),
        node("Relu", ["g"], ["r"]),
        node("MatMul", ["r", "w3"], ["y"]),
    ]
    constants = {
        "w1": weights(rng, 3, 2, 3, 3),
        "b1": rng.normal(size=3),
        "slope": rng.uniform(-1, 1, (3, 1, 1)),
        "low": np.float32(0.125),
        "high": np.float32(20),
        "w2": 5 * weights(rng, 12, 6),
        "b2": rng.normal(size=6),
        "w3": weights(rng, 6, 4),
    }
    return model_of(nodes, {"x": (1, 2, 8, 8)}, constants)


def corner(rng: np.random.Generator, kind: str) -> Any:
    """Inputs at the ends of the range stretch the bounds most."""
    shape = (1, 2, 8, 8)
    return {
        "high": np.ones(shape),
        "low": -np.ones(shape),
        "signs": rng.choice([-1.0, 1.0], shape),
        "blocks": np.kron(rng.choice([-1.0, 1.0], (1, 2, 4, 4)), np.ones((1, 1, 2, 2))),
        "inside": rng.uniform(-1, 1, shape),
    }[kind]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["high", "low", "signs", "blocks", "inside"])
def test_no_value_of_any_instruction_exceeds_its_proved_bound(seed: int, kind: str) -> None:
    rng = rng_of(seed)
    compiled = compile_model(network(seed), input_range=(-1, 1))
    # The interpreter asserts the bound of each value and the ring of each accumulator.
    Interpreter(compiled.plan, compiled.weights, rng).run(corner(rng, kind))


def worst_input(w: Any) -> Any:
    return np.sign(w).T.reshape(w.shape[1], 1, -1)


def test_proved_bounds_of_a_linear_layer_are_reached_within_one_bit() -> None:
    rng = rng_of(3)
    w = rng.normal(size=(20, 3)).astype(np.float32)
    compiled = compile_model(
        model_of([node("MatMul", ["x", "w"])], {"x": (1, 20)}, {"w": w}), input_range=(-1, 1)
    )
    peaks = []
    for x in worst_input(w):
        run = Interpreter(compiled.plan, compiled.weights)
        run.run(x)
        peaks.append(run.headroom())
    assert min(peaks) < 1.0


@pytest.mark.parametrize("op", ["add", "sub", "mul", "matmul"])
def test_interval_rules_hold_at_every_corner(op: str) -> None:
    rng = rng_of(4)
    for _ in range(50):
        centres = [rng.normal(size=(3, 3)) * 10.0 ** rng.integers(-3, 4) for _ in range(2)]
        radii = [rng.uniform(0, 2, (3, 3)) * rng.integers(0, 2) for _ in range(2)]
        x, y = (Interval(c - r, c + r) for c, r in zip(centres, radii, strict=True))
        found = iv.matmul(3, x, y) if op == "matmul" else getattr(iv, op)(x, y)
        calculate = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "matmul": np.matmul}
        for _ in range(10):
            a, b = (
                np.where(rng.random((3, 3)) < 0.5, v.low, v.high).astype(np.longdouble)
                for v in (x, y)
            )
            z = calculate[op](a, b)
            assert np.all(found.low <= z) and np.all(z <= found.high)


@pytest.mark.parametrize(
    ("magnitude", "frac_bits", "bound"),
    [(1.0, 0, 1), (0.99, 0, 0), (1.0, 16, 17), (0.5, 16, 16), (8.0, 4, 8), (0.0, 16, 1)],
)
def test_a_bound_is_the_least_power_of_two_above(
    magnitude: float, frac_bits: int, bound: int
) -> None:
    assert bound_of(iv.uniform(-magnitude, 0, 1), frac_bits) == max(bound, 1)


def single(shape: Any = ("N", 3)) -> onnx.ModelProto:
    return model_of(
        [node("MatMul", ["x", "w"], ["h"]), node("Relu", ["h"])],
        {"x": shape},
        {"w": np.full((3, 2), 2.0)},
    )


def known(plan: Plan, op: str) -> set[str]:
    return {i.value.known for i in plan.instructions if i.op == op}


def test_with_neither_range_nor_samples_the_range_is_assumed_and_said_to_be() -> None:
    plan = compile_model(single()).plan
    assert (plan.inputs[0].low, plan.inputs[0].high, plan.inputs[0].known) == (-16, 16, "assumed")
    assert known(plan, "matmul") == {"assumed"} and known(plan, "weight") == {"exact"}
    assert any("assumed" in note for note in plan.notes)


def test_what_samples_show_on_one_side_of_zero_keeps_its_sign() -> None:
    rng = np.random.default_rng(4)
    x = rng.uniform(1.0, 2.0, (40, 3)).astype(np.float32)
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Reciprocal", ["h"])]
    model = model_of(nodes, {"x": ("N", 3)}, {"w": np.array([[2.0], [2.0], [-1.0]], np.float32)})
    plans = [compile_model(model, calibrate=s * x, margin_bits=2).plan for s in (1.0, -1.0)]
    for plan in plans:
        held = next(i for i in plan.instructions if i.op == "matmul")
        # A divisor of either sign would be compared with zero and its inverse chosen by that.
        assert "select" not in {i.op for i in plan.instructions}
        assert held.value.known == "calibrated"


def test_a_declared_range_proves_the_bounds() -> None:
    plan = compile_model(single(), input_range=(-1, 3)).plan
    assert (plan.inputs[0].low, plan.inputs[0].high, plan.inputs[0].known) == (-1, 3, "proved")
    assert known(plan, "matmul") == known(plan, "rectify") == {"proved"}


def test_samples_narrow_the_bounds_with_a_stated_margin() -> None:
    x = np.array([[0.5, 0.5, 0.5], [0.25, 0, 0]], np.float32)
    plans = {
        bits: compile_model(single(), calibrate=x, margin_bits=bits).plan for bits in (0, 1, 3)
    }
    bounds = {
        bits: next(i.value for i in p.instructions if i.op == "matmul") for bits, p in plans.items()
    }
    # Seen: 3.0 at most, so below 4 = 2^2; one bit of margin: 2^3.
    assert [bounds[b].bound - 16 for b in (0, 1)] == [2, 3]
    assert {bounds[b].known for b in (0, 1)} == {"calibrated"}
    assert "calibrated on 2 samples with 1 margin bit" in plans[1].notes
    assert (plans[1].inputs[0].low, plans[1].inputs[0].high) == (0, 1)


def test_samples_and_a_declared_range_keep_the_declared_range() -> None:
    x = np.full((4, 3), 0.5, np.float32)
    plan = compile_model(single(), calibrate=x, input_range=(-64, 64)).plan
    assert (plan.inputs[0].low, plan.inputs[0].known) == (-64, "proved")
    assert known(plan, "matmul") == {"calibrated"}


def test_a_proved_bound_that_is_as_narrow_rests_on_no_sample() -> None:
    x = np.full((4, 3), 4.0, np.float32)
    plan = compile_model(single(), calibrate=x, input_range=(-4, 4)).plan
    assert known(plan, "matmul") == {"proved"}


def test_calibrated_values_stay_in_their_bounds_on_the_samples() -> None:
    rng = rng_of(9)
    x = rng.uniform(-1, 1, (5, 2, 8, 8)).astype(np.float32)
    compiled = compile_model(network(1), calibrate=x, margin_bits=1)
    run = Interpreter(compiled.plan, compiled.weights, rng)
    for row in x:
        run.run(row[None])
    assert run.headroom() > 0


def test_samples_of_nothing_but_zeros_leave_room_for_rounding() -> None:
    nodes = [node("Sub", ["x", "x"], ["h"]), node("LeakyRelu", ["h"], alpha=0.3)]
    compiled = compile_model(
        model_of(nodes, {"x": ("N", 3)}), calibrate=np.zeros((1, 3), np.float32), margin_bits=0
    )
    for seed in range(20):
        Interpreter(compiled.plan, compiled.weights, rng_of(seed)).run(np.zeros((1, 3)))


def test_samples_are_taken_in_batches_of_the_plan() -> None:
    x = np.array([[0.5] * 3, [0.25] * 3, [3.0] * 3], np.float32)
    plan = compile_model(single(), calibrate=x, batch=2).plan
    assert plan.inputs[0].high == 8 and "calibrated on 3 samples with 2 margin bits" in plan.notes


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_samples_may_be_a_file(suffix: str, tmp_path: Path) -> None:
    x, path = np.full((2, 3), 0.5, np.float32), tmp_path / f"samples.{suffix}"
    np.save(path, x) if suffix == "npy" else np.savez(path, x=x)
    assert compile_model(single(), calibrate=path).plan.inputs[0].known == "calibrated"


def test_several_inputs_take_samples_by_name() -> None:
    model = model_of([node("Add", ["x", "z"])], {"x": ("N", 3), "z": ("N", 3)})
    one = np.full((2, 3), 0.5, np.float32)
    plan = compile_model(model, calibrate={"x": one, "z": 4 * one}).plan
    assert [i.high for i in plan.inputs] == [1, 4]
    with pytest.raises(InputError, match="no samples for input 'z'"):
        compile_model(model, calibrate={"x": one})
    with pytest.raises(InputError, match="one array of samples for 2 inputs"):
        compile_model(model, calibrate=one)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.ones((2, 4), np.float32), r"have shape \[2, 4\], expected N x \[3\]"),
        (np.ones((0, 3), np.float32), "expected N x"),
        (np.full((2, 3), np.nan, np.float32), "not all finite"),
        (np.full((2, 3), 9, np.float32), "reach from 9 to 9, outside the declared -1 to 1"),
        ("nowhere.npy", r"nowhere.npy: not a readable"),
    ],
)
def test_samples_that_do_not_fit_are_refused(samples: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        compile_model(single(), calibrate=samples, input_range=(-1, 1))


@pytest.mark.parametrize("declared", [(1, 1), (2, 1), (0, np.inf), (np.nan, 1)])
def test_a_range_that_is_none_is_refused(declared: Any) -> None:
    with pytest.raises(InputError, match="is not a range"):
        compile_model(single(), input_range=declared)


def test_small_integer_inputs_know_their_range() -> None:
    model = model_of(
        [node("Cast", ["x"], ["h"], to=1), node("Relu", ["h"])],
        {"x": (1, 3)},
        kind=onnx.TensorProto.UINT8,
    )
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    spec = compile_model(model).plan.inputs[0]
    assert (spec.dtype, spec.low, spec.high, spec.known) == ("uint8", 0, 255, "proved")


def test_what_does_not_fit_says_which_node_and_how_many_bits_are_missing() -> None:
    nodes = [node("Mul", ["x", "x"], ["h1"])]
    nodes += [node("Mul", [f"h{i}", f"h{i}"], [f"h{i + 1}"]) for i in range(1, 4)]
    model = model_of([*nodes, node("Relu", ["h4"])], {"x": (1, 3)})
    with pytest.raises(ModelError) as caught:
        compile_model(model)
    # ±16^8 = ±2^32, and one for the rounding: 33 + 16 + 16 bits, 62 fit.
    assert "node 'Mul:h3'" in caught.value.message
    assert "±2^33 does not fit 64 bits: 3 bits short" in caught.value.message
    assert "--calibrate" in caught.value.hint
    small = np.full((1, 3), 0.5, np.float32)
    assert compile_model(model, calibrate=small).plan
    assert compile_model(model, input_range=(-2, 2)).plan
    assert compile_model(model, frac_bits=4, input_range=(-8, 8)).plan


@pytest.mark.parametrize("top", [10.0, 14.0, 20.0])
def test_samples_of_an_exponential_bound_it(top: float) -> None:
    """A bit of margin doubles the exponent, but what is made of it only grows twofold."""
    x = rng_of(8).uniform(-10, top, (16, 8)).astype(np.float32)
    x[0, 0] = top
    model = model_of([node("Exp", ["x"])], {"x": (1, 8)})
    made = compile_model(model, calibrate=x)
    (spec,) = made.plan.outputs
    assert made.plan.value(spec.id).known == "calibrated"
    parties = Together(made.plan, made.weights)
    # What exceeds the samples by less than the margin of the result, too.
    for row in (*x, np.full(8, top + 0.6, np.float32)):
        (got,), _ = parties.infer([row[None]])
        exact = np.exp(row.astype(np.float64))
        assert np.all(np.abs(got[0] - exact) <= 1e-3 * exact + 2e-4)


def test_an_exponential_that_does_not_fit_says_how_many_bits_are_missing() -> None:
    model = model_of([node("Exp", ["x"])], {"x": (1, 8)})
    with pytest.raises(ModelError) as caught:
        compile_model(model, input_range=(0, 30))
    # e^30 < 2^44, e^22 < 2^32.
    assert "node 'Exp:y' (Exp)" in caught.value.message
    assert "up to 30 does not fit 64 bits: 12 bits short" in caught.value.message
    assert "--calibrate" in caught.value.hint
    far = np.full((16, 8), 30.0, np.float32)
    with pytest.raises(ModelError, match=r"up to 30\.6931 does not fit 64 bits: 13 bits") as caught:
        compile_model(model, calibrate=far)
    assert "samples reach that far" in caught.value.hint


def test_an_input_range_beyond_all_widths_is_refused() -> None:
    with pytest.raises(ModelError, match="does not fit 64 bits"):
        compile_model(single(), input_range=(-1e30, 1e30))


@pytest.mark.parametrize("seed", range(20))
def test_a_reshaped_interval_is_that_of_every_element(seed: int) -> None:
    rng = rng_of(seed)
    factors = rng.integers(1, 4, 6).tolist()
    shapes = []
    for _ in range(2):
        cuts = sorted(rng.integers(0, 7, 3).tolist())
        parts = (factors[a:b] for a, b in zip([0, *cuts], [*cuts, 6], strict=True))
        shapes.append(tuple(int(np.prod(p, dtype=int)) for p in parts))
    old, new = shapes
    low = rng.uniform(-2, 0, [d if rng.integers(2) else 1 for d in old])
    found = iv.reshape(iv.Interval(low, low + 1), old, new)
    expected = np.broadcast_to(low, old).reshape(new)
    assert np.array_equal(np.broadcast_to(found.low, new), expected)
    assert found.low.size <= expected.size


def test_a_reshape_of_space_leaves_channels_compact() -> None:
    low = np.zeros((1, 64, 1, 1))
    found = iv.reshape(iv.Interval(low, low), (1, 64, 112, 112), (1, 8, 8, 112 * 112))
    assert found.low.shape == (1, 8, 8, 1)


def test_what_a_nan_of_the_samples_chose_is_no_range() -> None:
    """Below zero √x · [x > 0] is NaN in floating point, so that labels are 0; here they are 2."""
    nodes = [
        node("Sqrt", ["x"], ["r"]),
        node("Greater", ["x", "zero"], ["b"]),
        node("Cast", ["b"], ["m"], to=int(onnx.TensorProto.FLOAT)),
        node("Mul", ["r", "m"], ["p"]),
        node("ArgMax", ["p"], ["i"], axis=1, keepdims=0),
        node("Cast", ["i"], to=int(onnx.TensorProto.FLOAT)),
    ]
    model = model_of(nodes, {"x": [1, 3]}, {"zero": np.float32(0)})
    x = np.array([[-0.5, 0.25, 2.0], [-1.0, 0.5, 3.0]], np.float32)
    compiled = compile_model(model, calibrate=x)
    (label,), _ = Together(compiled.plan, compiled.weights).infer([x[:1]])
    assert label == [2]
