"""LayerNorm, RMSNorm and L2-normalisation as they are written out become one node.

    d = x − mean(x)          d / √(mean(d²) + ε) · gain + bias       LayerNorm, over any axes
                             x / √(mean(x²) + ε) · gain              RMSNorm
                             x / max(‖x‖₂, ε)                        L2-normalisation

Quotients may be written as products with a reciprocal or with a power of −½.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mpcserve.compiler.fused import Fusion, Inside, fuse
from mpcserve.compiler.graph import Graph, Node


class _Quotient(NamedTuple):
    """`top` / √`radicand`, or / `bottom` where there is no root; what was looked through."""

    top: str
    radicand: str | None
    bottom: str
    nodes: list[Node]


def fuse_normalizations(graph: Graph) -> Graph:
    """The same function; each normalisation one node."""
    inside = Inside(graph)
    found = []
    for node in graph.nodes:
        for quotient in _quotients(node, inside):
            fusion = _by_deviation(node, quotient, inside) or _by_length(node, quotient, inside)
            if fusion is not None and inside.closed(fusion.inside):
                found.append(_with_gain(fusion, inside))
                break
    return fuse(graph, found)


def _quotients(node: Node, inside: Inside) -> list[_Quotient]:
    """The ways to read a node as a quotient."""
    if node.domain:
        return []
    if node.op == "Div":
        return [_rooted(node.inputs[0], node.inputs[1], [node], inside)]
    if node.op != "Mul":
        return []
    ways = []
    for top, other in (node.inputs, node.inputs[::-1]):
        if (flipped := inside.maker(other, "Reciprocal")) is not None:
            ways.append(_rooted(top, flipped.inputs[0], [node, flipped], inside))
        flipped = inside.maker(other, "Div")
        if flipped is not None and inside.scalar(flipped.inputs[0]) == 1.0:
            ways.append(_rooted(top, flipped.inputs[1], [node, flipped], inside))
        power = inside.maker(other, "Pow")
        if power is not None and inside.scalar(power.inputs[1]) == -0.5:
            ways.append(_Quotient(top, power.inputs[0], other, [node, power]))
    return ways


def _rooted(top: str, bottom: str, nodes: list[Node], inside: Inside) -> _Quotient:
    root = inside.maker(bottom, "Sqrt")
    if root is None and (power := inside.maker(bottom, "Pow")) is not None:
        root = power if inside.scalar(power.inputs[1]) == 0.5 else None
    if root is None:
        return _Quotient(top, None, bottom, nodes)
    return _Quotient(top, root.inputs[0], bottom, [*nodes, root])


def _by_deviation(node: Node, q: _Quotient, inside: Inside) -> Fusion | None:
    """top / √(mean(top²) + ε), where top may be x − mean(x)."""
    if q.radicand is None or (total := inside.maker(q.radicand, "Add")) is None:
        return None
    for part, number in (total.inputs, total.inputs[::-1]):
        epsilon, mean = inside.scalar(number), inside.maker(part, "ReduceMean")
        if epsilon is None or mean is None:
            continue
        square, axes = inside.maker(mean.inputs[0]), _axes(mean, inside)
        if square is None or axes is None or not _squares(square, q.top, inside):
            continue
        nodes, x, centred = [*q.nodes, total, mean, square], q.top, False
        centre = inside.maker(q.top, "Sub")
        first = None if centre is None else inside.maker(centre.inputs[1], "ReduceMean")
        if centre is not None and first is not None and first.inputs[0] == centre.inputs[0]:
            if _axes(first, inside) != axes:
                return None
            nodes, x, centred = [*nodes, centre, first], centre.inputs[0], True
        attrs = {"axes": axes, "epsilon": epsilon, "centred": int(centred)}
        return Fusion("Normalize", (x,), _in_order(nodes, inside), attrs, {})
    return None


def _squares(node: Node, x: str, inside: Inside) -> bool:
    if node.op == "Pow":
        return node.inputs[0] == x and inside.scalar(node.inputs[1]) == 2.0
    return node.op == "Mul" and node.inputs == (x, x)


def _by_length(node: Node, q: _Quotient, inside: Inside) -> Fusion | None:
    """top / ‖top‖₂, where the length may be clipped from below and expanded."""
    nodes = [n for n in q.nodes if q.bottom not in n.outputs]
    name, least = q.bottom, 0.0
    if (wide := inside.maker(name, "Expand")) is not None:
        nodes, name = [*nodes, wide], wide.inputs[0]
    clip = inside.maker(name)
    if clip is not None and clip.op in ("Clip", "Max") and len(clip.inputs) > 1:
        least = inside.scalar(clip.inputs[1]) or 0.0
        nodes, name = [*nodes, clip], clip.inputs[0]
    length = _length(name, q.top, inside)
    if not length or least > 1e-4:
        return None
    axes = _axes(length[-1], inside)
    if axes is None or len(axes) != 1:
        return None
    nodes = [*nodes, *length]
    attrs = {"axis": axes[0], "p": 2}
    return Fusion("LpNormalization", (q.top,), _in_order(nodes, inside), attrs, {})


def _length(name: str, x: str, inside: Inside) -> list[Node]:
    """The nodes of ‖x‖₂, the reduction last; none if a value is not that."""
    found = []
    while (node := inside.maker(name)) is not None and node.op in ("Cast", "CastLike", "Sqrt"):
        found.append(node)
        name = node.inputs[0]
    if node is None:
        return []
    if node.op == "ReduceL2":
        return [*found, node] if node.inputs[0] == x else []
    square = inside.maker(node.inputs[0])
    if node.op != "ReduceSum" or square is None or not _squares(square, x, inside):
        return []
    return [*found, square, node] if [n.op for n in found].count("Sqrt") == 1 else []


def _with_gain(f: Fusion, inside: Inside) -> Fusion:
    """A product and a sum with constants right behind are taken in."""
    if f.op != "Normalize":
        return f
    for op in ("Mul", "Add"):
        last = f.inside[-1]
        readers = [n for n in inside.graph.nodes if last.outputs[0] in n.inputs]
        if len(readers) != 1 or readers[0].op != op or readers[0].domain:
            return f
        reader = readers[0]
        other = next((i for i in reader.inputs if i != last.outputs[0]), "")
        shape = inside.graph.shapes.get(f.inputs[0])
        value = inside.graph.constants.get(other)
        if value is None or shape is None or np.broadcast_shapes(value.shape, shape) != shape:
            return f
        if not inside.closed((*f.inside, reader)):
            return f
        inputs = (*f.inputs, other) if op == "Mul" or len(f.inputs) == 2 else (*f.inputs, "", other)
        f = Fusion(f.op, inputs, (*f.inside, reader), f.attrs, {})
    return f


def _axes(node: Node, inside: Inside) -> tuple[int, ...] | None:
    """The axes that a reduction keeps with length one, from the front."""
    shape = inside.graph.shapes.get(node.inputs[0])
    if shape is None or not node.attrs.get("keepdims", 1):
        return None
    given: Any = node.attrs.get("axes")
    if given is None and len(node.inputs) > 1:
        constant = inside.graph.constants.get(node.inputs[1])
        given = None if constant is None else constant.tolist()
    if not given:
        return None
    return tuple(sorted(a % len(shape) for a in given))


def _in_order(nodes: list[Node], inside: Inside) -> tuple[Node, ...]:
    names = {n.name for n in nodes}
    return tuple(n for n in inside.graph.nodes if n.name in names)
