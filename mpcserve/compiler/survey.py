"""What can be said of a model before any of it is run: inputs, numbers, operators."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import numpy as np
import onnx
from onnx import helper

from mpcserve.compiler.dtypes import is_supported
from mpcserve.compiler.graph import Graph, Node
from mpcserve.compiler.load import OLDEST_OPSET, opset_of
from mpcserve.compiler.problems import Problem
from mpcserve.compiler.registry import Registry
from mpcserve.compiler.unknown import unknown_op

_SHAPE_ONLY = frozenset({"Shape", "Size"})
"""Operators whose result depends on a shape alone: constants once shapes are fixed."""

_FIRST_ONLY = frozenset({"CastLike"})
"""Operators that read only the type of their other inputs."""


_VANISHING = frozenset({"IsNaN", "Where"})
"""Operators that passes may take away: guards and masks of attention."""


def other_opset(model: onnx.ModelProto) -> list[Problem]:
    """A problem where the model, converted if that can be, is in an opset without lowerings."""
    opset, newest = opset_of(model), onnx.defs.onnx_opset_version()
    if opset > newest:
        reason = (
            f"opset {opset} is newer than {newest}, the newest that onnx {onnx.__version__} has"
        )
        return [Problem("", "", reason, f"export the model with opset {newest}, or update onnx")]
    if opset >= OLDEST_OPSET:
        return []
    reason = f"opset {opset} is older than {OLDEST_OPSET}, and cannot be converted"
    return [Problem("", "", reason, f"export the model with opset {OLDEST_OPSET} or newer")]


def secret_nodes(graph: onnx.GraphProto, held: Collection[str] = ()) -> list[onnx.NodeProto]:
    """Nodes whose result depends on an input's values, in order; inputs in `held` are weights."""
    constants = {t.name for t in graph.initializer} | set(held)
    secret = {i.name for i in graph.input if i.name not in constants}
    found = []
    for node in graph.node:
        read = node.input[:1] if node.op_type in _FIRST_ONLY else node.input
        inputs = {*read, *captured(node)}
        if node.op_type not in _SHAPE_ONLY and inputs & secret:
            secret.update(node.output)
            found.append(node)
    return found


Lengths = Mapping[str, tuple[int, ...]]
"""Shapes of the samples of each input, "" where there is one array."""


def fix_lengths(model: onnx.ModelProto, batch: int, lengths: Lengths) -> list[Problem]:
    """Write the batch into the inputs' shapes, in place, and into other axes what samples have.

    Dynamic axes of which samples tell nothing are problems.
    """
    graph = model.graph
    constants = {t.name for t in graph.initializer}
    inputs = [i for i in graph.input if i.name not in constants]
    problems: list[Problem] = []
    leading = [d for i in inputs for d in i.type.tensor_type.shape.dim[:1] if d.dim_value < 1]
    symbols = {d.dim_param for d in leading if d.dim_param}
    named: dict[str, int] = {}
    for i in inputs:
        sample = lengths.get(i.name, lengths.get("", ()))
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
            elif axis < len(sample) and named.get(d.dim_param, sample[axis]) == sample[axis]:
                if d.dim_param:
                    named[d.dim_param] = sample[axis]
                d.dim_value = sample[axis]
            elif d.HasField("dim_value"):
                problems.append(_empty(i.name, axis))
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


def _empty(name: str, axis: int) -> Problem:
    return Problem(
        f"input {name!r}",
        "",
        f"axis {axis} has length 0: it holds no elements",
        "export it with the length that it has, or with a name for one that samples tell",
    )


def _dynamic(name: str, axis: int, symbol: str) -> Problem:
    called = f" ({symbol!r})" if symbol else ""
    return Problem(
        f"input {name!r}",
        "",
        f"axis {axis}{called} has no fixed length",
        "only the batch may vary; calibrate with samples of one length, or export it fixed",
    )


def types_of(graph: onnx.GraphProto) -> Iterator[Problem]:
    """Inputs whose elements are neither numbers nor text."""
    for i in graph.input:
        if i.type.tensor_type.elem_type == onnx.TensorProto.STRING:
            continue
        dtype = str(helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type))
        if not is_supported(dtype):
            hint = "export the model with floating-point inputs"
            yield Problem(f"input {i.name!r}", "", f"has elements of type {dtype}", hint)


def numbers_of(graph: Graph) -> Iterator[Problem]:
    """Constants that are no numbers, at the first node that reads them. −∞ may be a mask."""
    told: set[str] = set()
    for node in graph.nodes:
        for name in node.inputs:
            array = graph.constants.get(name)
            if array is None or array.dtype.kind != "f" or name in told:
                continue
            if bad := int(array.size - np.count_nonzero(array < np.inf)):
                told.add(name)
                reason = f"constant {name!r} holds {bad} numbers that are NaN or infinite"
                hint = "train or export the model again"
                yield Problem(node.name, node.op, reason, hint)


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


def captured(node: onnx.NodeProto) -> set[str]:
    """Names that a node's subgraphs read."""
    return {
        name
        for attribute in node.attribute
        if attribute.type == onnx.AttributeProto.GRAPH
        for inner in attribute.g.node
        for name in (*inner.input, *captured(inner))
    }
