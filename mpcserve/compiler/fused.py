"""Nodes that stand for several: found by passes, lowered as one, written to ONNX as what they were.

A fused node has the domain FUSED and keeps the nodes it replaced as its `body`. What is inside is
read by nobody else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mpcserve.compiler.graph import FUSED, Graph, Node

__all__ = ["FUSED", "Fusion", "Inside", "fuse"]


@dataclass(frozen=True, slots=True)
class Fusion:
    """`inside` becomes one node `op` that makes what the last of them makes."""

    op: str
    inputs: tuple[str, ...]
    inside: tuple[Node, ...]
    attrs: Mapping[str, Any]
    constants: Mapping[str, Any]


class Inside:
    """Who reads what: whether nodes can vanish inside of one."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.makers = graph.producers()
        self._readers = {k: {n.name for n in v} for k, v in graph.uses().items()}
        self._outputs = {o.name for o in graph.outputs}

    def maker(self, name: str, op: str | None = None) -> Node | None:
        """The node that makes a value, if it is an `op`."""
        node = self.makers.get(name)
        return node if node is not None and op in (None, node.op) and not node.domain else None

    def scalar(self, name: str) -> float | None:
        """A constant of one number."""
        value = self.graph.constants.get(name)
        return float(value.ravel()[0]) if value is not None and value.size == 1 else None

    def closed(self, nodes: Collection[Node]) -> bool:
        """Whether only `nodes` read what they make, but for the last one's result."""
        names = {n.name for n in nodes}
        *inner, _ = nodes
        return all(
            o not in self._outputs and self._readers.get(o, set()) <= names
            for n in inner
            for o in n.outputs
            if o
        )


def fuse(graph: Graph, found: Collection[Fusion]) -> Graph:
    """The graph with each fusion as one node, where its last node stood."""
    if not found:
        return graph
    last = {f.inside[-1].name: f for f in found}
    gone = {n.name for f in found for n in f.inside}
    nodes: list[Node] = []
    constants: dict[str, Any] = {}
    for node in graph.nodes:
        if node.name not in gone:
            nodes.append(node)
        elif (f := last.get(node.name)) is not None:
            body = tuple(replace(n, body=()) if not n.body else n for n in f.inside)
            nodes.append(Node(f.op, f.inputs, node.outputs, f.attrs, node.name, FUSED, body))
            constants |= f.constants
    return graph.with_nodes(nodes, constants)
