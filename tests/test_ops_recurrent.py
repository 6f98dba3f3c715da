"""LSTM, GRU and RNN as ONNX models, through the real protocol, against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

from mpcserve.compiler import compile_model
from mpcserve.plan import bill_of
from mpcserve.protocol import Dealer, Together
from tests.onnx_cases import Array, model_of, node, on_grid, plain, rng_of

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
TIME, BATCH, INPUTS, HIDDEN = 4, 3, 5, 6


def layer(op: str, *, weights: float = 0.5, optional: bool = False, **attrs: Any) -> Any:
    """A model from x to (y, h[, c]); `optional`: lengths, initial states and peepholes too."""
    rng = rng_of(len(op))
    directions = 2 if attrs.get("direction") == "bidirectional" else 1
    size = GATES[op] * HIDDEN
    state = (directions, BATCH, HIDDEN)
    if attrs.get("layout"):
        state = (BATCH, directions, HIDDEN)
    constants: dict[str, Array] = {
        "w": rng.uniform(-weights, weights, (directions, size, INPUTS)),
        "r": rng.uniform(-weights, weights, (directions, size, HIDDEN)),
        "b": rng.uniform(-weights, weights, (directions, 2 * size)),
    }
    if optional:
        constants |= {"n": np.array([4, 2, 3], np.int32), "h0": rng.uniform(-1, 1, state)}
    if optional and op == "LSTM":
        constants |= {"c0": rng.uniform(-1, 1, state)}
        constants |= {"p": rng.uniform(-1, 1, (directions, 3 * HIDDEN))}
    outputs = ("y", "h", "c")[: 3 if op == "LSTM" else 2]
    shape = (BATCH, TIME, INPUTS) if attrs.get("layout") else (TIME, BATCH, INPUTS)
    one = node(op, ["x", *constants], outputs, hidden_size=HIDDEN, **attrs)
    return model_of([one], {"x": shape}, constants, outputs)


def agrees(model: Any, expected: Any = plain, reach: float = 2.0, error: float = 5e-4) -> Any:
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    x = rng_of(1).uniform(-reach, reach, shape).astype(np.float32)
    made = compile_model(model, input_range=(-reach, reach))
    grid = on_grid(made.plan, 0, x)
    outputs, bill = Together(made.plan, made.weights).infer([grid])
    assert bill == bill_of(made.plan)
    for got, want in zip(outputs, expected(model, grid), strict=True):
        assert got.shape == want.shape
        assert np.abs(got - want).max() <= error
    return bill


@pytest.mark.parametrize("direction", ["reverse", "bidirectional"])
@pytest.mark.parametrize("op", GATES)
def test_a_layer_with_all_its_inputs_agrees(op: str, direction: str) -> None:
    agrees(layer(op, optional=True, direction=direction))


@pytest.mark.parametrize("op", GATES)
def test_directions_share_their_rounds(op: str) -> None:
    one, two = (agrees(layer(op, direction=d)) for d in ("forward", "bidirectional"))
    assert two.rounds == one.rounds
    assert one.rounds <= {"LSTM": 7, "GRU": 8, "RNN": 4}[op] * TIME


def stacked(op: str, layers: int, turned: bool = False, **attrs: Any) -> Any:
    """Layers on one another, from x to the last one's states; the axis of directions squeezed, or
    `turned` to the end and reshaped away as torch's newer exporter does."""
    rng, size = rng_of(layers), GATES[op] * HIDDEN
    constants: dict[str, Array] = {"one": np.array([1]), "flat": np.array([0, 0, -1])}
    nodes, x = [], "x"
    for k in range(layers):
        width = HIDDEN if k else INPUTS
        constants |= {
            f"w{k}": rng.uniform(-0.3, 0.3, (1, size, width)),
            f"r{k}": rng.uniform(-0.3, 0.3, (1, size, HIDDEN)),
            f"b{k}": rng.uniform(-0.3, 0.3, (1, 2 * size)),
        }
        given = [x, f"w{k}", f"r{k}", f"b{k}"]
        nodes.append(node(op, given, [f"y{k}", f"h{k}"], hidden_size=HIDDEN, **attrs))
        x = f"x{k + 1}"
        if turned:
            nodes.append(node("Transpose", [f"y{k}"], [f"t{k}"], perm=[0, 2, 1, 3]))
            nodes.append(node("Reshape", [f"t{k}", "flat"], [x]))
        else:
            nodes.append(node("Squeeze", [f"y{k}", "one"], [x]))
    return model_of(
        nodes[: -2 if turned else -1], {"x": (TIME, BATCH, INPUTS)}, constants, [f"h{layers - 1}"]
    )


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("op", GATES)
def test_layers_on_one_another_advance_together(op: str, turned: bool) -> None:
    attrs = {"linear_before_reset": 1} if op == "GRU" else {}
    one, three = (agrees(stacked(op, count, turned, **attrs)) for count in (1, 3))
    step = -(-one.rounds // TIME)
    assert three.rounds <= one.rounds + 2 * step + 2


@pytest.mark.parametrize("op", GATES)
def test_inputs_far_larger_than_states_are_multiplied_apart(op: str) -> None:
    agrees(layer(op, weights=0.02, optional=True), reach=200.0, error=4e-3)


def test_a_gru_may_reset_behind_its_product() -> None:
    agrees(layer("GRU", optional=True, linear_before_reset=1))
    agrees(layer("GRU", linear_before_reset=1, direction="reverse"))


@pytest.mark.parametrize(
    "attrs",
    [
        {"clip": 0.5},
        {"activations": ["HardSigmoid", "Relu", "Softsign"], "activation_alpha": [0.3]},
        {"activations": ["Sigmoid", "ScaledTanh", "Affine"], "activation_alpha": [0.7, 0.5],
         "activation_beta": [1.5, 0.25]},
        {"input_forget": 1},
    ],
)  # fmt: skip
def test_attributes_of_an_lstm_are_heeded(attrs: Any) -> None:
    agrees(layer("LSTM", optional="input_forget" not in attrs, **attrs))


def test_batches_may_come_first() -> None:
    def reference(model: Any, x: Array) -> Any:
        return ReferenceEvaluator(model).run(None, {"x": x})

    # onnxruntime has no such layout; the reference knows no lengths
    agrees(layer("GRU", layout=1), reference)


def test_a_loop_lays_its_weights_out_once() -> None:
    made = compile_model(layer("RNN"), input_range=(-1.0, 1.0))
    dealer = Dealer(made.plan, bytes(32), bytes(range(32)))
    fixed = [id(operand) for _, operand in dealer._fixed.values()]
    assert len(fixed) == TIME and len(set(fixed)) == 2


def test_a_mean_and_deviation_over_the_usual_axes_needs_no_attribute() -> None:
    model = model_of([node("MeanVarianceNormalization", ["x"])], {"x": (2, 3, 4, 4)})
    agrees(model, error=1e-3)
