"""Random networks: any operators in any order give onnxruntime's answer within proved bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from mpcserve.compiler import compile_model
from mpcserve.plan import bill_of
from mpcserve.protocol.together import simulate
from tests.onnx_cases import agree, model_of, node, plain, rng_of

pytestmark = pytest.mark.slow


class Net:
    """Grows a network node by node; `shapes` holds what may be read."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {"x": (2, 3, 6, 6)}

    def constant(self, value: Any) -> str:
        name = f"k{len(self.constants)}"
        self.constants[name] = value
        return name

    def small(self, *shape: int) -> str:
        """Multiples of 2^-6 whose norm along the last axes is about one."""
        scale = 64 / np.sqrt(np.prod(shape[1:], initial=1.0))
        return self.constant(np.rint(self.rng.normal(size=shape) * scale) / 64)

    def add(self, op: str, inputs: list[str], shape: tuple[int, ...], **attrs: Any) -> str:
        name = f"h{len(self.nodes)}"
        self.nodes.append(node(op, inputs, [name], **attrs))
        self.shapes[name] = shape
        return name

    def grow(self, x: str) -> str:
        kinds = ["conv", "unary", "affine", "pool", "join", "move", "compare"]
        return str(getattr(self, "_" + str(self.rng.choice(kinds)))(x, self.shapes[x]))

    def _conv(self, x: str, s: tuple[int, ...]) -> str:
        out = int(self.rng.integers(2, 5))
        k = int(self.rng.integers(1, min(s[2], s[3], 3) + 1))
        names = [x, self.small(out, s[1], k, k)]
        if self.rng.random() < 0.5:
            names.append(self.small(out))
        pad = int(self.rng.integers(0, k))
        size = [d + 2 * pad - k + 1 for d in s[2:]]
        return self.add("Conv", names, (s[0], out, *size), pads=[pad] * 4)

    def _unary(self, x: str, s: tuple[int, ...]) -> str:
        op = self.rng.choice(["Relu", "Abs", "Neg", "LeakyRelu", "Identity", "Dropout", "PRelu"])
        if op == "LeakyRelu":
            return self.add("LeakyRelu", [x], s, alpha=float(self.rng.choice([0.01, 0.25, 0.3])))
        return self.add(op, [x, self.small(s[1], 1, 1)] if op == "PRelu" else [x], s)

    def _affine(self, x: str, s: tuple[int, ...]) -> str:
        op = str(self.rng.choice(["Add", "Sub", "Mul", "BatchNormalization"]))
        if op == "BatchNormalization":
            names = [self.small(s[1]), self.small(s[1]), self.small(s[1])]
            variance = self.constant(np.full(s[1], 4.0))
            return self.add(op, [x, *names, variance], s, epsilon=0.0)
        c = self.small(*[(1,), (s[1], 1, 1), (s[3],)][self.rng.integers(3)])
        turned = op == "Sub" and self.rng.random() < 0.5
        return self.add(op, [c, x] if turned else [x, c], s)

    def _pool(self, x: str, s: tuple[int, ...]) -> str:
        op = str(self.rng.choice(["MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean"]))
        if op == "GlobalAveragePool":
            return self.add(op, [x], (*s[:2], 1, 1))
        if op == "ReduceMean":
            return self.add(op, [x, self.constant(np.array([3]))], (*s[:3], 1))
        k = int(self.rng.integers(1, min(s[2], s[3], 3) + 1))
        size = [(d - k) // k + 1 for d in s[2:]]
        return self.add(op, [x], (*s[:2], *size), kernel_shape=[k, k], strides=[k, k])

    def _join(self, x: str, s: tuple[int, ...]) -> str:
        same = [n for n, other in self.shapes.items() if other == s]
        other = str(self.rng.choice(same))
        op = str(self.rng.choice(["Add", "Sub", "Max", "Concat"]))
        if op == "Concat":
            return self.add(op, [x, other], (s[0], 2 * s[1], *s[2:]), axis=1)
        return self.add(op, [x, other], s)

    def _move(self, x: str, s: tuple[int, ...]) -> str:
        op = str(self.rng.choice(["Transpose", "Slice", "Pad", "Reshape"]))
        if op == "Transpose":
            return self.add(op, [x], (s[0], s[1], s[3], s[2]), perm=[0, 1, 3, 2])
        if op == "Slice":
            names = [self.constant(np.array([v])) for v in (0, max(s[2] // 2, 1), 2)]
            return self.add(op, [x, *names], (*s[:2], max(s[2] // 2, 1), s[3]))
        if op == "Pad":
            pads = self.constant(np.array([0, 0, 1, 0, 0, 0, 0, 1]))
            return self.add(op, [x, pads, self.constant(0.5)], (*s[:2], s[2] + 1, s[3] + 1))
        shape = (s[0], s[1], s[3], s[2])
        return self.add(op, [x, self.constant(np.array([0, s[1], s[3], -1]))], shape)

    def _compare(self, x: str, s: tuple[int, ...]) -> str:
        op = str(self.rng.choice(["Clip", "Max", "Min"]))
        if op == "Clip":
            return self.add(op, [x, self.constant(np.float32(-1)), self.constant(2.0)], s)
        return self.add(op, [x, self.small(s[1], 1, 1)], s)


def grown(rng: np.random.Generator) -> tuple[onnx.ModelProto, Any]:
    """A network with a Gemm at its end, and an input."""
    net, x = Net(rng), "x"
    for _ in range(int(rng.integers(2, 9))):
        x = net.grow(x)
    size = int(np.prod(net.shapes[x][1:]))
    x = net.add("Flatten", [x], (2, size))
    x = net.add("Gemm", [x, net.small(size, 3), net.small(3)], (2, 3))
    print([n.op_type for n in net.nodes])
    model = model_of(net.nodes, {"x": (2, 3, 6, 6)}, net.constants, outputs=[x])
    return model, rng.uniform(-2, 2, (2, 3, 6, 6)).astype(np.float32)


@pytest.mark.parametrize("seed", range(40))
def test_a_random_network_agrees_with_onnxruntime(seed: int) -> None:
    rng = rng_of(seed)
    model, x = grown(rng)
    agree(model, [x], ulps=64, rng=rng, input_range=(-2, 2))


@pytest.mark.parametrize("seed", range(100, 110))
def test_the_protocol_runs_a_random_network_as_billed(seed: int) -> None:
    model, x = grown(rng_of(seed))
    compiled = compile_model(model, calibrate=x, ring=64)
    outputs, bill = simulate(compiled.plan, compiled.weights, [x])
    assert bill == bill_of(compiled.plan)
    assert np.abs(outputs[0] - plain(model, x)[0]).max() < 64 * 2.0**-16
