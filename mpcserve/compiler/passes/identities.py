"""Identity, Dropout at inference and casts between floats do nothing: their readers read on.

Where anything of the model is double by itself, casts from and to double stay: onnxruntime, which
runs the graph to see its ranges, adds or multiplies no float with a double.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mpcserve.compiler.graph import Graph, Node

_FLOATS = (1, 10, 11, 16)
"""TensorProto's float, float16, double, bfloat16."""

_DOUBLE = 11

_BOOL = 9


def remove_identities(graph: Graph) -> Graph:
    """Same function, fewer nodes. A node that names an output of the model stays."""
    kept = {o.name for o in graph.outputs}
    others, doubles = _booleans(graph) | _integers(graph), _doubles(graph)
    instead: dict[str, str] = {}
    nodes = []
    for node in graph.nodes:
        node = replace(node, inputs=tuple(instead.get(i, i) for i in node.inputs))
        if _idle(node, others, doubles) and node.outputs[0] not in kept:
            instead[node.outputs[0]] = node.inputs[0]
        else:
            nodes.append(node)
    return graph.with_nodes(nodes)


_COMPARES = (
    *("And", "Or", "Xor", "Not", "Equal", "IsInf", "IsNaN"),
    *("Less", "LessOrEqual", "Greater", "GreaterOrEqual"),
)
_MOVES = (
    *("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand", "Tile"),
    *("Concat", "Split", "Slice", "Gather"),
)


def _booleans(graph: Graph) -> set[str]:
    """Values that are secret bits: a cast makes numbers of them."""
    found: set[str] = set()
    for node in graph.nodes:
        made = node.op in _COMPARES or (node.op == "Cast" and node.attrs.get("to") == _BOOL)
        moved = node.op in _MOVES and node.inputs[0] in found
        chosen = node.op == "Where" and not found.isdisjoint(node.inputs[1:])
        if made or moved or chosen:
            found.update(node.outputs)
    return found


_COUNTS = ("ArgMax", "ArgMin", "Shape", "Size", "LabelEncoder")
"""Operators whose result is whole, whatever they read; a cast makes it a float for the next."""


def _integers(graph: Graph) -> set[str]:
    """Whole numbers: taking their cast away would leave a graph that onnxruntime refuses."""
    found = {i.name for i in graph.inputs if np.dtype(i.dtype).kind in "iu"}
    found |= {name for name, value in graph.constants.items() if value.dtype.kind in "iu"}
    for node in graph.nodes:
        first = node.inputs[1] if node.op == "Where" else node.inputs[0] if node.inputs else ""
        kept = first in found and node.op not in (*_COMPARES, "Cast", "CastLike")
        counted = node.op in _COUNTS or (
            node.op == "Cast" and node.attrs.get("to") not in (*_FLOATS, _BOOL)
        )
        if kept or counted:
            found.update(node.outputs)
        elif node.op == "TopK":
            found.update(node.outputs[1:])
    return found


def _doubles(graph: Graph) -> set[str]:
    """Values in double precision; none where only casts make any."""
    found = {i.name for i in (*graph.inputs, *graph.outputs) if i.dtype == "float64"}
    found |= {name for name, value in graph.constants.items() if value.dtype == np.float64}
    if not found:
        return found
    for node in graph.nodes:
        to = node.attrs.get("to") if node.op == "Cast" else None
        if to == _DOUBLE or (to is None and not found.isdisjoint(node.inputs)):
            found.update(node.outputs)
    return found


def _idle(node: Node, others: set[str], doubles: set[str]) -> bool:
    outputs = [o for o in node.outputs if o]
    if node.domain not in ("", "ai.onnx") or len(outputs) != 1:
        return False
    if node.op == "Dropout":
        return len(node.inputs) < 3
    if node.op == "Cast":
        to, source = node.attrs.get("to"), node.inputs[0]
        alike = not doubles or (to == _DOUBLE) == (source in doubles)
        return to in _FLOATS and source not in others and alike
    return node.op == "Identity"
