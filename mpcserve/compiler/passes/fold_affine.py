"""Constant scalings, offsets, BatchNormalization and means move into neighbouring linear nodes.

    affine → affine          one affine                     a product less
    linear → affine          into weights and bias          a product less
    affine → linear          into weights and bias          a product less
    mean → linear            sum; 1/n into the weights      no wide integers for 1/n

Reshapes between an affine or mean and a linear node are looked through. Exact in real numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from mpcserve.compiler.affine import (
    Affine,
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
    linear = linear_of(node, graph)
    if linear is None:
        return None
    path: list[Node] = []
    source = alone(node.inputs[0])
    while source is not None and source.op in _RESHAPES:
        path.insert(0, source)
        source = alone(source.inputs[0])
    if source is None:
        return None
    affine = affine_of(source, graph)
    mean = _mean_of(source, graph) if affine is None else None
    if mean is not None:
        affine = mean[1]
    if affine is None:
        return None
    result = source.outputs[0]
    final = affine.reshaped(graph.shapes[result], graph.shapes[node.inputs[0]]) if path else affine
    folded = None if final is None else before_linear(final, linear)
    if folded is None:
        return None
    new, constants = write_linear(folded[0], graph)
    head = [] if mean is None else [mean[0]]
    constants |= {} if mean is None else mean[2]
    return _joined(source, path, node, (head, affine.x, new), folded[1], constants, graph)


def _joined(
    source: Node,
    path: list[Node],
    node: Node,
    parts: tuple[list[Node], str, Node],
    rest: Any,
    constants: dict[str, Any],
    graph: Graph,
) -> _Rewrite | None:
    """Head, reshapes, linear node and the offset that could not be folded."""
    head, start, new = parts
    dtype = graph.constants[node.inputs[1]].dtype
    middle = list(path)
    tail: list[Node] = []
    if rest is not None and node.op == "Conv":
        if path or head:
            return None
        shape = (1, -1, *[1] * (len(graph.shapes[start]) - 2))
        name = f"{source.name}/offset"
        constants[name] = rest.reshape(shape).astype(dtype)
        head = [Node("Add", (start, name), (f"{source.outputs[0]}/offset",), {}, source.name)]
        start = head[0].outputs[0]
    elif rest is not None:
        name, raw = f"{node.name}/bias", f"{node.outputs[0]}/raw"
        constants[name] = rest.astype(dtype)
        tail = [Node("Add", (raw, name), node.outputs, {}, f"{node.name}/add")]
        new = replace(new, outputs=(raw,))
    if middle:
        middle[0] = replace(middle[0], inputs=(start, *middle[0].inputs[1:]))
        start = middle[-1].outputs[0]
    new = replace(new, inputs=(start, *new.inputs[1:]))
    removed = (source.name, *(p.name for p in path), node.name)
    return _Rewrite(removed, (*head, *middle, new, *tail), constants)


def _mean_of(node: Node, graph: Graph) -> tuple[Node, Affine, dict[str, Any]] | None:
    """A mean of n elements as (sum, times 1/n, constants), where n is no power of two."""
    if node.op not in ("GlobalAveragePool", "ReduceMean") or graph.opset < 13:
        return None
    shape, result = graph.shapes[node.inputs[0]], graph.shapes[node.outputs[0]]
    keepdims = int(node.attrs.get("keepdims", 1))
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
    total = replace(
        node, op="ReduceSum", inputs=(node.inputs[0], name), attrs={"keepdims": keepdims}
    )
    ones = (1,) * len(result)
    affine = Affine(node.outputs[0], np.full(ones, 1.0 / count), np.zeros(ones))
    return total, affine, {name: np.array(axes, np.int64)}


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
