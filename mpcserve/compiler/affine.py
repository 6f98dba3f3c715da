"""Constant scalings and offsets in a graph, and the linear nodes that can take them in.

An *affine* node computes scale · x + offset with constants that broadcast to x. A *linear* node
is a Conv, ConvTranspose, Gemm or MatMul whose weights (and bias) are constants.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpcserve.compiler.graph import Graph, Node, Shape

Floats = NDArray[np.float64]

CONVS = ("Conv", "ConvTranspose")
LINEAR = (*CONVS, "Gemm", "MatMul")


@dataclass(frozen=True, slots=True)
class Affine:
    """scale · x + offset; both have x's rank."""

    x: str
    scale: Floats
    offset: Floats

    def then(self, after: Affine) -> Affine:
        """This one first, `after` on its result."""
        return Affine(self.x, self.scale * after.scale, self.offset * after.scale + after.offset)

    def along(self, axis: int, length: int) -> tuple[Floats, Floats] | None:
        """(scale, offset) as vectors, if they vary along `axis` alone."""
        found = [_vector(v, axis, length) for v in (self.scale, self.offset)]
        return None if found[0] is None or found[1] is None else (found[0], found[1])

    def reshaped(self, old: Shape, new: Shape) -> Affine | None:
        """The same of the reshaped x, if the leading axis is kept and the constants ignore it."""
        if not old or not new or old[0] != new[0]:
            return None
        if self.scale.shape[0] != 1 or self.offset.shape[0] != 1:
            return None
        one = [np.broadcast_to(v, (1, *old[1:])) for v in (self.scale, self.offset)]
        return Affine(self.x, *(v.reshape((1, *new[1:])) for v in one))


@dataclass(frozen=True, slots=True)
class Linear:
    """weights: out × in/groups × … of a convolution, transposed or not, else inner × out.

    `bias` per output, None for MatMul.
    """

    node: Node
    weights: Floats
    bias: Floats | None


def affine_of(node: Node, graph: Graph) -> Affine | None:
    """The node as scale · x + offset; None if it is not that."""
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op == "BatchNormalization":
        return _batch_norm(node, graph)
    if node.op == "Neg":
        return _affine(node.inputs[0], -1.0, 0.0, graph)
    if node.op not in ("Mul", "Add", "Sub", "Div") or len(node.inputs) != 2:
        return None
    constant = [_floats(graph, i) for i in node.inputs]
    if (constant[0] is None) == (constant[1] is None):
        return None
    value = constant[0] if constant[1] is None else constant[1]
    assert value is not None
    x = node.inputs[0] if constant[1] is not None else node.inputs[1]
    turned = constant[0] is not None
    if node.op == "Mul":
        return _affine(x, value, 0.0, graph)
    if node.op == "Add":
        return _affine(x, 1.0, value, graph)
    if node.op == "Sub":
        return _affine(x, -1.0, value, graph) if turned else _affine(x, 1.0, -value, graph)
    return None if turned or not np.all(value) else _affine(x, 1.0 / value, 0.0, graph)


def linear_of(node: Node, graph: Graph) -> Linear | None:
    """The node with its constants; None if it is not linear with constant weights."""
    if node.op not in LINEAR or node.domain not in ("", "ai.onnx"):
        return None
    weights = _floats(graph, node.inputs[1])
    bias: Floats | None = np.zeros(())
    if len(node.inputs) > 2 and node.inputs[2]:
        bias = _floats(graph, node.inputs[2])
        if bias is None:
            return None
    if weights is None or node.inputs[0] in graph.constants:
        return None
    if node.op in CONVS:
        assert bias is not None
        weights = _outputs_first(node, weights)
        return Linear(node, weights, np.broadcast_to(bias, weights.shape[:1]))
    if weights.ndim != 2:
        return None
    if node.op == "MatMul":
        return Linear(node, weights, None)
    assert bias is not None
    if node.attrs.get("transA", 0):
        return None
    weights = weights.T if node.attrs.get("transB", 0) else weights
    if (alpha := node.attrs.get("alpha", 1.0)) != 1.0:
        weights = alpha * weights
    return Linear(node, weights, node.attrs.get("beta", 1.0) * bias)


def after_linear(linear: Linear, affine: Affine) -> Linear | None:
    """The affine map of a linear node's result, taken into its weights."""
    axis, size = _output_axis(linear)
    if linear.node.op not in CONVS and affine.scale.ndim < 1:
        return None
    vectors = affine.along(axis, size)
    if vectors is None:
        return None
    scale, offset = vectors
    if linear.bias is None and not offset.any():
        return replace(linear, weights=linear.weights * scale)
    bias = linear.bias if linear.bias is not None else _no_bias(affine.scale.ndim)
    if bias is None:
        return None
    if linear.node.op in CONVS:
        shape = (-1, *[1] * (linear.weights.ndim - 1))
        weights = linear.weights * scale.reshape(shape)
    else:
        weights = linear.weights * scale
    return replace(linear, weights=weights, bias=bias * scale + offset)


def before_linear(affine: Affine, linear: Linear) -> tuple[Linear, Floats | None] | None:
    """The affine map of a linear node's operand, taken into its weights.

    With it comes what must still be added: to the operand of a Conv (before padding), per channel;
    to the result of a MatMul, per output; None if nothing.
    """
    w = linear.weights
    groups = int(linear.node.attrs.get("group", 1))
    axis, size = (1, w.shape[1] * groups) if linear.node.op in CONVS else (-1, w.shape[0])
    vectors = affine.along(axis, size)
    if vectors is None:
        return None
    scale, offset = vectors
    if linear.node.op not in CONVS:
        shift, scaled = offset @ w, w * scale[:, None]
        if linear.bias is None and not offset.any():
            return replace(linear, weights=scaled), None
        bias = linear.bias if linear.bias is not None else _no_bias(affine.scale.ndim)
        if bias is None:
            return replace(linear, weights=scaled), shift
        return replace(linear, weights=scaled, bias=bias + shift), None
    per_group = (groups, w.shape[0] // groups, *w.shape[1:])
    spread = (groups, 1, w.shape[1], *[1] * (w.ndim - 2))
    scaled = (w.reshape(per_group) * scale.reshape(spread)).reshape(w.shape)
    if not offset.any():
        return replace(linear, weights=scaled), None
    if _pads(linear.node) or linear.node.op == "ConvTranspose":
        # Zeros around scale·x + offset are zeros around x + offset/scale, scaled.
        gains = scale.all() and np.any(scale != 1)
        return (replace(linear, weights=scaled), offset / scale) if gains else None
    each = (w.reshape(per_group) * offset.reshape(spread)).reshape(w.shape)
    assert linear.bias is not None
    bias = linear.bias + each.sum(axis=tuple(range(1, w.ndim)))
    return replace(linear, weights=scaled, bias=bias), None


def write_linear(linear: Linear, graph: Graph) -> tuple[Node, dict[str, Any]]:
    """(node, its constants) in ONNX's terms."""
    node = linear.node
    dtype = graph.constants[node.inputs[1]].dtype
    names = (f"{node.name}/weights", f"{node.name}/bias")
    weights = _outputs_first(node, linear.weights) if node.op in CONVS else linear.weights
    constants: dict[str, Any] = {names[0]: weights.astype(dtype)}
    attrs = dict(node.attrs)
    if node.op == "Gemm":
        attrs = {}
    if linear.bias is None:
        return replace(node, inputs=(node.inputs[0], names[0])), constants
    if node.op == "MatMul":
        node = replace(node, op="Gemm")
    constants[names[1]] = linear.bias.astype(dtype)
    return replace(node, inputs=(node.inputs[0], *names), attrs=attrs), constants


def write_affine(
    affine: Affine, output: str, name: str, dtype: Any
) -> tuple[list[Node], dict[str, Any]]:
    """Mul and Add, each only where it does something; Sub from the offset for a scale of −1."""
    if np.all(affine.scale == -1):
        constant = f"{name}/from"
        node = Node("Sub", (constant, affine.x), (output,), {}, name)
        return [node], {constant: affine.offset.astype(dtype)}
    nodes, constants, x = [], {}, affine.x
    steps = [("Mul", affine.scale, 1.0), ("Add", affine.offset, 0.0)]
    steps = [s for s in steps if np.any(s[1] != s[2])] or steps[1:]
    for position, (op, values, _) in enumerate(steps):
        last = position == len(steps) - 1
        result, constant = output if last else f"{name}/scaled", f"{name}/{op.lower()}"
        constants[constant] = values.astype(dtype)
        label = name if last else f"{name}/{op.lower()}"
        nodes.append(Node(op, (x, constant), (result,), {}, label))
        x = result
    return nodes, constants


def _outputs_first(node: Node, weights: Floats) -> Floats:
    """in × out/groups × … of a ConvTranspose as out × in/groups × …, and back: its own inverse."""
    if node.op == "Conv":
        return weights
    groups = int(node.attrs.get("group", 1))
    apart = weights.reshape((groups, weights.shape[0] // groups, *weights.shape[1:]))
    turned = apart.swapaxes(1, 2)
    return turned.reshape((groups * turned.shape[1], *turned.shape[2:]))


def _no_bias(rank: int) -> Floats | None:
    """A MatMul of matrices is a Gemm, which has a bias; with batch axes there is none."""
    return np.zeros(()) if rank == 2 else None


def _output_axis(linear: Linear) -> tuple[int, int]:
    if linear.node.op in CONVS:
        return 1, linear.weights.shape[0]
    return -1, linear.weights.shape[1]


def _pads(node: Node) -> bool:
    return any(node.attrs.get("pads") or ()) or node.attrs.get("auto_pad", "NOTSET") not in (
        "NOTSET",
        "VALID",
        "",
    )


def _batch_norm(node: Node, graph: Graph) -> Affine | None:
    if node.attrs.get("training_mode", 0) or len(node.outputs) > 1:
        return None
    constants = [_floats(graph, i) for i in node.inputs[1:]]
    if any(c is None or c.ndim != 1 for c in constants):
        return None
    gain, offset, mean, var = (c for c in constants if c is not None)
    scale = gain / np.sqrt(var + node.attrs.get("epsilon", 1e-5))
    shape = (1, -1, *[1] * (len(graph.shapes[node.inputs[0]]) - 2))
    return Affine(node.inputs[0], scale.reshape(shape), (offset - mean * scale).reshape(shape))


def _affine(x: str, scale: Floats | float, offset: Floats | float, graph: Graph) -> Affine | None:
    shape = graph.shapes.get(x)
    if shape is None:
        return None
    ranked = []
    for value in (scale, offset):
        array = np.asarray(value, np.float64)
        if np.broadcast_shapes(array.shape, shape) != shape:
            return None
        ranked.append(array.reshape((1,) * (len(shape) - array.ndim) + array.shape))
    return Affine(x, *ranked)


def _floats(graph: Graph, name: str) -> Floats | None:
    value = graph.constants.get(name)
    if value is None or not np.issubdtype(value.dtype, np.floating):
        return None
    return np.asarray(value, np.float64)


def _vector(value: Floats, axis: int, length: int) -> Floats | None:
    axis = axis + value.ndim if axis < 0 else axis
    if axis >= value.ndim or any(d != 1 for i, d in enumerate(value.shape) if i != axis):
        return None
    return np.broadcast_to(value.reshape(value.shape[axis]), (length,))
