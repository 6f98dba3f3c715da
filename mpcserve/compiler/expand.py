"""Operators that ONNX defines as functions of others: the definition, for one node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import defs


@dataclass(frozen=True, slots=True)
class Body:
    """Nodes that compute `outputs` from `inputs`; attributes are filled in, names are their own."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[onnx.NodeProto, ...]


def body_of(
    node: onnx.NodeProto, opsets: Mapping[str, int], types: Mapping[str, onnx.TypeProto]
) -> Body | None:
    """ONNX's own definition in the model's opset; None if there is none."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    opset = opsets.get(domain, 1)
    if not defs.has(node.op_type, domain):
        return None
    try:
        schema: Any = defs.get_schema(node.op_type, opset, domain)
    except defs.SchemaError:
        return None
    function = _function(schema, opset, node, types)
    if function is None:
        return None
    attributes = {k: a.default_value for k, a in schema.attributes.items() if a.default_value.name}
    attributes |= {a.name: a for a in function.attribute_proto}
    attributes |= {a.name: a for a in node.attribute}
    nodes = [_instantiated(step, attributes, k) for k, step in enumerate(function.node)]
    return Body(tuple(function.input), tuple(function.output), tuple(nodes))


def _function(
    schema: Any, opset: int, node: onnx.NodeProto, types: Mapping[str, onnx.TypeProto]
) -> onnx.FunctionProto | None:
    """The newest definition that is not newer than the model."""
    data = b""
    if older := [v for v in schema.function_opset_versions if v <= opset]:
        data = schema.get_function_with_opset_version(max(older))
    elif older := [v for v in schema.context_dependent_function_opset_versions if v <= opset]:
        inputs = [types.get(i, onnx.TypeProto()).SerializeToString() for i in node.input]
        data = schema.get_context_dependent_function_with_opset_version(
            max(older), node.SerializeToString(), inputs
        )
    function = onnx.FunctionProto()
    function.ParseFromString(data)
    return function if function.node else None


def _instantiated(
    step: onnx.NodeProto, attributes: Mapping[str, onnx.AttributeProto], position: int
) -> onnx.NodeProto:
    """A step of a definition with the node's attributes; those that it leaves out stay out."""
    own = onnx.NodeProto()
    own.CopyFrom(step)
    own.name = step.name or f"{step.op_type}_{position}"
    del own.attribute[:]
    for a in step.attribute:
        if a.ref_attr_name and a.ref_attr_name not in attributes:
            continue
        value = onnx.AttributeProto()
        value.CopyFrom(attributes[a.ref_attr_name] if a.ref_attr_name else a)
        value.name = a.name
        if value.type == onnx.AttributeProto.GRAPH:
            steps = [_instantiated(s, attributes, k) for k, s in enumerate(value.g.node)]
            del value.g.node[:]
            value.g.node.extend(steps)
        own.attribute.append(value)
    return own
