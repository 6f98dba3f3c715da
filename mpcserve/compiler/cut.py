"""A model without some of its nodes, for tools that would rewrite or cannot read them; and back.

What such a node computes becomes an input of the rest, what it reads an output.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx
from onnx import helper


def without(model: onnx.ModelProto, kept: Collection[str]) -> onnx.ModelProto:
    """The model without the nodes named in `kept`. Needs the types of all values."""
    if not kept:
        return model
    graph = model.graph
    types = {i.name: i.type for i in (*graph.value_info, *graph.input, *graph.output)}
    taken = [n for n in graph.node if n.name in kept]
    made = {o for n in taken for o in n.output if o}
    given = made | {i.name for i in graph.input} | {t.name for t in graph.initializer}
    wanted = [o.name for o in graph.output]
    wanted += [i for n in taken for i in n.input if i]
    rest = onnx.ModelProto()
    rest.CopyFrom(model)
    del rest.graph.node[:], rest.graph.output[:]
    rest.graph.node.extend(n for n in graph.node if n.name not in kept)
    rest.graph.input.extend(onnx.ValueInfoProto(name=m, type=types[m]) for m in sorted(made))
    rest.graph.output.extend(
        onnx.ValueInfoProto(name=w, type=types[w])
        for w in dict.fromkeys(wanted)
        if w not in given and w in types
    )
    return rest


def rejoined(
    rest: onnx.ModelProto, model: onnx.ModelProto, kept: Collection[str]
) -> onnx.ModelProto:
    """`rest`, as `without` made it or since rewritten, with the nodes of `model` put back."""
    if not kept:
        return rest
    nodes = [*rest.graph.node, *(n for n in model.graph.node if n.name in kept)]
    have = {t.name for t in rest.graph.initializer}
    used = {i for n in nodes for i in n.input} | {o.name for o in model.graph.output}
    tensors = [t for t in model.graph.initializer if t.name in used and t.name not in have]
    ready = have | {t.name for t in tensors} | {i.name for i in model.graph.input} | {""}
    graph = helper.make_graph(
        _sorted(nodes, ready),
        model.graph.name,
        list(model.graph.input),
        list(model.graph.output),
        [*rest.graph.initializer, *tensors],
    )
    result = onnx.ModelProto()
    result.CopyFrom(rest)
    result.graph.CopyFrom(graph)
    return result


def _sorted(nodes: list[onnx.NodeProto], ready: set[str]) -> list[onnx.NodeProto]:
    """In an order in which every value is made before it is read."""
    result: list[onnx.NodeProto] = []
    waiting = nodes
    while waiting:
        later = []
        for node in waiting:
            if ready.issuperset(_read(node)):
                ready.update(node.output)
                result.append(node)
            else:
                later.append(node)
        if len(later) == len(waiting):
            return [*result, *waiting]
        waiting = later
    return result


def _read(node: onnx.NodeProto) -> set[str]:
    """What a node reads from outside, in its subgraphs too."""
    names = set(node.input)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            inner = attribute.g
            own = {i.name for i in (*inner.input, *inner.initializer)}
            own |= {o for n in inner.node for o in n.output}
            names |= {i for n in inner.node for i in _read(n)} - own
    return names
