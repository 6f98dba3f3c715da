"""Relu → MaxPool becomes MaxPool → Relu: the same value, only the winners are compared with 0."""

from __future__ import annotations

from dataclasses import replace

from mpcserve.compiler.graph import Graph, Node

_POOLS = ("MaxPool", "GlobalMaxPool")


def relu_after_maxpool(graph: Graph) -> Graph:
    """max(relu(x)) = relu(max(x)): relu is monotone. Only where nothing else reads relu(x)."""
    users = graph.uses()
    outputs = {o.name for o in graph.outputs}
    swaps: dict[str, Node] = {}
    for node in graph.nodes:
        if node.op != "Relu" or node.domain or node.outputs[0] in outputs:
            continue
        readers = users.get(node.outputs[0], [])
        if len(readers) == 1 and readers[0].op in _POOLS and len(readers[0].outputs) == 1:
            swaps[readers[0].name] = node
    relus = {n.name for n in swaps.values()}
    nodes: list[Node] = []
    shapes = dict(graph.shapes)
    for node in graph.nodes:
        if node.name in relus:
            continue
        if node.name not in swaps:
            nodes.append(node)
            continue
        relu, between = swaps[node.name], f"{node.outputs[0]}/before_relu"
        shapes[between] = shapes[node.outputs[0]]
        nodes.append(replace(node, inputs=relu.inputs, outputs=(between,)))
        nodes.append(replace(relu, inputs=(between,), outputs=node.outputs))
    return replace(graph.with_nodes(nodes), shapes=shapes)
