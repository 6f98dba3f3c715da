"""Transformer encoders with seeded random weights, from embeddings on: for tests and benchmarks.

As BERT is built: attention over all tokens, normalisation behind every sum, GELU between the dense
layers. Weights have the spread of trained ones at their start, 1/√inputs here, so that attention
scores and activations stay in a trained network's range. Needs numpy and onnx.
Source: Devlin et al. 2018, arXiv:1810.04805; Turc et al. 2019, arXiv:1908.08962 (BERT-tiny).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np
import onnx
from onnx import TensorProto, helper

from models.shapes import BATCH, INPUT, GraphBuilder

OPSET = 20
IR_VERSION = 9
OUTPUT = "hidden"


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of an encoder: `inner` is the width between the two dense layers of a block."""

    layers: int
    hidden: int
    heads: int
    inner: int
    tokens: int = 128


BERT_TINY = Sizes(layers=2, hidden=128, heads=2, inner=512)
BERT_BASE_LAYER = Sizes(layers=1, hidden=768, heads=12, inner=3072)
BERT_BASE = Sizes(layers=12, hidden=768, heads=12, inner=3072)


def encoder(name: str, sizes: Sizes, *, seed: int = 0) -> onnx.ModelProto:
    """From "input" [N, tokens, hidden] to "hidden" of the same shape."""
    g = GraphBuilder(name, seed)
    x = INPUT
    for layer in range(sizes.layers):
        attended = g.add("Add", x, _attention(g, x, sizes))
        x = _norm(g, attended, sizes.hidden)
        inner = g.add("Gelu", _dense(g, x, sizes.hidden, sizes.inner))
        outer = g.add("Add", x, _dense(g, inner, sizes.inner, sizes.hidden))
        x = _norm(g, outer, sizes.hidden, OUTPUT if layer == sizes.layers - 1 else None)
    return _model(g, [sizes.tokens, sizes.hidden])


def _attention(g: GraphBuilder, x: str, sizes: Sizes) -> str:
    """Scaled dot products of all heads at once."""
    width = sizes.hidden // sizes.heads
    split = _shape(g, [0, sizes.tokens, sizes.heads, width])
    parts = [g.add("Reshape", _dense(g, x, sizes.hidden, sizes.hidden), split) for _ in range(3)]
    query, value = (g.add("Transpose", parts[k], perm=[0, 2, 1, 3]) for k in (0, 2))
    key = g.add("Transpose", parts[1], perm=[0, 2, 3, 1])
    scale = g.weight(np.array(1 / sqrt(width)))
    scores = g.add("Mul", g.add("MatMul", query, key), scale)
    mixed = g.add("MatMul", g.add("Softmax", scores, axis=-1), value)
    together = g.add("Transpose", mixed, perm=[0, 2, 1, 3])
    joined = g.add("Reshape", together, _shape(g, [0, sizes.tokens, sizes.hidden]))
    return _dense(g, joined, sizes.hidden, sizes.hidden)


def _dense(g: GraphBuilder, x: str, inputs: int, outputs: int) -> str:
    """MatMul by weights [inputs, outputs] and small biases."""
    weight = g.weight(g.random((inputs, outputs), 1 / sqrt(inputs)))
    return g.add("Add", g.add("MatMul", x, weight), g.weight(g.random((outputs,), 0.1)))


def _norm(g: GraphBuilder, x: str, width: int, output: str | None = None) -> str:
    gain = g.weight(g.random((width,), 0.1, centre=1.0))
    bias = g.weight(g.random((width,), 0.1))
    return g.add("LayerNormalization", x, gain, bias, output=output, axis=-1, epsilon=1e-5)


def _shape(g: GraphBuilder, shape: list[int]) -> str:
    name = f"shape_{len(g.weights)}"
    g.weights.append(onnx.numpy_helper.from_array(np.array(shape, np.int64), name))
    return name


def _model(g: GraphBuilder, shape: list[int]) -> onnx.ModelProto:
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [BATCH, *shape])
        for name in (INPUT, OUTPUT)
    ]
    graph = helper.make_graph(g.nodes, g.name, ends[:1], ends[1:], g.weights)
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(graph, opset_imports=[opset], producer_name="mpcserve")
    model.ir_version = IR_VERSION
    onnx.checker.check_model(model, full_check=True)
    return model
