"""What a user is told: of problems that are alike, of ranges that 64 bits hold only just."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mpcserve.cli.results import unwritten
from mpcserve.compiler import compile_model
from mpcserve.compiler.check import check_model
from mpcserve.compiler.problems import FEW, Problem, grouped
from mpcserve.errors import InputError, ModelError
from mpcserve.protocol import Together
from tests.onnx_cases import model_of, node, plain, rng_of

F32 = np.float32


def test_problems_that_differ_in_numbers_alone_share_a_line() -> None:
    alike = [Problem(f"scan/{k}/mul", "Mul", f"{k % 3} bits short", "calibrate") for k in range(9)]
    other = Problem("relu", "Relu", "is odd")
    assert grouped([*alike, other]) == [f"{alike[0]} (8 more like it)", str(other)]
    assert grouped(alike[:FEW]) == [str(p) for p in alike[:FEW]]


def distances(scale: float) -> Any:
    """exp(−½ Σ (x / scale − p)²), as a Gaussian process of a tiny length scale has it."""
    nodes = [
        node("Div", ["x", "scale"], ["z"]),
        node("Sub", ["z", "points"], ["gap"]),
        node("ReduceSumSquare", ["gap", "last"], ["square"], keepdims=1),
        node("Mul", ["square", "half"], ["low"]),
        node("Exp", ["low"]),
    ]
    constants = {"points": np.linspace(-1, 1, 10), "scale": F32(scale), "half": F32(-0.5)}
    return model_of(nodes, {"x": ("N", 10)}, constants | {"last": np.array([1])})


def test_operands_give_up_fraction_bits_where_64_bits_would_not_do() -> None:
    model = distances(2e-5)
    rng = rng_of(1)
    calibration = rng.uniform(-0.2, 0.2, (40, 10)).astype(F32)
    with pytest.raises(ModelError, match="does not fit 64 bits"):
        compile_model(model, calibrate=calibration, frac_bits=16)
    made = compile_model(model, calibrate=calibration, batch=3)
    assert any("give up fraction bits" in note for note in made.plan.notes)
    near = 2e-5 * (np.linspace(-1, 1, 10) + rng.uniform(-0.3, 0.3, (1, 10)))
    x = np.concatenate([calibration[:2], near]).astype(F32)
    (got,), _ = Together(made.plan, made.weights).infer([x])
    assert got.shape == (3, 1)
    assert np.abs(got[:2] - plain(model, x)[0][:2]).max() < 1e-4


def test_a_range_that_no_fewer_fraction_bits_hold_is_refused_as_before() -> None:
    nodes = [node("Mul", [f"h{k}", f"h{k}"], [f"h{k + 1}"]) for k in range(6)]
    model = model_of([*nodes, node("Relu", ["h6"])], {"h0": (1, 3)})
    with pytest.raises(ModelError, match=r"node 'Mul:h3' .* does not fit 64 bits"):
        compile_model(model)


def test_an_operator_that_nobody_can_run_is_refused_before_samples_are_run() -> None:
    model = model_of([node("Relu", ["x"], ["a"])], {"x": (1, 3)})
    model.graph.node.append(
        onnx.helper.make_node("Solve", ["a"], ["y"], name="solve", domain="com.microsoft")
    )
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    with pytest.raises(ModelError, match=r"node 'solve' \(Solve\): operator of domain"):
        compile_model(model, calibrate=np.ones((4, 3), F32))


def test_a_bit_and_a_sample_are_told_in_the_singular() -> None:
    model = model_of([node("Relu", ["x"])], {"x": ("N", 3)})
    plan = compile_model(model, calibrate=np.ones((1, 3), F32), margin_bits=1).plan
    assert "calibrated on 1 sample with 1 margin bit" in plan.notes


def test_an_axis_without_elements_is_no_axis_without_a_length() -> None:
    model = model_of([node("Relu", ["x"])], {"x": (1, 0)})
    with pytest.raises(ModelError, match="axis 1 has length 0: it holds no elements"):
        compile_model(model)


@pytest.mark.parametrize(
    ("op", "inputs", "reason"),
    [
        ("StringNormalizer", ["x"], "text is not computed on"),
        ("NonMaxSuppression", ["x", "x"], "the shape of its result would depend on secret data"),
    ],
)
def test_what_is_refused_anyway_is_not_refused_for_its_shapes(
    op: str, inputs: list[str], reason: str
) -> None:
    (report,) = check_model(model_of([node(op, inputs)], {"x": (2, 3)}))
    assert report.reason.startswith(reason)


def test_negative_ids_are_not_told_to_widen_a_range_that_nobody_gave() -> None:
    model = model_of([node("Gather", ["t", "x"])], {"x": ("N", 3)}, {"t": np.ones((10, 2))},
                     kind=onnx.TensorProto.INT64)  # fmt: skip
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    with pytest.raises(InputError, match="whole numbers from 0 to 9, as ids or a mask") as caught:
        compile_model(model, calibrate=np.array([[0, -1, 4]]))
    assert "widen" not in caught.value.hint and "add the length" in caught.value.hint


def test_a_parameter_that_is_secret_is_named_as_an_input() -> None:
    nodes = [node("Cast", ["x"], ["i"], to=onnx.TensorProto.INT64),
             node("ScatterND", ["x", "i", "x"])]  # fmt: skip
    with pytest.raises(ModelError, match="its input 'indices' is computed from a secret value"):
        compile_model(model_of(nodes, {"x": (2, 2)}))


@pytest.mark.parametrize("op", ["Log", "Sqrt"])
def test_samples_of_which_a_layer_makes_nan_are_told(op: str) -> None:
    model = model_of([node(op, ["x"], ["h"]), node("Relu", ["h"])], {"x": ("N", 3)})
    sound = rng_of(2).uniform(0.5, 3, (20, 3)).astype(F32)
    told = f"layer '{op}:h' ({op}) is NaN on some samples"
    assert not any(
        note.startswith(told) for note in compile_model(model, calibrate=sound).plan.notes
    )
    sound[3, 1] = -2.0
    assert any(note.startswith(told) for note in compile_model(model, calibrate=sound).plan.notes)


@pytest.mark.parametrize(
    ("number", "way"),
    [
        (errno.ENOENT, "make the directory a/b"),
        (errno.ENOTDIR, "a/b is no directory"),
        (errno.ENOSPC, "make room on the disk"),
        (errno.EIO, "check the directory"),
    ],
)
def test_a_file_that_cannot_be_written_says_what_to_do(number: int, way: str) -> None:
    told = unwritten(Path("a/b/c.plan"), OSError(number, "why"), "-o")
    assert told.message == "a/b/c.plan: cannot write: why"
    assert told.hint == f"{way}, or give another -o"
