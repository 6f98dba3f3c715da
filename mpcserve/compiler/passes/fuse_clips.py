"""Relu, Clip, Max and Min with public numbers, one after the other, become one Clip.

So is ReLU6 written, and the hard sigmoid: each alone takes a comparison and a select of its own,
both ends of one Clip are compared side by side. Max and Min may be written as Less and Where.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from mpcserve.compiler.fused import Fusion, Inside, fuse
from mpcserve.compiler.graph import Graph, Node


@dataclass(frozen=True, slots=True)
class _Limits:
    """min(max(x, low), high), low ≤ high, as `nodes` make it of x."""

    nodes: tuple[Node, ...]
    x: str
    low: float = -inf
    high: float = inf

    def after(self, first: _Limits) -> _Limits:
        """Of `first`, then of this."""
        low, high = (min(max(e, self.low), self.high) for e in (first.low, first.high))
        return _Limits((*first.nodes, *self.nodes), first.x, low, high)


def fuse_clips(graph: Graph) -> Graph:
    """The same function; each run of them one node."""
    inside, taken, found = Inside(graph), set[str](), []
    for last in reversed(graph.nodes):
        limits = None if last.name in taken else _limits(last, inside)
        if limits is None:
            continue
        while (node := inside.maker(limits.x)) is not None:
            first = _limits(node, inside)
            if first is None or not inside.closed((*first.nodes, *limits.nodes)):
                break
            limits = limits.after(first)
        if len(limits.nodes) > 1 and inside.closed(limits.nodes):
            taken |= {n.name for n in limits.nodes}
            attrs = {"low": limits.low, "high": limits.high}
            found.append(Fusion("Clip", (limits.x,), limits.nodes, attrs, {}))
    return fuse(graph, found)


def _limits(node: Node, inside: Inside) -> _Limits | None:
    """What a node limits its operand to, if it does that and its numbers are constants."""
    if node.domain:
        return None
    if node.op == "Relu":
        return _Limits((node,), node.inputs[0], 0.0)
    if node.op == "Clip":
        return _clip(node, inside)
    if node.op in ("Max", "Min") and (pair := _with_number(node, node.inputs, inside)):
        return _one_sided((node,), *pair[:2], node.op == "Max")
    return _chosen(node, inside) if node.op == "Where" else None


def _one_sided(nodes: tuple[Node, ...], x: str, end: float, is_least: bool) -> _Limits:
    return _Limits(nodes, x, low=end) if is_least else _Limits(nodes, x, high=end)


def _with_number(
    node: Node, operands: tuple[str, ...], inside: Inside
) -> tuple[str, float, bool] | None:
    """(x, number, whether x comes first) of two operands, where `node` has the shape of x."""
    ends = [inside.scalar(i) for i in operands]
    if len(ends) != 2 or (ends[0] is None) == (ends[1] is None):
        return None
    x, end = (operands[0], ends[1]) if ends[0] is None else (operands[1], ends[0])
    shapes = inside.graph.shapes
    same = shapes.get(x) is not None and shapes.get(x) == shapes.get(node.outputs[0])
    return (x, end, ends[0] is None) if same and end is not None else None


def _chosen(node: Node, inside: Inside) -> _Limits | None:
    """The greater or the lesser of x and a number, by a comparison of the two."""
    compare = inside.maker(node.inputs[0])
    if compare is None or not compare.op.startswith(("Less", "Greater")):
        return None
    compared = _with_number(compare, compare.inputs, inside)
    if compared is None or compared[0] not in node.inputs[1:]:
        return None
    branches = _with_number(node, node.inputs[1:], inside)
    if branches is None or compared[:2] != branches[:2]:
        return None
    x, end, x_first = compared
    if_below = compare.op.startswith("Less") == x_first
    return _one_sided((compare, node), x, end, if_below != branches[2])


def _clip(node: Node, inside: Inside) -> _Limits | None:
    names = (*node.inputs[1:], "", "")[:2]
    ends = [inside.scalar(i) if i else None for i in names]
    if any(i and e is None for i, e in zip(names, ends, strict=True)):
        return None
    low, high = (node.attrs.get(k, e) for k, e in zip(("min", "max"), ends, strict=True))
    low, high = -inf if low is None else float(low), inf if high is None else float(high)
    # ONNX: where the ends are crossed, the upper one wins.
    return _Limits((node,), node.inputs[0], min(low, high), high)
