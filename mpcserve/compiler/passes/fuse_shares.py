"""x − log Σ e^x becomes LogSoftmax, and its exponential Softmax: their range is then known."""

from __future__ import annotations

from mpcserve.compiler.fused import Fusion, Inside, fuse
from mpcserve.compiler.graph import Graph, Node

_COLUMN = ("Reshape", "Unsqueeze")
"""What may give the sum its axis of length one back."""


def fuse_shares(graph: Graph) -> Graph:
    """The same function; each softmax over the last axis of a matrix one node."""
    inside = Inside(graph)
    found = []
    for node in graph.nodes:
        if node.op == "Exp" and not node.domain:
            last = inside.maker(node.inputs[0], "Sub")
            fusion = None if last is None else _fusion("Softmax", last, [node], inside)
            if fusion is not None:
                found.append(fusion)
    graph = fuse(graph, found)
    inside, found = Inside(graph), []
    for node in graph.nodes:
        if node.op == "Sub" and not node.domain:
            fusion = _fusion("LogSoftmax", node, [], inside)
            if fusion is not None:
                found.append(fusion)
    return fuse(graph, found)


def _fusion(op: str, sub: Node, behind: list[Node], inside: Inside) -> Fusion | None:
    """x − r, where r is the log of Σ e^x over each row of the matrix x."""
    x, column = sub.inputs
    total, nodes = inside.makers.get(column), [sub, *behind]
    while total is not None and total.op in _COLUMN and not total.domain:
        nodes = [total, *nodes]
        total = inside.makers.get(total.inputs[0])
    shape = inside.graph.shapes.get(x, ())
    if total is None or total.op != "ReduceLogSumExp" or total.inputs[0] != x or len(shape) != 2:
        return None
    constant = inside.graph.constants.get(total.inputs[1]) if len(total.inputs) > 1 else None
    axes = list(total.attrs.get("axes", () if constant is None else constant.tolist()))
    if [a % 2 for a in axes] != [1] or inside.graph.shapes.get(column) != (shape[0], 1):
        return None
    nodes = [total, *nodes]
    return Fusion(op, (x,), tuple(nodes), {"axis": 1}, {}) if inside.closed(nodes) else None
