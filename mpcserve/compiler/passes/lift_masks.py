"""Public parts of a secret mask are added to the scores last, where attention finds them.

    scores + (mask + public)     (scores + mask) + public
    Pad(mask, −∞)                Pad(mask, 0) + what is −∞ where it pads

What is −∞ at public places is structure; inside a secret mask it could only be a large number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpcserve.compiler.fused import Inside
from mpcserve.compiler.graph import Graph, Node
from mpcserve.compiler.masking import HIDDEN


def lift_masks(graph: Graph) -> Graph:
    """The same function. What nobody reads is left out, as it would hold a mask where it is."""
    masks = {k for k, v in graph.constants.items() if _hides(v)}
    if not any(n.op in ("Add", "Pad") and not masks.isdisjoint(n.inputs) for n in graph.nodes):
        return graph
    graph = _unpadded(_living(graph))
    while (lifted := _lifted(graph)) is not None:
        graph = lifted
    return graph


def _hides(x: NDArray[Any]) -> bool:
    return bool(x.dtype.kind == "f" and x.size and x.min() <= HIDDEN)


def _living(graph: Graph) -> Graph:
    """Without nodes whose results nobody reads."""
    read = {o.name for o in graph.outputs}
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if not read.isdisjoint(node.outputs):
            read.update(node.inputs)
            kept.append(node)
    return graph.with_nodes(kept[::-1])


def _unpadded(graph: Graph) -> Graph:
    uses, constants = graph.uses(), dict(graph.constants)
    shapes = dict(graph.shapes)
    nodes: list[Node] = []
    for node in graph.nodes:
        added = _border(node, graph)
        if added is None or any(n.op != "Add" for n in uses.get(node.outputs[0], ())):
            nodes.append(node)
            continue
        inside, zero, border = (f"{node.outputs[0]}/{part}" for part in ("inside", "zero", "−∞"))
        constants |= {zero: np.zeros((), added.dtype), border: added}
        shapes[inside] = added.shape
        x, pads, _, *axes = node.inputs
        nodes.append(replace(node, inputs=(x, pads, zero, *axes), outputs=(inside,)))
        nodes.append(Node("Add", (inside, border), node.outputs, {}, f"{node.name}/mask"))
    return replace(graph, shapes=shapes).with_nodes(nodes, constants)


def _border(node: Node, graph: Graph) -> NDArray[Any] | None:
    """0 where a Pad of a secret keeps it, and its large negative number around."""
    known: Mapping[str, NDArray[Any]] = graph.constants
    if node.op != "Pad" or node.domain or node.attrs.get("mode", "constant") != "constant":
        return None
    x, pads, value, axes = (*node.inputs, "", "", "")[:4]
    shape = graph.shapes.get(x)
    fits = x not in known and pads in known and (not axes or axes in known)
    if not fits or shape is None or value not in known or not _hides(known[value]):
        return None
    before, after = known[pads].reshape(2, -1).tolist()
    if min(before + after) < 0:
        return None
    widths = [(0, 0)] * len(shape)
    chosen = known[axes].tolist() if axes else range(len(shape))
    for axis, low, high in zip(chosen, before, after, strict=True):
        widths[axis] = (low, high)
    level = known[value].ravel()[0]
    return np.pad(np.zeros(shape, known[value].dtype), widths, constant_values=level)


def _lifted(graph: Graph) -> Graph | None:
    """One public mask added one step later; None where all are."""
    inside = Inside(graph)
    for position, outer in enumerate(graph.nodes):
        for a, b in (outer.inputs, outer.inputs[::-1]) if outer.op == "Add" else ():
            inner = inside.maker(b, "Add")
            if inner is None or a in graph.constants or not inside.closed([inner, outer]):
                continue
            mask = next((c for c in inner.inputs if _hides(graph.constants.get(c, _NONE))), None)
            if mask is None:
                continue
            (x,) = (i for i in inner.inputs if i != mask)
            made = f"{outer.outputs[0]}/unmasked"
            shape = graph.shapes.get(outer.outputs[0])
            known = [s for i in (a, x) if (s := graph.shapes.get(i)) is not None]
            if len(known) < 2 or np.broadcast_shapes(*known) != shape:
                continue
            first = replace(inner, inputs=(a, x), outputs=(made,))
            nodes = [n for n in graph.nodes[:position] if n is not inner]
            nodes += [first, replace(outer, inputs=(made, mask)), *graph.nodes[position + 1 :]]
            return replace(graph, shapes={**graph.shapes, made: shape}).with_nodes(nodes)
    return None


_NONE = np.zeros(0, np.float32)
