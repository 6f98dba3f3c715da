"""What can be said of a model before any of it is run: inputs, numbers, operators."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.external_data_helper import uses_external_data

from mpcserve.compiler.dtypes import is_supported
from mpcserve.compiler.graph import Node
from mpcserve.compiler.load import OLDEST_OPSET, opset_of, tensors_of
from mpcserve.compiler.lower import unknown_op
from mpcserve.compiler.problems import Problem
from mpcserve.compiler.registry import Registry

_SHAPE_ONLY = frozenset({"Shape", "Size"})
"""Operators whose result depends on a shape alone: constants once shapes are fixed."""

_FIRST_ONLY = frozenset({"CastLike"})
"""Operators that read only the type of their other inputs."""


_MASKING = frozenset(
    {"Add", "Attention", "Concat", "Expand", "Gather", "Mul", "Reshape", "Slice", "Trilu"}
    | {"Unsqueeze", "Where"}
)
"""Operators of which −∞ may be a constant: it hides scores from a softmax."""


_VANISHING = frozenset({"IsNaN", "Where"})
"""Operators that passes may take away: guards and masks of attention."""

_SETS = "attribute 'membership_values'"
"""Sets that trees ask for: a NaN ends each."""


def survey(model: onnx.ModelProto) -> list[Problem]:
    """Everything that is wrong with the model's numbers and types."""
    opset = opset_of(model)
    if opset < OLDEST_OPSET:
        reason = f"opset {opset} is older than {OLDEST_OPSET}"
        return [Problem("", "", reason, f"export the model with opset {OLDEST_OPSET} or newer")]
    return [*_types(model.graph), *_numbers(model.graph)]


def secret_nodes(graph: onnx.GraphProto, held: Collection[str] = ()) -> list[onnx.NodeProto]:
    """Nodes whose result depends on an input's values, in order; inputs in `held` are weights."""
    constants = {t.name for t in graph.initializer} | set(held)
    secret = {i.name for i in graph.input if i.name not in constants}
    found = []
    for node in graph.node:
        read = node.input[:1] if node.op_type in _FIRST_ONLY else node.input
        inputs = {*read, *_captured(node)}
        if node.op_type not in _SHAPE_ONLY and inputs & secret:
            secret.update(node.output)
            found.append(node)
    return found


def fix_batch(model: onnx.ModelProto, batch: int) -> list[Problem]:
    """Write the batch into the inputs' shapes, in place; other dynamic axes are problems."""
    graph = model.graph
    constants = {t.name for t in graph.initializer}
    inputs = [i for i in graph.input if i.name not in constants]
    problems: list[Problem] = []
    leading = [d for i in inputs for d in i.type.tensor_type.shape.dim[:1] if d.dim_value < 1]
    symbols = {d.dim_param for d in leading if d.dim_param}
    for i in inputs:
        if not i.type.HasField("tensor_type") or not i.type.tensor_type.HasField("shape"):
            problems.append(
                Problem(f"input {i.name!r}", "", "has no shape", "export it with a shape")
            )
            continue
        for axis, d in enumerate(i.type.tensor_type.shape.dim):
            if d.dim_value > 0:
                if axis == 0 and not leading and batch not in (1, d.dim_value):
                    problems.append(_fixed(i.name, d.dim_value, batch))
            elif axis == 0 or d.dim_param in symbols:
                d.dim_value = batch
            else:
                problems.append(_dynamic(i.name, axis, d.dim_param))
    return problems


def _fixed(name: str, size: int, batch: int) -> Problem:
    return Problem(
        f"input {name!r}",
        "",
        f"has a fixed batch of {size}, expected {batch}",
        "export it with a symbolic batch, or leave --batch out",
    )


def _dynamic(name: str, axis: int, symbol: str) -> Problem:
    called = f" ({symbol!r})" if symbol else ""
    return Problem(
        f"input {name!r}",
        "",
        f"axis {axis}{called} has no fixed length",
        "only the batch may vary; export the model with this length fixed",
    )


def _types(graph: onnx.GraphProto) -> Iterator[Problem]:
    for i in graph.input:
        dtype = str(helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type))
        if not is_supported(dtype):
            hint = "export the model with floating-point inputs"
            yield Problem(f"input {i.name!r}", "", f"has elements of type {dtype}", hint)


def _numbers(graph: onnx.GraphProto) -> Iterator[Problem]:
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    called = {
        f"attribute {a.name!r} of node {n.name!r}": n.output[0]
        for n in graph.node
        if n.op_type == "Constant"
        for a in n.attribute
    }
    for holder, tensor in tensors_of(graph):
        if uses_external_data(tensor) or holder.startswith(_SETS):
            continue
        array = numpy_helper.to_array(tensor)
        if not np.issubdtype(array.dtype, np.inexact):
            continue
        found = readers.get(called.get(holder, tensor.name), [])
        masks = bool(found) and all(n.op_type in _MASKING for n in found)
        allowed = np.isfinite(array) | (np.isneginf(array) if masks else False)
        if bad := int(array.size - np.count_nonzero(allowed)):
            where = (found[0].name, found[0].op_type) if found else ("", "")
            reason = f"{holder} holds {bad} numbers that are NaN or infinite"
            yield Problem(*where, reason, "train or export the model again")


def unknown_operators(
    model: onnx.ModelProto, registry: Registry, held: Collection[str] = ()
) -> Iterator[Problem]:
    """Nodes that depend on an input and have no lowering."""
    opset = opset_of(model)
    for node in secret_nodes(model.graph, held):
        if node.op_type in _VANISHING and node.domain in ("", "ai.onnx"):
            continue  # if it does not, lowering says so
        if registry.find(node.op_type, opset, node.domain) is None:
            plain = Node(node.op_type, (), (), {}, node.name, node.domain)
            yield unknown_op(plain, opset, registry)


def _captured(node: onnx.NodeProto) -> set[str]:
    """Names that a node's subgraphs read."""
    return {
        name
        for attribute in node.attribute
        if attribute.type == onnx.AttributeProto.GRAPH
        for inner in attribute.g.node
        for name in (*inner.input, *_captured(inner))
    }
