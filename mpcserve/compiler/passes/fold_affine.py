"""Constant scalings, offsets, BatchNormalization and means move into neighbouring linear nodes.

    affine → affine          one affine                     a product less
    linear → affine          into weights and bias          a product less
    affine → linear          into weights and bias          a product less
    mean → linear            sum; 1/n into the weights      no wide integers for 1/n

Reshapes between an affine or mean and a linear node are looked through. Exact in real numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np

from mpcserve.compiler.affine import (
    CONVS,
    LINEAR,
    Affine,
    Linear,
    affine_of,
    after_linear,
    before_linear,
    linear_of,
    write_affine,
    write_linear,
)
from mpcserve.compiler.graph import Graph, Node

_RESHAPES = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")


@dataclass(frozen=True, slots=True)
class _Rewrite:
    """`nodes` takes the place of `remove`, where the last of those stood."""

    remove: tuple[str, ...]
    nodes: tuple[Node, ...]
    constants: Mapping[str, Any]


def fold_affine(graph: Graph) -> Graph:
    """Rewrite until nothing folds; every rewrite leaves fewer products or fewer wide values."""
    while (rewrite := _first(graph)) is not None:
        graph = _applied(graph, rewrite)
    return graph


def _first(graph: Graph) -> _Rewrite | None:
    users = graph.uses()
    outputs = {o.name for o in graph.outputs}
    producers = graph.producers()

    def alone(name: str) -> Node | None:
        """The producer of a value that has one reader."""
        return (
            producers.get(name) if name not in outputs and len(users.get(name, ())) == 1 else None
        )

    for node in graph.nodes:
        found = _onto_affine(node, graph, alone) or _onto_linear(node, graph, alone)
        if found is not None:
            return found
    return None


def _onto_affine(node: Node, graph: Graph, alone: Any) -> _Rewrite | None:
    affine = affine_of(node, graph)
    if affine is None:
        return None
    before = alone(affine.x)
    if before is None:
        return None
    first = affine_of(before, graph)
    if first is not None:
        both = first.then(affine)
        dtype = _dtype((before, node), graph)
        # Mul → Add is the written form of one affine map: nothing to gain.
        if dtype is None or (before.op, node.op) == ("Mul", "Add"):
            return None
        nodes, constants = write_affine(both, node.outputs[0], node.name, dtype)
        return _Rewrite((before.name, node.name), tuple(nodes), constants)
    linear = linear_of(before, graph)
    folded = None if linear is None else after_linear(linear, affine)
    if folded is None:
        return None
    new, constants = write_linear(folded, graph)
    return _Rewrite((before.name, node.name), (replace(new, outputs=node.outputs),), constants)


def _onto_linear(node: Node, graph: Graph, alone: Any) -> _Rewrite | None:
    if node.op not in LINEAR:
        return None
    path: list[Node] = []
    source = alone(node.inputs[0])
    while source is not None and source.op in _RESHAPES:
        path.insert(0, source)
        source = alone(source.inputs[0])
    if source is None:
        return None
    found = _affine_before(source, graph, alone) or _mean_before(source, graph)
    linear = None if found is None else linear_of(node, graph)
    if found is None or linear is None:
        return None
    result, operand = (graph.shapes.get(n) for n in (source.outputs[0], node.inputs[0]))
    if result is None or operand is None:
        return None
    final = found.affine.reshaped(result, operand) if path else found.affine
    folded = None if final is None else before_linear(final, linear)
    if folded is None:
        return None
    return _joined(found, path, node, folded, graph)


@dataclass(frozen=True, slots=True)
class _Before:
    """What stands before a linear node: `nodes` compute `affine` of their operand or of `head`."""

    nodes: tuple[Node, ...]
    affine: Affine
    head: tuple[Node, ...] = ()
    constants: Mapping[str, Any] = field(default_factory=dict)


def _affine_before(source: Node, graph: Graph, alone: Any) -> _Before | None:
    affine = affine_of(source, graph)
    if affine is None:
        return None
    nodes = [source]
    while (node := alone(affine.x)) is not None and (first := affine_of(node, graph)) is not None:
        affine = first.then(affine)
        nodes.insert(0, node)
    return _Before(tuple(nodes), affine)


def _joined(
    found: _Before, path: list[Node], node: Node, folded: tuple[Linear, Any], graph: Graph
) -> _Rewrite | None:
    """Head, reshapes, linear node and the offset that could not be folded."""
    new, constants = write_linear(folded[0], graph)
    constants |= found.constants
    rest, source = folded[1], found.nodes[-1]
    head, tail, start = list(found.head), [], found.affine.x
    if rest is not None and node.op in CONVS:
        if path or head:
            return None
        name = f"{source.name}/offset"
        shape = (1, -1, *[1] * (len(graph.shapes[start]) - 2))
        constants[name] = rest.reshape(shape).astype(graph.constants[node.inputs[1]].dtype)
        head = [Node("Add", (start, name), (f"{source.outputs[0]}/offset",), {}, source.name)]
        start = head[0].outputs[0]
    elif rest is not None:
        name, raw = f"{node.name}/bias", f"{node.outputs[0]}/raw"
        constants[name] = rest.astype(graph.constants[node.inputs[1]].dtype)
        tail = [Node("Add", (raw, name), node.outputs, {}, f"{node.name}/add")]
        new = replace(new, outputs=(raw,))
    middle = list(path)
    if middle:
        middle[0] = replace(middle[0], inputs=(start, *middle[0].inputs[1:]))
        start = middle[-1].outputs[0]
    new = replace(new, inputs=(start, *new.inputs[1:]))
    removed = tuple(n.name for n in (*found.nodes, *path, node))
    return _Rewrite(removed, (*head, *middle, new, *tail), constants)


def _mean_before(node: Node, graph: Graph) -> _Before | None:
    """A mean of n elements as a sum, times 1/n, where n is no power of two."""
    if node.op not in ("GlobalAveragePool", "ReduceMean") or graph.opset < 13:
        return None
    shape, result = (graph.shapes.get(n) for n in (node.inputs[0], node.outputs[0]))
    if shape is None or result is None:
        return None
    if node.op == "GlobalAveragePool":
        axes = list(range(2, len(shape)))
    else:
        given = graph.constants.get(node.inputs[1]) if len(node.inputs) > 1 else None
        listed = node.attrs.get("axes", () if given is None else given.tolist())
        axes = sorted(a % len(shape) for a in listed)
    count = prod(shape[a] for a in axes)
    if not axes or 0 in axes or count & (count - 1) == 0:
        return None
    name = f"{node.name}/axes"
    attrs = {"keepdims": int(node.attrs.get("keepdims", 1))}
    total = replace(node, op="ReduceSum", inputs=(node.inputs[0], name), attrs=attrs)
    ones = (1,) * len(result)
    affine = Affine(node.outputs[0], np.full(ones, 1.0 / count), np.zeros(ones))
    return _Before((node,), affine, (total,), {name: np.array(axes, np.int64)})


def _applied(graph: Graph, rewrite: _Rewrite) -> Graph:
    nodes: list[Node] = []
    left = set(rewrite.remove)
    for node in graph.nodes:
        if node.name not in left:
            nodes.append(node)
            continue
        left.discard(node.name)
        if not left:
            nodes += rewrite.nodes
    shapes = dict(graph.shapes)
    last = rewrite.nodes[-1].outputs[0]
    for node in rewrite.nodes:
        if node.outputs[0] not in shapes:
            # A step of an affine map has its operand's shape; a MatMul stands before its offset.
            source = last if node.op == "MatMul" else node.inputs[0]
            shapes[node.outputs[0]] = shapes[source]
    return replace(graph.with_nodes(nodes, rewrite.constants), shapes=shapes)


def _dtype(nodes: tuple[Node, ...], graph: Graph) -> Any:
    """Element type of the first constant of some nodes."""
    names = (i for n in nodes for i in n.inputs if i in graph.constants)
    return next((graph.constants[i].dtype for i in names), None)
