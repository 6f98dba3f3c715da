"""ResNet-50 with seeded random weights, built as `models/shapes.py` builds its networks.

The second convolution of a block has the stride, as in the networks people use today.
Source: He et al. 2015, arXiv:1512.03385.
"""

from __future__ import annotations

import onnx

from models.shapes import INPUT, LOGITS, GraphBuilder

STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
"""(inner channels, blocks) of each stage; every block ends with four times as many channels."""


def resnet50(*, image: int = 224, classes: int = 1000, seed: int = 0) -> onnx.ModelProto:
    """ResNet-50, its BatchNormalization not folded; input [N, 3, image, image]."""
    g = GraphBuilder("resnet50", seed)
    x = g.add("Relu", g.batch_norm(g.conv(INPUT, (64, 3, 7, 7), stride=2, pad=3), 64, power=1.0))
    x = g.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    channels, power = 64, 2.0
    for inner, blocks in STAGES:
        for block in range(blocks):
            stride = 2 if block == 0 and inner != 64 else 1
            x, power = _bottleneck(g, x, power, channels, inner, stride)
            channels = 4 * inner
    g.dense(g.add("Flatten", g.add("GlobalAveragePool", x)), channels, classes, output=LOGITS)
    return g.model([3, image, image], classes)


def _bottleneck(
    g: GraphBuilder, x: str, power: float, inputs: int, inner: int, stride: int
) -> tuple[str, float]:
    """1×1, 3×3 and 1×1 convolutions beside a shortcut; the output and roughly its mean square."""
    outputs = 4 * inner
    y = g.add("Relu", g.batch_norm(g.conv(x, (inner, inputs, 1, 1)), inner, power))
    y = g.conv(y, (inner, inner, 3, 3), stride=stride, pad=1)
    y = g.add("Relu", g.batch_norm(y, inner, power=0.5))
    y = g.batch_norm(g.conv(y, (outputs, inner, 1, 1)), outputs, power=0.5)
    if (stride, inputs) == (1, outputs):
        return g.add("Relu", g.add("Add", y, x)), power + 0.5
    shortcut = g.batch_norm(g.conv(x, (outputs, inputs, 1, 1), stride=stride), outputs, power)
    return g.add("Relu", g.add("Add", y, shortcut)), 1.0
