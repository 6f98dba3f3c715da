"""The `light_*` architectures inside the onnx package's test data, with weights of a sane scale.

As shipped every weight is a constant and activations reach 1e31. Here kernels are He-scaled and
seeded, and every BatchNormalization declares the statistics that its input has on one sample, so
activations stay in the range of a trained network's. The last Softmax is left out: who receives
the logits computes it in the clear.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

NAMES = (
    "resnet50",
    "squeezenet",
    "densenet121",
    "vgg19",
    "shufflenet",
    "inception_v1",
    "inception_v2",
)
IR_VERSION = 8

Array = NDArray[Any]


def light(name: str, *, seed: int = 0) -> onnx.ModelProto:
    """The architecture `light_<name>.onnx`; input [1, 3, 224, 224], output the logits."""
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    model = onnx.load(folder / f"light_{name}.onnx")
    inputs = [i for i in model.graph.input if len(i.type.tensor_type.shape.dim) == 4]
    sample = np.random.default_rng(seed).standard_normal(
        [d.dim_value for d in inputs[0].type.tensor_type.shape.dim]
    )
    run = _Dressing(seed, {inputs[0].name: sample.astype(np.float32)})
    for tensor in model.graph.initializer:
        run.values[tensor.name] = numpy_helper.to_array(tensor)
    nodes = [n for n in model.graph.node if n.op_type != "Softmax"]
    opset = [o for o in model.opset_import if o.domain == ""]
    for node in nodes:
        run.dress(node, opset)
    last = nodes[-1].output[0]
    kept = [n for n in nodes if n.output[0] not in run.weights]
    read = {name for n in kept for name in n.input}
    graph = helper.make_graph(
        kept,
        f"light_{name}",
        inputs[:1],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, run.values[last].shape)],
        [numpy_helper.from_array(array, key) for key, array in run.weights.items() if key in read],
    )
    dressed = helper.make_model(graph, opset_imports=opset, producer_name="mpcserve")
    dressed.ir_version = IR_VERSION
    onnx.checker.check_model(dressed, full_check=True)
    return dressed


@dataclass(slots=True)
class _Dressing:
    """Walks the nodes in order, gives each its weights, and evaluates it on the sample."""

    seed: int
    values: dict[str, Array]
    weights: dict[str, Array] = field(default_factory=dict)

    def dress(self, node: onnx.NodeProto, opset: list[onnx.OperatorSetIdProto]) -> None:
        """Replace what `node` reads that is constant, then compute its output."""
        if node.op_type in ("ConstantOfShape", "Unsqueeze") and self._constant(node):
            # Shapes only: the consumer decides what is in it.
            self.values[node.output[0]] = self._evaluated(node, opset)
            self.weights[node.output[0]] = self.values[node.output[0]]
            return
        operands = [self.values[name] for name in node.input]
        for name, array in zip(node.input[1:], self._weights_of(node, operands), strict=False):
            self.weights[name] = self.values[name] = array.astype(np.float32)
        for name in node.input:
            if self.values[name].dtype == np.int64:  # the shape of a Reshape
                self.weights[name] = self.values[name]
        self.values[node.output[0]] = self._evaluated(node, opset)

    def _constant(self, node: onnx.NodeProto) -> bool:
        """Whether it depends on nothing but weights: the sample's image is no weight."""
        return (
            node.op_type == "ConstantOfShape"
            or node.input[0] in self.weights
            or (self.values[node.input[0]].ndim == 1)
        )

    def _weights_of(self, node: onnx.NodeProto, operands: list[Array]) -> list[Array]:
        """New values of a node's second and later inputs."""
        x, rest = operands[0], operands[1:]
        if node.op_type in ("Conv", "Gemm"):
            transposed = {a.name: a.i for a in node.attribute}.get("transB", 0)
            fan_in = rest[0].shape[0] if node.op_type == "Gemm" and not transposed else None
            spread = sqrt(2 / (fan_in or prod(rest[0].shape[1:])))
            return [self._random(rest[0], spread), *(self._random(r, 0.1) for r in rest[1:])]
        if node.op_type == "BatchNormalization":
            axes = tuple(a for a in range(x.ndim) if a != 1)
            scale, bias = self._random(rest[0], 0.1, 1.0), self._random(rest[1], 0.1)
            return [scale, bias, x.mean(axes), x.var(axes)]
        if node.op_type == "Mul" and node.input[1] in self.weights:
            return [self._random(rest[0], 0.1, 1.0)]
        if node.op_type == "Add" and node.input[1] in self.weights:
            return [self._random(rest[0], 0.1)]
        return []

    def _random(self, like: Array, spread: float, centre: float = 0.0) -> Array:
        rng = np.random.default_rng([self.seed, len(self.values)])
        return centre + spread * rng.standard_normal(like.shape)

    def _evaluated(self, node: onnx.NodeProto, opset: list[onnx.OperatorSetIdProto]) -> Array:
        feed = {name: self.values[name] for name in node.input}
        graph = helper.make_graph(
            [node],
            "one",
            [
                helper.make_tensor_value_info(
                    name, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape
                )
                for name, a in feed.items()
            ],
            [helper.make_empty_tensor_value_info(node.output[0])],
        )
        model = helper.make_model(graph, opset_imports=opset)
        model.ir_version = IR_VERSION
        options = ort.SessionOptions()
        options.log_severity_level = 3
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return np.asarray(session.run(node.output[:1], feed)[0])
