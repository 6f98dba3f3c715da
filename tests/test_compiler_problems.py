"""What a user is told: of problems that are alike, of ranges that 64 bits hold only just."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from mpcserve.compiler import compile_model
from mpcserve.compiler.problems import FEW, Problem, grouped
from mpcserve.errors import ModelError
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
