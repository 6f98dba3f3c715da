"""ArgMax is taken before what keeps the order: sigmoids, softmax, a sum or factor of a whole row.

The largest share is that of the largest score, also where fixed point, or floating point, tells the
shares apart no more; and nobody waits for the shares to be told which is the largest.
"""

from __future__ import annotations

from dataclasses import replace

from mpcserve.compiler.fused import Inside
from mpcserve.compiler.graph import Graph, Node

INCREASING = ("Sigmoid", "LogSigmoid", "Tanh", "Exp", "Softplus", "Erf", "Identity")
"""Of one operand, strictly."""

POSITIVE = ("Sigmoid", "Exp", "Softplus", "Softmax", "Abs", "Relu", "ReduceSumSquare")
SUMS = ("Add", "Mul", "ReduceSum", "ReduceMean", "ReduceMax", "Cast", "Reshape", "Unsqueeze")
"""What makes no negative number of none."""


def largest_early(graph: Graph) -> Graph:
    """The same indices, ties aside."""
    inside = Inside(graph)
    nodes = [_moved(n, inside) if n.op == "ArgMax" and not n.domain else n for n in graph.nodes]
    return graph.with_nodes(nodes)


def _moved(node: Node, inside: Inside) -> Node:
    x, shape = node.inputs[0], inside.graph.shapes.get(node.inputs[0])
    if not shape:
        return node
    axis = int(node.attrs.get("axis", 0)) % len(shape)
    while (before := _before(x, axis, shape, inside)) is not None:
        x = before
    return replace(node, inputs=(x, *node.inputs[1:]))


def _before(x: str, axis: int, shape: tuple[int, ...], inside: Inside) -> str | None:
    """What has its largest elements along the axis where x has them, and the shape of x."""
    node = inside.makers.get(x)
    if node is None or not all(node.inputs):
        return None
    if node.op in INCREASING and len(node.inputs) == 1:
        return node.inputs[0]
    if node.op in ("Softmax", "LogSoftmax"):
        along = int(node.attrs.get("axis", -1)) % len(shape)
        known = bool(node.domain) or inside.graph.opset >= 13  # one axis, not all from there on
        return node.inputs[0] if known and along == axis else None
    if node.op not in ("Add", "Sub", "Mul", "Div"):
        return None
    first, second = node.inputs
    orders = [(first, second)] if node.op in ("Sub", "Div") else [(first, second), (second, first)]
    for whole, row in orders:
        if inside.graph.shapes.get(whole) != shape or not _same_along(row, axis, shape, inside):
            continue
        if node.op in ("Add", "Sub") or (node.op == "Div" and _nonnegative(row, inside)):
            return whole
        held = inside.graph.constants.get(row)
        if node.op == "Mul" and held is not None and (held > 0).all():
            return whole
    return None


def _same_along(row: str, axis: int, shape: tuple[int, ...], inside: Inside) -> bool:
    """Whether it is one number for all elements along the axis, of several."""
    held = inside.graph.constants.get(row)
    mine = inside.graph.shapes.get(row) if held is None else held.shape
    if mine is None or len(mine) > len(shape) or shape[axis] == 1:
        return False
    at = axis - len(shape) + len(mine)
    return at < 0 or mine[at] == 1


def _nonnegative(x: str, inside: Inside) -> bool:
    held = inside.graph.constants.get(x)
    if held is not None:
        return held.dtype.kind in "fiub" and bool((held >= 0).all())
    node = inside.makers.get(x)
    if node is None or node.op in POSITIVE:
        return node is not None
    if node.op == "Cast" and _is_bit(node.inputs[0], inside):
        return True
    values = node.inputs[:1] if node.op.startswith(("Reduce", "Reshape", "Uns")) else node.inputs
    return node.op in SUMS and all(_nonnegative(v, inside) for v in values)


def _is_bit(x: str, inside: Inside) -> bool:
    node = inside.makers.get(x)
    return node is not None and node.op in ("Not", "And", "Or", "Less", "Greater", "Equal")
