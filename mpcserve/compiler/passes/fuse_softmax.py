"""Softmax, log-softmax and log Σ e^x as they are written out become one node: no e^x is too large.

e / Σ e            with e = exp(x) or exp(x − max x)     Softmax
m − log Σ e^m      with m = x − max x                    LogSoftmax
log s              with s = Softmax(x), however small    LogSoftmax
log Σ e^x                                                ReduceLogSumExp
"""

from __future__ import annotations

from mpcserve.compiler.fused import Fusion, Inside, fuse
from mpcserve.compiler.graph import Graph, Node

SINGLE_AXIS = 13
"""From this opset on a Softmax is along one axis."""


def fuse_softmax(graph: Graph) -> Graph:
    """The same function; sums of exponentials are found behind what is made of them."""
    for find in (_softmax, _log_softmax, _log_of_softmax, _log_sum_exp):
        inside = Inside(graph)
        found = [f for node in graph.nodes if not node.domain and (f := find(node, inside))]
        graph = fuse(graph, found)
    return graph


def _softmax(div: Node, inside: Inside) -> Fusion | None:
    if div.op != "Div":
        return None
    e, total = div.inputs
    exp, summed = inside.maker(e, "Exp"), inside.maker(total, "ReduceSum")
    if exp is None or summed is None or summed.inputs[0] != e:
        return None
    axis = _axis(summed, inside)
    x, before = _lowered(exp.inputs[0], axis, inside)
    return _closed("Softmax", x, axis, [*before, exp, summed, div], inside)


def _log_softmax(sub: Node, inside: Inside) -> Fusion | None:
    if sub.op != "Sub":
        return None
    m, log = sub.inputs[0], inside.maker(sub.inputs[1], "Log")
    summed = None if log is None else inside.maker(log.inputs[0], "ReduceSum")
    exp = None if summed is None else inside.maker(summed.inputs[0], "Exp")
    if log is None or summed is None or exp is None or exp.inputs[0] != m:
        return None
    axis = _axis(summed, inside)
    x, before = _lowered(m, axis, inside)
    return _closed("LogSoftmax", x, axis, [*before, exp, summed, log, sub], inside)


def _log_of_softmax(log: Node, inside: Inside) -> Fusion | None:
    softmax = inside.makers.get(log.inputs[0]) if log.op == "Log" else None
    if softmax is None or softmax.op != "Softmax":
        return None
    if not softmax.domain and inside.graph.opset < SINGLE_AXIS:
        return None
    axis = int(softmax.attrs.get("axis", -1))
    return _closed("LogSoftmax", softmax.inputs[0], axis, [softmax, log], inside)


def _log_sum_exp(log: Node, inside: Inside) -> Fusion | None:
    summed = inside.maker(log.inputs[0], "ReduceSum") if log.op == "Log" else None
    exp = None if summed is None else inside.maker(summed.inputs[0], "Exp")
    if summed is None or exp is None or not inside.closed((exp, summed, log)):
        return None
    inputs = (exp.inputs[0], *summed.inputs[1:])
    return Fusion("ReduceLogSumExp", inputs, (exp, summed, log), summed.attrs, {})


def _lowered(m: str, axis: int | None, inside: Inside) -> tuple[str, list[Node]]:
    """(x, nodes) where m is x less its maximum; else m itself."""
    sub = inside.maker(m, "Sub")
    most = None if sub is None else inside.maker(sub.inputs[1], "ReduceMax")
    if sub is None or most is None or most.inputs[0] != sub.inputs[0]:
        return m, []
    return (sub.inputs[0], [most, sub]) if _axis(most, inside) == axis else (m, [])


def _axis(node: Node, inside: Inside) -> int | None:
    """The one axis that a reduction keeps with length one, from the front."""
    shape = inside.graph.shapes.get(node.inputs[0])
    constant = inside.graph.constants.get(node.inputs[1]) if len(node.inputs) > 1 else None
    axes = list(node.attrs.get("axes", () if constant is None else constant.tolist()))
    if shape is None or len(axes) != 1 or not node.attrs.get("keepdims", 1):
        return None
    return int(axes[0]) % len(shape)


def _closed(op: str, x: str, axis: int | None, nodes: list[Node], inside: Inside) -> Fusion | None:
    if axis is None or not inside.closed(nodes):
        return None
    return Fusion(op, (x,), tuple(nodes), {"axis": axis}, {})
