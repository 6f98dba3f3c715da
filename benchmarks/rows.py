"""The rows of the comparison: models of well-known sizes, and their inputs.

`table` holds the rows of the published table, `transformers` encoders from embeddings on, `light`
the architectures of the onnx package's test data. A row's model is built when it is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from benchmarks import light, shapes50
from models import encoders, shapes

IMAGE = (1, 3, 224, 224)


@dataclass(frozen=True, slots=True)
class Row:
    """`shape`: of the input, its batch first. `spread`: of its normally distributed values."""

    name: str
    title: str
    group: str
    shape: tuple[int, ...]
    build: Callable[[], onnx.ModelProto]
    spread: float = 1.0

    def inputs(self, model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
        """One batch, the same every time."""
        values = self.spread * np.random.default_rng(7).standard_normal(self.shape)
        return {model.graph.input[0].name: values.astype(np.float32)}


def relu(count: int) -> onnx.ModelProto:
    """One Relu of `count` values: what a comparison costs."""
    return _one_node("relu", helper.make_node("Relu", ["input"], ["output"]), count, count)


def matmul(size: int) -> onnx.ModelProto:
    """One product of a square input and a square weight of this size."""
    weight = np.random.default_rng(0).standard_normal((size, size)) / np.sqrt(size)
    node = helper.make_node("MatMul", ["input", "weight"], ["output"])
    return _one_node(f"matmul{size}", node, size, size, weight)


def _one_node(
    name: str, node: onnx.NodeProto, columns: int, outputs: int, weight: Any = None
) -> onnx.ModelProto:
    """A model of one node, from [N, columns] to [N, outputs]."""
    constants = (
        [onnx.numpy_helper.from_array(weight.astype(np.float32), "weight")]
        if weight is not None
        else []
    )
    graph = helper.make_graph(
        [node],
        name,
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", columns])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", outputs])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", shapes.OPSET)])
    model.ir_version = shapes.IR_VERSION
    onnx.checker.check_model(model, full_check=True)
    return model


ROWS: tuple[Row, ...] = (
    Row("mlp", "MLP 784-128-128-10", "table", (1, 784), shapes.mlp),
    Row("mlp128", "MLP 784-128-128-10, batch 128", "table", (128, 784), shapes.mlp),
    Row("lenet", "LeNet-5, 28×28", "table", (1, 1, 28, 28), shapes.lenet5),
    Row("relu", "10⁶ ReLU", "table", (1, 1_000_000), partial(relu, 1_000_000), spread=4.0),
    Row("matmul512", "matmul 512³", "table", (512, 512), partial(matmul, 512)),
    Row("matmul1024", "matmul 1024³", "table", (1024, 1024), partial(matmul, 1024)),
    Row("resnet20", "ResNet-20, 32×32", "table", (1, 3, 32, 32), shapes.resnet20),
    Row("resnet18", "ResNet-18, 224×224", "table", IMAGE, shapes.resnet18),
    Row("resnet50", "ResNet-50, 224×224", "table", IMAGE, shapes50.resnet50),
    Row(
        "bert_tiny",
        "BERT-tiny, 128 tokens",
        "transformers",
        (1, 128, 128),
        partial(encoders.encoder, "bert_tiny", encoders.BERT_TINY),
    ),
    Row(
        "bert_layer",
        "a layer of BERT-base, 128 tokens",
        "transformers",
        (1, 128, 768),
        partial(encoders.encoder, "bert_layer", encoders.BERT_BASE_LAYER),
    ),
    *(
        Row(f"light_{name}", f"{name} (onnx), 224×224", "light", IMAGE, partial(light.light, name))
        for name in light.NAMES
    ),
)
