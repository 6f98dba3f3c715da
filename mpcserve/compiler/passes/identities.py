"""Identity, Dropout at inference and casts between floats do nothing: their readers read on."""

from __future__ import annotations

from dataclasses import replace

from mpcserve.compiler.graph import Graph, Node

_FLOATS = (1, 10, 11, 16)
"""TensorProto's float, float16, double, bfloat16."""


def remove_identities(graph: Graph) -> Graph:
    """Same function, fewer nodes. A node that names an output of the model stays."""
    kept = {o.name for o in graph.outputs}
    instead: dict[str, str] = {}
    nodes = []
    for node in graph.nodes:
        node = replace(node, inputs=tuple(instead.get(i, i) for i in node.inputs))
        if _idle(node) and node.outputs[0] not in kept:
            instead[node.outputs[0]] = node.inputs[0]
        else:
            nodes.append(node)
    return graph.with_nodes(nodes)


def _idle(node: Node) -> bool:
    outputs = [o for o in node.outputs if o]
    if node.domain not in ("", "ai.onnx") or len(outputs) != 1:
        return False
    if node.op == "Dropout":
        return len(node.inputs) < 3
    return node.op == "Identity" or (node.op == "Cast" and node.attrs.get("to") in _FLOATS)
