"""What is selected is selected as early as can be: positions that nobody reads are not computed.

    (x + y)[:, k]        x[:, k] + y[:, k]      and so any function of single elements
    (x @ y)[…, k, :]     x[…, k, :] @ y         columns likewise, of y
    softmax(x)[:, k]     softmax(x[:, k])       normalisations, sums over other axes
    reshape(x)[:, k]     reshape(x[:, k])       where the axis is one of x

So of the last block of a network whose answer is that of one token, as the next token's or a
class token's, only that token's attention and dense layers are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpcserve.compiler.graph import Graph, Node, Shape

ELEMENTWISE = frozenset(
    {
        *("Abs", "Add", "Cast", "Ceil", "Clip", "Div", "Dropout", "Elu", "Erf", "Exp", "Floor"),
        *("Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "Max", "Min", "Mish"),
        *("Mul", "Neg", "Pow", "Reciprocal", "Relu", "Round", "Sigmoid", "Sin", "Cos", "Softplus"),
        *("Sqrt", "Sub", "Sum", "Tanh", "And", "Or", "Xor", "Not", "Where"),
        *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
    }
)
RESHAPES = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten"})
REDUCES = frozenset({"ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceSumSquare"})
NORMALISES = frozenset({"LayerNormalization", "RMSNormalization"})
SOFTMAXES = frozenset({"Softmax", "LogSoftmax"})

Axes = dict[int, int]
"""Number of an operand → its axis that is selected along; other operands are read whole."""


@dataclass(frozen=True, slots=True)
class _Selection:
    """`at`: positions along `axis`; `drops` the axis, which has one."""

    axis: int
    at: tuple[int, ...]
    drops: bool


def select_early(graph: Graph) -> Graph:
    """The same function; of every node that only equal selections read, what they select."""
    while (moved := _moved(graph)) is not None:
        graph = moved
    return graph


def _moved(graph: Graph) -> Graph | None:
    """With one selection more in front of the node that it reads; None when there is no way."""
    users, outputs = graph.uses(), {o.name for o in graph.outputs}
    for node in reversed(graph.nodes):
        made = node.outputs[0] if node.outputs else ""
        if node.domain or len(node.outputs) != 1 or made in outputs or made not in users:
            continue
        found = {_selection(reader, made, graph) for reader in users[made]}
        selection = found.pop()
        if found or selection is None:
            continue
        axes = _axes(node, selection.axis, graph)
        if axes is not None:
            return _rewritten(graph, node, selection, axes)
    return None


def _selection(node: Node, x: str, graph: Graph) -> _Selection | None:
    """What `node` selects of x along one axis, if it does that and nothing else."""
    shape = graph.shapes.get(x)
    given = [graph.constants.get(i) for i in node.inputs[1:]]
    if node.domain or not shape or node.inputs[0] != x or any(c is None for c in given):
        return None
    constants = [np.asarray(c) for c in given]
    if node.op == "Gather" and constants[0].ndim <= 1 and constants[0].size:
        axis = int(node.attrs.get("axis", 0)) % len(shape)
        at = tuple(int(k) % shape[axis] for k in constants[0].reshape(-1))
        found = _Selection(axis, at, constants[0].ndim == 0)
    elif node.op == "Slice" and len(constants) >= 2:
        found = _sliced(shape, constants)
    else:
        return None
    return found if len(found.at) < shape[found.axis] else None


def _sliced(shape: Shape, constants: Sequence[NDArray[Any]]) -> _Selection:
    """Of several axes the one that is shortened; where several are, all of one: none."""
    starts, ends, *rest = (c.reshape(-1).tolist() for c in constants)
    axes = rest[0] if rest else range(len(starts))
    steps = rest[1] if len(rest) > 1 else [1] * len(starts)
    parts = [
        (a % len(shape), tuple(range(shape[a])[slice(s, e, step)]))
        for s, e, a, step in zip(starts, ends, axes, steps, strict=True)
    ]
    cut = [(a, at) for a, at in parts if at != tuple(range(shape[a]))]
    axis, at = cut[0] if len(cut) == 1 and cut[0][1] else (0, tuple(range(shape[0])))
    return _Selection(axis, at, False)


def _axes(node: Node, axis: int, graph: Graph) -> Axes | None:
    """Where a selection along an axis of the result is one of operands; None where it is not."""
    shapes = [s for i in node.inputs if (s := _shape(graph, i)) is not None]
    if len(shapes) < len(node.inputs):
        return None
    return _rule(node, axis, shapes, graph.shapes[node.outputs[0]], graph) or None


def _shape(graph: Graph, name: str) -> Shape | None:
    constant = graph.constants.get(name)
    return graph.shapes.get(name) if constant is None else constant.shape


def _rule(node: Node, axis: int, shapes: list[Shape], made: Shape, graph: Graph) -> Axes | None:
    op, first = node.op, shapes[0] if shapes else ()
    if op in ELEMENTWISE:
        return _broadcast(shapes, made, axis)
    if op == "Expand" and node.inputs[1] in graph.constants:
        return _broadcast(shapes[:1], made, axis)
    if op == "MatMul":
        return _product(shapes, made, axis)
    if op == "Gemm":
        turned = int(node.attrs.get("transB" if axis else "transA", 0))
        added = {k: a for k, a in _broadcast(shapes, made, axis).items() if k == 2}
        return {axis: 1 - turned if axis else turned, **added}
    if op == "Transpose":
        perm = node.attrs.get("perm", tuple(range(len(first)))[::-1])
        return {0: int(perm[axis])}
    if op in RESHAPES:
        return _kept(first, made, axis)
    if op == "Concat" and axis != int(node.attrs["axis"]) % len(made):
        return dict.fromkeys(range(len(shapes)), axis)
    if op in NORMALISES and axis < int(node.attrs.get("axis", -1)) % len(made):
        return {0: axis}
    if op in SOFTMAXES and graph.opset >= 13:
        return {0: axis} if axis != int(node.attrs.get("axis", -1)) % len(made) else None
    if op in REDUCES and len(first) == len(made) and first[axis] == made[axis]:
        return {0: axis}
    return None


def _broadcast(shapes: Sequence[Shape], made: Shape, axis: int) -> Axes:
    """Operands that reach along the axis; those that are repeated along it are read whole."""
    own = {k: axis - len(made) + len(s) for k, s in enumerate(shapes)}
    return {k: a for k, a in own.items() if a >= 0 and shapes[k][a] == made[axis]}


def _product(shapes: list[Shape], made: Shape, axis: int) -> Axes | None:
    """Rows of the first factor, columns of the second, or matrices of both."""
    if any(len(s) < 2 for s in shapes):
        return None
    if axis >= len(made) - 2:
        side = axis - len(made) + 2
        return {side: len(shapes[side]) - 2 + side}
    return _broadcast(shapes, made, axis)


def _kept(before: Shape, after: Shape, axis: int) -> Axes | None:
    """The axis of the operand that a change of shape leaves as it is."""
    ahead = prod(after[:axis])
    for k, length in enumerate(before):
        if length == after[axis] and prod(before[:k]) == ahead:
            return {0: k}
    return None


def _rewritten(graph: Graph, node: Node, selection: _Selection, axes: Axes) -> Graph:
    """The node reads what is selected; those that selected have nothing left to do."""
    shapes, constants = dict(graph.shapes), dict(graph.constants)
    made = f"{node.outputs[0]}/selected"
    shape = shapes[made] = _cut(shapes[node.outputs[0]], selection.axis, selection)
    constants[f"{made}/at"] = np.array(selection.at, np.int64)
    constants[f"{made}/first"] = np.array(0, np.int64)
    inputs, added = list(node.inputs), []
    for k, axis in axes.items():
        name, operand = f"{made}/{k}", inputs[k]
        inputs[k] = name
        if operand in constants:
            constants[name] = np.take(constants[operand], selection.at, axis)
            continue
        shapes[name] = _cut(shapes[operand], axis, selection)
        read = (operand, f"{made}/at")
        added.append(Node("Gather", read, (name,), {"axis": axis}, f"{node.name}/{k}/selected"))
    if node.op in RESHAPES or node.op == "Expand":
        constants[f"{made}/shape"] = np.array(shape, np.int64)
        inputs = [inputs[0], f"{made}/shape"]
    op = "Reshape" if node.op in RESHAPES else node.op
    attrs = {} if node.op in RESHAPES else node.attrs
    new = replace(node, op=op, inputs=tuple(inputs), outputs=(made,), attrs=attrs)
    nodes: list[Node] = []
    for other in graph.nodes:
        if other.name == node.name:
            nodes += [*added, new]
        elif node.outputs[0] in other.inputs:
            nodes.append(_idle(other, made, selection))
        else:
            nodes.append(other)
    return replace(graph, shapes=shapes).with_nodes(nodes, constants)


def _cut(shape: Shape, axis: int, selection: _Selection) -> Shape:
    return (*shape[:axis], len(selection.at), *shape[axis + 1 :])


def _idle(node: Node, made: str, selection: _Selection) -> Node:
    """A selection of what is selected already."""
    if not selection.drops:
        return Node("Identity", (made,), node.outputs, {}, node.name)
    read = (made, f"{made}/first")
    return Node("Gather", read, node.outputs, {"axis": selection.axis}, node.name)
