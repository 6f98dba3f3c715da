"""Operators that ONNX defines as functions of others are expanded with ONNX's own definition.

Only where no lowering exists, and only where the body leads to operators that have one: a node that
stays is reported under its own name.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import onnx
from onnx import defs, helper

from mpcserve.compiler.load import opset_of
from mpcserve.compiler.registry import Registry
from mpcserve.compiler.survey import secret_nodes

_DEEPEST = 4
"""Function bodies may use functions; ONNX nests them by three."""


def expanded(
    model: onnx.ModelProto, registry: Registry, held: Collection[str] = ()
) -> onnx.ModelProto:
    """The model with such nodes replaced. Needs the types of all values (`inferred`)."""
    opset = opset_of(model)
    types = {i.name: i.type for i in (*model.graph.value_info, *model.graph.input)}
    for t in model.graph.initializer:
        types[t.name] = helper.make_tensor_type_proto(t.data_type, list(t.dims))
    secret = {n.name for n in secret_nodes(model.graph, held)}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        body = None
        if node.name in secret and registry.find(node.op_type, opset, node.domain) is None:
            body = _body(node, opset, types, registry, _DEEPEST)
        nodes += [node] if body is None else body
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return result


def kept_functions(
    model: onnx.ModelProto, registry: Registry, held: Collection[str] = ()
) -> set[str]:
    """Names of the nodes that ONNX defines as functions, yet are lowered as they are."""
    opset = opset_of(model)
    return {
        n.name
        for n in secret_nodes(model.graph, held)
        if registry.find(n.op_type, opset, n.domain) is not None and _is_function(n.op_type, opset)
    }


def _is_function(op: str, opset: int) -> bool:
    if not defs.has(op):
        return False
    schema: Any = defs.get_schema(op, opset, "")
    return bool(schema.has_function or schema.has_context_dependent_function)


def _body(
    node: onnx.NodeProto,
    opset: int,
    types: dict[str, onnx.TypeProto],
    registry: Registry,
    depth: int,
) -> list[onnx.NodeProto] | None:
    """The nodes that take the place of `node`; None if they need an unsupported operator."""
    function = _function(node, opset, types)
    if function is None or depth == 0:
        return None
    body = _instantiated(function, node)
    inner = helper.make_graph(body, "body", [], [])
    inner.input.extend(onnx.ValueInfoProto(name=i) for i in node.input if i)
    secret = {n.name for n in secret_nodes(inner)}
    result: list[onnx.NodeProto] = []
    for step in body:
        if step.name not in secret or registry.find(step.op_type, opset, step.domain) is not None:
            result.append(step)
            continue
        deeper = _body(step, opset, types, registry, depth - 1)
        if deeper is None:
            return None
        result += deeper
    return result


def _function(
    node: onnx.NodeProto, opset: int, types: dict[str, onnx.TypeProto]
) -> onnx.FunctionProto | None:
    if node.domain not in ("", "ai.onnx") or not defs.has(node.op_type):
        return None
    try:
        schema: Any = defs.get_schema(node.op_type, opset, "")
    except defs.SchemaError:
        return None
    if schema.has_function:
        return cast(onnx.FunctionProto, schema.function_body)
    if not schema.has_context_dependent_function:
        return None
    inputs = [types.get(i, onnx.TypeProto()).SerializeToString() for i in node.input]
    data = schema.get_context_dependent_function(node.SerializeToString(), inputs)
    function = onnx.FunctionProto()
    function.ParseFromString(data)
    return function if function.node else None


def _instantiated(function: onnx.FunctionProto, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The body with the node's names and attributes."""
    names = dict.fromkeys(function.input, "") | dict(zip(function.input, node.input, strict=False))
    names |= dict(zip(function.output, node.output, strict=False))
    attributes = {a.name: a for a in function.attribute_proto}
    if defs.has(node.op_type):
        schema = defs.get_schema(node.op_type)
        defaults = {k: a.default_value for k, a in schema.attributes.items()}
        attributes |= {k: v for k, v in defaults.items() if v.name}
    attributes |= {a.name: a for a in node.attribute}
    body = []
    for position, inner in enumerate(function.node):
        step = onnx.NodeProto(op_type=inner.op_type, domain=inner.domain)
        step.name = f"{node.name}/{inner.op_type}_{position}"
        step.input.extend(_renamed(i, names, node) for i in inner.input)
        step.output.extend(_renamed(o, names, node) for o in inner.output)
        for a in inner.attribute:
            if not a.ref_attr_name:
                step.attribute.append(a)
            elif a.ref_attr_name in attributes:
                value = onnx.AttributeProto()
                value.CopyFrom(attributes[a.ref_attr_name])
                value.name = a.name
                step.attribute.append(value)
        body.append(step)
    return body


def _renamed(name: str, names: dict[str, str], node: onnx.NodeProto) -> str:
    return names.get(name, f"{node.name}/{name}" if name else "")
