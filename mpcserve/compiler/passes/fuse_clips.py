"""Relu, Clip, Max and Min with public numbers, one after the other, become one Clip.

So is ReLU6 written, and the hard sigmoid: each alone takes a comparison and a select of its own,
both ends of one Clip are compared side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from mpcserve.compiler.fused import Fusion, Inside, fuse
from mpcserve.compiler.graph import Graph, Node


@dataclass(frozen=True, slots=True)
class _Limits:
    """min(max(x, low), high), which ONNX lets be `high` where the ends are crossed."""

    x: str
    low: float = -inf
    high: float = inf

    def after(self, first: _Limits) -> _Limits:
        """Of `first`, then of this."""
        low, high = (min(max(e, self.low), self.high) for e in (first.low, first.high))
        return _Limits(first.x, min(low, high), high)


def fuse_clips(graph: Graph) -> Graph:
    """The same function; each run of them one node."""
    inside, taken, found = Inside(graph), set[str](), []
    for last in reversed(graph.nodes):
        limits = None if last.name in taken else _limits(last, inside)
        if limits is None:
            continue
        run = [last]
        while (node := inside.maker(limits.x)) is not None and inside.closed([node, *run]):
            first = _limits(node, inside)
            if first is None:
                break
            limits = limits.after(first)
            run.insert(0, node)
        if len(run) > 1:
            taken |= {n.name for n in run}
            attrs = {"low": limits.low, "high": limits.high}
            found.append(Fusion("Clip", (limits.x,), tuple(run), attrs, {}))
    return fuse(graph, found)


def _limits(node: Node, inside: Inside) -> _Limits | None:
    """What a node limits its operand to, if it does that and its numbers are constants."""
    if node.domain:
        return None
    if node.op == "Relu":
        return _Limits(node.inputs[0], 0.0)
    if node.op == "Clip":
        return _clip(node, inside)
    if node.op not in ("Max", "Min") or len(node.inputs) != 2:
        return None
    ends = [inside.scalar(i) for i in node.inputs]
    if (ends[0] is None) == (ends[1] is None):
        return None
    x, end = (node.inputs[0], ends[1]) if ends[0] is None else (node.inputs[1], ends[0])
    shapes = inside.graph.shapes
    if end is None or shapes.get(x) is None or shapes.get(x) != shapes.get(node.outputs[0]):
        return None
    return _Limits(x, low=end) if node.op == "Max" else _Limits(x, high=end)


def _clip(node: Node, inside: Inside) -> _Limits | None:
    names = (*node.inputs[1:], "", "")[:2]
    ends = [inside.scalar(i) if i else None for i in names]
    if any(i and e is None for i, e in zip(names, ends, strict=True)):
        return None
    low, high = (node.attrs.get(k, e) for k, e in zip(("min", "max"), ends, strict=True))
    low, high = -inf if low is None else float(low), inf if high is None else float(high)
    return _Limits(node.inputs[0], min(low, high), high)
