"""The expected error of outputs, held against the real protocol's on networks of several kinds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import pytest

from mpcserve.compiler import compile_model
from mpcserve.compiler.calibrate import ranges_of
from mpcserve.compiler.check import import_model
from mpcserve.compiler.narrow import TOLERANCE
from mpcserve.compiler.noise import noise_of
from mpcserve.compiler.passes import rewritten
from mpcserve.compiler.planning import FAIR, Made, Precision, Task, encoded_weights, planned
from mpcserve.compiler.registry import registry
from mpcserve.plan import bill_of
from mpcserve.protocol import Together
from tests.onnx_cases import Array, model_of, node, plain, rng_of

FACTOR = 2.0
"""Of the standard deviation of errors: either way, a bit."""

SAMPLES, TIMES = 16, 2
"""Inputs, and how often the protocol rounds each at random."""


def dense(seed: int, layers: int, gain: float, limits: Callable[[int], str]) -> onnx.ModelProto:
    """Products that turn a vector and stretch it by `gain`; behind each a Relu or a Clip."""
    rng, x, nodes = rng_of(seed), "x", []
    constants: dict[str, Any] = {"low": np.float32(-1), "high": np.float32(1)}
    for k in range(layers):
        turned, _ = np.linalg.qr(rng.standard_normal((16, 16)))
        constants[f"w{k}"] = (gain * turned).astype(np.float32)
        ends = ["low", "high"] if limits(k) == "Clip" else []
        nodes.append(node("MatMul", [x, f"w{k}"], [f"h{k}"]))
        nodes.append(node(limits(k), [f"h{k}", *ends], [f"c{k}"]))
        x = f"c{k}"
    return model_of(nodes, {"x": [1, 16]}, constants, outputs=(x,))


def clips(layers: int = 4, seed: int = 6) -> onnx.ModelProto:
    """Each pair of layers magnifies what tells inputs apart fourfold and takes away the rest."""
    return dense(seed, layers, 4.0, lambda k: "Clip")


def relus() -> onnx.ModelProto:
    return dense(6, 6, 1.5, lambda k: "Relu")


def relus_and_clips() -> onnx.ModelProto:
    return dense(7, 6, 1.5, lambda k: ("Relu", "Clip")[k % 2])


class Convolutions:
    """Convolutions on 8 channels of 8×8, one after the other."""

    def __init__(self, seed: int) -> None:
        self.rng = rng_of(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Any] = {"none": np.float32(0), "six": np.float32(6)}

    def conv(self, x: str, size: int = 3, groups: int = 1) -> str:
        k = len(self.nodes)
        shape = (8, 8 // groups, size, size)
        spread = (2 / np.prod(shape[1:])) ** 0.5
        self.constants[f"w{k}"] = (spread * self.rng.standard_normal(shape)).astype(np.float32)
        pads = [size // 2] * 4
        return self.add("Conv", x, f"w{k}", pads=pads, group=groups)

    def add(self, op: str, *inputs: str, **attrs: Any) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(node(op, inputs, [name], **attrs))
        return name

    def model(self, last: str) -> onnx.ModelProto:
        return model_of(self.nodes, {"x": [1, 8, 8, 8]}, self.constants, outputs=(last,))


def residual() -> onnx.ModelProto:
    made, x = Convolutions(3), "x"
    for _ in range(4):
        part = made.conv(made.add("Relu", made.conv(x)))
        x = made.add("Relu", made.add("Add", x, part))
    return made.model(x)


def depthwise() -> onnx.ModelProto:
    made, x = Convolutions(4), "x"
    for _ in range(3):
        part = made.add("Clip", made.conv(x, 1), "none", "six")
        part = made.add("Clip", made.conv(part, 3, groups=8), "none", "six")
        x = made.add("Add", x, made.conv(part, 1))
    return made.model(x)


def pooled() -> onnx.ModelProto:
    made = Convolutions(5)
    window = {"kernel_shape": [2, 2], "strides": [2, 2]}
    x = made.add("MaxPool", made.add("Relu", made.conv("x")), **window)
    x = made.add("AveragePool", made.add("Relu", made.conv(x)), **window)
    return made.model(made.add("GlobalAveragePool", made.add("Relu", made.conv(x))))


def rows_of(model: onnx.ModelProto, seed: int = 9, count: int = SAMPLES) -> Array:
    dims = model.graph.input[0].type.tensor_type.shape.dim
    shape = (count, *(d.dim_value for d in dims[1:]))
    return rng_of(seed).standard_normal(shape).astype(np.float32)


def task_of(model: onnx.ModelProto, rows: Array) -> Task:
    graph = import_model(model, 1, registry()).graph
    assert graph is not None
    graph = rewritten(graph)
    ranges, _ = ranges_of(graph, rows, None, None)
    return Task(graph, ranges, registry(), None, "small", {})


def errors_of(plan: Any, weights: Mapping[str, Array], model: onnx.ModelProto, rows: Array) -> Any:
    """(root mean square of the errors over that of the outputs, the largest error)."""
    parties = Together(plan, weights)
    exact = np.concatenate([plain(model, row[None])[0] for row in rows for _ in range(TIMES)])
    got = np.concatenate([parties.infer([row[None]])[0][0] for row in rows for _ in range(TIMES)])
    error = got.astype(np.float64) - exact
    return float(np.sqrt(np.square(error).mean() / np.square(exact).mean())), np.abs(error).max()


NETWORKS = [clips, relus, relus_and_clips, residual, depthwise, pooled]


@pytest.mark.parametrize("ring", ["auto", 64])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_expected_error_is_within_a_factor_of_two(
    network: Callable[[], onnx.ModelProto], ring: Any
) -> None:
    model = network()
    rows = rows_of(model)
    task = task_of(model, rows)
    made: Made = planned(task, Precision(ring))
    expected = noise_of(made.draft, 1.0, task.felt).variance ** 0.5
    found, _ = errors_of(made.plan, encoded_weights(made.plan, made.draft), model, rows)
    print(f"expected {expected:.2e}, found {found:.2e}")
    assert expected / FACTOR <= found <= expected * FACTOR


@pytest.mark.parametrize("network", [clips, relus, relus_and_clips])
def test_without_trials_it_is_too(network: Callable[[], onnx.ModelProto]) -> None:
    """Where no error is shared by many positions, shares of active elements tell enough."""
    model = network()
    rows = rows_of(model)
    made = planned(task_of(model, rows), Precision(64))
    expected = noise_of(made.draft, 1.0).variance ** 0.5
    found, _ = errors_of(made.plan, encoded_weights(made.plan, made.draft), model, rows)
    print(f"expected {expected:.2e}, found {found:.2e}")
    assert expected / FACTOR <= found <= expected * FACTOR


# Where the first sample saturates, it hides how far errors are felt on the others.
@pytest.mark.parametrize(("seed", "drawn"), [(6, 13), (7, 13), (7, 14)])
def test_a_network_in_which_errors_grow_errs_no_more_than_others(seed: int, drawn: int) -> None:
    model = clips(6, seed)
    rows = rows_of(model, drawn)
    compiled = compile_model(model, calibrate=rows)
    found, largest = errors_of(compiled.plan, compiled.weights, model, rows)
    print(f"found {found:.2e}, at most {largest:.2e}")
    assert found < 2 * TOLERANCE


@pytest.mark.parametrize(("seed", "drawn"), [(6, 9), (7, 10), (7, 14)])
def test_a_network_in_which_errors_grow_more_gets_more_fraction_bits(seed: int, drawn: int) -> None:
    model = clips(12, seed)
    rows = rows_of(model, drawn)
    plan = compile_model(model, calibrate=rows).plan
    assert plan.value(plan.outputs[0].id).frac_bits > 16
    short = compile_model(model, calibrate=rows, ring=64).plan
    assert short.value(short.outputs[0].id).frac_bits == 16


def attention(layers: int) -> onnx.ModelProto:
    """Blocks of attention whose scores are not divided by √64: softmax magnifies their errors."""
    rng, x, nodes = rng_of(1), "x", []
    constants: dict[str, Any] = {"s": np.ones(64, np.float32)}
    for k in range(layers):
        nodes.append(node("RMSNormalization", [x, "s"], [f"n{k}"]))
        for part in "qkv":
            nodes.append(node("MatMul", [f"n{k}", f"w{part}{k}"], [f"{part}{k}"]))
        for part in "qkvo":
            weights = rng.standard_normal((64, 64)) / 8
            constants[f"w{part}{k}"] = weights.astype(np.float32)
        nodes += [
            node("Transpose", [f"k{k}"], [f"t{k}"], perm=[0, 2, 1]),
            node("MatMul", [f"q{k}", f"t{k}"], [f"s{k}"]),
            node("Softmax", [f"s{k}"], [f"p{k}"], axis=-1),
            node("MatMul", [f"p{k}", f"v{k}"], [f"a{k}"]),
            node("MatMul", [f"a{k}", f"wo{k}"], [f"o{k}"]),
            node("Add", [x, f"o{k}"], [f"x{k + 1}"]),
        ]
        x = f"x{k + 1}"
    nodes.append(node("RMSNormalization", [x, "s"]))
    return model_of(nodes, {"x": [1, 16, 64]}, constants)


def test_weights_whose_errors_are_magnified_get_more_bits() -> None:
    model = attention(6)
    rows = rows_of(model, 2)
    compiled = compile_model(model, calibrate=rows)
    same = compile_model(model, calibrate=rows, frac_bits=16)
    found, _ = errors_of(compiled.plan, compiled.weights, model, rows[:8])
    without, _ = errors_of(same.plan, same.weights, model, rows[:8])
    print(f"found {found:.2e}, with 16 bits {without:.2e}")
    assert found < 1.5 * FAIR < without
    assert bill_of(compiled.plan).online_bytes < 1.05 * bill_of(same.plan).online_bytes


def test_others_keep_theirs() -> None:
    model = attention(1)
    rows = rows_of(model, 2)
    plans = [compile_model(model, calibrate=rows, frac_bits=f).plan for f in (None, 16)]
    assert plans[0].instructions == plans[1].instructions
