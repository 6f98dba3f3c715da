"""Attention as it is written out: masks become public structure, softmax · values one node.

    x · c, x / c, (x @ z) · c  c a power of the length of an axis, as 1/√d   a public factor
    Softmax(s + mask)          a constant mask with large negative numbers   what is hidden is known
    Softmax(Where(m, s, −big)) the same                                      and never computed
    Softmax(…) @ v             nobody else reads the softmax                 the sum is divided

A mask that is secret keeps its place, but its large number becomes HIDDEN: enough to hide a score,
and few bits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpcserve.compiler.fused import Fusion, Inside, fuse
from mpcserve.compiler.graph import Graph, Node
from mpcserve.compiler.masking import HIDDEN, mask_of

POWERS = (-1.0, -0.5, -0.25, 0.25, 0.5, 1.0)

EXACT = 1e-3
"""Relative error of a factor in half precision."""

CARRIES = frozenset(
    {"Unsqueeze", "Squeeze", "Expand", "Reshape", "Transpose", "Slice", "Cast", "Concat", "Tile"}
)
"""What may stand between a mask and the scores it is added to."""


def fuse_attention(graph: Graph) -> Graph:
    """The same function but for scores that a mask hides, whose e^x is exactly 0."""
    graph = _scaled(graph)
    inside = Inside(graph)
    found = [f for n in graph.nodes if (f := _softmax(n, inside)) is not None]
    return _bounded(fuse(graph, found))


def _scaled(graph: Graph) -> Graph:
    """Products with a power of an axis' length: the number is structure, no weight."""
    inside = Inside(graph)
    found = []
    for node in graph.nodes:
        if node.op not in ("Mul", "Div") or node.domain:
            continue
        pairs = [node.inputs] if node.op == "Div" else [node.inputs, node.inputs[::-1]]
        for x, number in pairs:
            value = inside.scalar(number)
            if x in graph.constants or value is None or not np.isfinite(value) or value <= 0:
                continue
            factor = _power(value if node.op == "Mul" else 1 / value, x, inside)
            same = graph.shapes.get(x) == graph.shapes.get(node.outputs[0])
            if factor is not None and same:
                found.append(_scale(node, x, factor, inside))
                break
    return fuse(graph, found)


def _scale(node: Node, x: str, factor: float, inside: Inside) -> Fusion:
    """Of a product of secrets, its left operand is scaled instead: it has fewer elements."""
    product = inside.maker(x, "MatMul")
    secret = product is not None and not set(product.inputs) & inside.graph.constants.keys()
    if product is not None and secret and inside.closed([product, node]):
        return Fusion("ScaledMatMul", product.inputs, (product, node), {"factor": factor}, {})
    return Fusion("Scale", (x,), (node,), {"factor": factor}, {})


def _power(value: float, x: str, inside: Inside) -> float | None:
    """The power of an axis' length that a factor is, of x or of what x was multiplied from."""
    lengths = [*inside.graph.shapes.get(x, ())[-2:]]
    product = inside.maker(x, "MatMul")
    if product is not None:
        lengths += inside.graph.shapes.get(product.inputs[0], ())[-1:]
    for length in lengths:
        for power in POWERS:
            if length > 1 and abs(value / length**power - 1) < EXACT:
                return float(length**power)
    return None


def _softmax(node: Node, inside: Inside) -> Fusion | None:
    shape = inside.graph.shapes.get(node.inputs[0]) if node.inputs else None
    if node.op != "Softmax" or node.domain or not shape or len(shape) < 2:
        return None
    axis = node.attrs.get("axis", -1 if inside.graph.opset >= 13 else 1)
    if axis % len(shape) != len(shape) - 1:
        return None
    scores, added, nodes = node.inputs[0], np.zeros(1), [node]
    while (step := _mask(scores, inside)) is not None and inside.closed([step[2], *nodes]):
        scores, added, nodes = step[0], added + step[1], [step[2], *nodes]
    if np.broadcast_shapes(added.shape, shape) != shape or mask_of(added).kept.all():
        scores, nodes = node.inputs[0], [node]
    name = f"{node.name}/mask"
    masked = len(nodes) > 1
    constants: dict[str, Any] = {name: added.astype(np.float32)} if masked else {}
    reader = _product(node, inside)
    if reader is not None and inside.closed([*nodes, reader]):
        inputs = (scores, reader.inputs[1], *constants)
        return Fusion("Attend", inputs, (*nodes, reader), {}, constants)
    if not masked:
        return None
    return Fusion("MaskedSoftmax", (scores, name), tuple(nodes), {}, constants)


def _product(node: Node, inside: Inside) -> Node | None:
    """The one reader of a softmax, if that is a product with values."""
    weights = node.outputs[0]
    readers = [n for n in inside.graph.nodes if weights in n.inputs]
    if len(readers) != 1 or readers[0].op != "MatMul" or readers[0].inputs[0] != weights:
        return None
    values = readers[0].inputs[1]
    return None if values == weights or len(inside.graph.shapes[values]) < 2 else readers[0]


def _mask(x: str, inside: Inside) -> tuple[str, NDArray[np.float64], Node] | None:
    """(scores, what a constant adds to them, the node) where x is scores under a mask."""
    node, constants = inside.maker(x), inside.graph.constants
    if node is None or inside.graph.shapes.get(x) is None:
        return None
    same = [i for i in node.inputs if inside.graph.shapes.get(i) == inside.graph.shapes[x]]
    if node.op == "Add":
        for scores, mask in (node.inputs, node.inputs[::-1]):
            if scores in same and scores not in constants and mask in constants:
                return scores, np.asarray(constants[mask], np.float64), node
    if node.op == "Where" and node.inputs[0] in constants:
        shown = np.asarray(constants[node.inputs[0]], bool)
        for scores, low, where in (
            (node.inputs[1], node.inputs[2], shown),
            (node.inputs[2], node.inputs[1], ~shown),
        ):
            value = inside.scalar(low)
            secret = scores in same and scores not in constants
            if secret and value is not None and value <= HIDDEN:
                return scores, np.where(where, 0.0, value), node
    return None


def _bounded(graph: Graph) -> Graph:
    """Large negative constants that reach a softmax through a secret mask become HIDDEN."""
    inside = Inside(graph)
    constants: dict[str, Any] = {}
    changed: dict[tuple[str, str], str] = {}
    softmaxes = [n for n in graph.nodes if n.op in ("Softmax", "Attend", "MaskedSoftmax")]
    stack = [inside.maker(n.inputs[0]) for n in softmaxes]
    done: set[str] = set()
    while stack:
        node = stack.pop()
        if node is None or node.name in done or node.op not in {*CARRIES, "Add", "Mul", "Where"}:
            continue
        done.add(node.name)
        for name in node.inputs:
            value = graph.constants.get(name)
            if value is None:
                stack.append(inside.maker(name))
            elif value.dtype.kind == "f" and value.size and value.min() <= HIDDEN:
                constants[f"{name}/bounded"] = np.maximum(value, HIDDEN).astype(value.dtype)
                changed[node.name, name] = f"{name}/bounded"
    if not changed:
        return graph
    nodes = [
        replace(n, inputs=tuple(changed.get((n.name, i), i) for i in n.inputs)) for n in graph.nodes
    ]
    return graph.with_nodes(nodes, constants)
