"""Networks of well-known sizes with seeded random weights: for tests and benchmarks, not for use.

Weights are He-scaled and BatchNormalization nodes carry about the statistics that their inputs
have, so activations and logits stay in the range that a trained network's would have. Needs
numpy and onnx.
Source: LeCun et al. 1998 (LeNet-5); He et al. 2015, arXiv:1512.03385 (ResNet-18, ResNet-20).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod, sqrt
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
IR_VERSION = 8
BATCH = "N"
INPUT, LOGITS = "input", "logits"

Floats = NDArray[np.float32]


@dataclass(slots=True)
class GraphBuilder:
    """Appends nodes and initialisers; methods take and return names of values."""

    name: str
    seed: int = 0
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[TensorProto] = field(default_factory=list)

    def add(self, op: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Append a node and return the name of its only output."""
        index = len(self.nodes)
        output = output or f"{op.lower()}_{index}"
        self.nodes.append(
            helper.make_node(op, inputs, [output], name=f"{op}_{index}", **attributes)
        )
        return output

    def weight(self, array: NDArray[Any]) -> str:
        """Add an initialiser and return its name."""
        name = f"weight_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array.astype(np.float32), name))
        return name

    def random(self, shape: Sequence[int], spread: float, centre: float = 0.0) -> Floats:
        """Normally distributed values, the same for the same seed and position in the graph."""
        rng = np.random.default_rng([self.seed, len(self.weights)])
        return (centre + spread * rng.standard_normal(shape)).astype(np.float32)

    def conv(self, x: str, shape: tuple[int, int, int, int], stride: int = 1, pad: int = 0) -> str:
        """Convolution by He-scaled kernels [out, in, height, width], without bias."""
        kernel = self.weight(self.random(shape, sqrt(2 / prod(shape[1:]))))
        return self.add("Conv", x, kernel, strides=[stride] * 2, pads=[pad] * 4)

    def dense(self, x: str, inputs: int, outputs: int, output: str | None = None) -> str:
        """Gemm with He-scaled weights [outputs, inputs] and small biases."""
        weight = self.weight(self.random((outputs, inputs), sqrt(2 / inputs)))
        bias = self.weight(self.random((outputs,), 0.1))
        return self.add("Gemm", x, weight, bias, output=output, transB=1)

    def batch_norm(self, x: str, channels: int, power: float) -> str:
        """BatchNormalization of a convolution whose input has mean square `power`.

        He-scaled kernels double the mean square, which is the variance that is declared here.
        """
        statistics = (
            self.weight(self.random((channels,), 0.1, centre=1.0)),
            self.weight(self.random((channels,), 0.1)),
            self.weight(self.random((channels,), 0.1 * sqrt(2 * power))),
            self.weight(2 * power * np.exp(self.random((channels,), 0.1))),
        )
        return self.add("BatchNormalization", x, *statistics, epsilon=1e-5)

    def model(self, shape: Sequence[int], outputs: int) -> onnx.ModelProto:
        """A checked model from "input" [N, *shape] to "logits" [N, outputs]."""
        graph = helper.make_graph(
            self.nodes,
            self.name,
            [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [BATCH, *shape])],
            [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, [BATCH, outputs])],
            self.weights,
        )
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(graph, opset_imports=[opset], producer_name="mpcserve")
        model.ir_version = IR_VERSION
        onnx.checker.check_model(model, full_check=True)
        return model


def mlp(sizes: Sequence[int] = (784, 128, 128, 10), *, seed: int = 0) -> onnx.ModelProto:
    """Dense layers of these sizes with Relu between them; input [N, sizes[0]]."""
    g = GraphBuilder("mlp", seed)
    x = INPUT
    for inputs, outputs in pairwise(sizes[:-1]):
        x = g.add("Relu", g.dense(x, inputs, outputs))
    g.dense(x, sizes[-2], sizes[-1], output=LOGITS)
    return g.model([sizes[0]], sizes[-1])


def lenet5(*, seed: int = 0) -> onnx.ModelProto:
    """LeNet-5 with Relu and max pooling; input [N, 1, 28, 28]."""
    g = GraphBuilder("lenet5", seed)
    x = INPUT
    for shape, pad in (((6, 1, 5, 5), 2), ((16, 6, 5, 5), 0)):
        x = g.add("Relu", g.conv(x, shape, pad=pad))
        x = g.add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = g.add("Flatten", x)
    for inputs, outputs in ((400, 120), (120, 84)):
        x = g.add("Relu", g.dense(x, inputs, outputs))
    g.dense(x, 84, 10, output=LOGITS)
    return g.model([1, 28, 28], 10)


def resnet18(*, image: int = 224, classes: int = 1000, seed: int = 0) -> onnx.ModelProto:
    """ResNet-18, its BatchNormalization not folded; input [N, 3, image, image]."""
    g = GraphBuilder("resnet18", seed)
    x = g.add("Relu", g.batch_norm(g.conv(INPUT, (64, 3, 7, 7), stride=2, pad=3), 64, power=1.0))
    x = g.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    _residual_classifier(g, x, (64, 128, 256, 512), depth=2, power=2.0, classes=classes)
    return g.model([3, image, image], classes)


def resnet20(*, classes: int = 10, seed: int = 0) -> onnx.ModelProto:
    """ResNet-20 for CIFAR with 1×1 convolutions as shortcuts; input [N, 3, 32, 32]."""
    g = GraphBuilder("resnet20", seed)
    x = g.add("Relu", g.batch_norm(g.conv(INPUT, (16, 3, 3, 3), pad=1), 16, power=1.0))
    _residual_classifier(g, x, (16, 32, 64), depth=3, power=0.5, classes=classes)
    return g.model([3, 32, 32], classes)


def _residual_classifier(
    g: GraphBuilder, x: str, widths: Sequence[int], *, depth: int, power: float, classes: int
) -> None:
    """Stages of `depth` blocks, each stage but the first halving the image; pooling; Gemm."""
    channels = widths[0]
    for width in widths:
        for block in range(depth):
            stride = 2 if block == 0 and width != widths[0] else 1
            x, power = _block(g, x, power, channels, width, stride)
            channels = width
    g.dense(g.add("Flatten", g.add("GlobalAveragePool", x)), channels, classes, output=LOGITS)


def _block(
    g: GraphBuilder, x: str, power: float, inputs: int, outputs: int, stride: int
) -> tuple[str, float]:
    """Two 3×3 convolutions beside a shortcut; returns the output and roughly its mean square.

    Both branches of a sum have variance 1 after their BatchNormalization, and Relu halves the
    mean square of what is symmetric about 0; an identity shortcut is positive and stays whole.
    """
    y = g.conv(x, (outputs, inputs, 3, 3), stride=stride, pad=1)
    y = g.add("Relu", g.batch_norm(y, outputs, power))
    y = g.batch_norm(g.conv(y, (outputs, outputs, 3, 3), pad=1), outputs, power=0.5)
    if (stride, inputs) == (1, outputs):
        return g.add("Relu", g.add("Add", y, x)), power + 0.5
    shortcut = g.batch_norm(g.conv(x, (outputs, inputs, 1, 1), stride=stride), outputs, power)
    return g.add("Relu", g.add("Add", y, shortcut)), 1.0
