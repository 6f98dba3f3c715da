"""The float graph between ONNX and the plan: nodes in topological order, constants as arrays.

Rules: every name is defined once, before it is used; constants hold no NaN, and −∞ only as masks;
all shapes are static; reals of 16 bits are held as float32. `to_onnx` writes the graph back, so
that any pass can be checked, and ranges can be measured, by running onnxruntime.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from mpcserve.compiler.dtypes import held

Shape = tuple[int, ...]

FUSED = "mpcserve.fused"
"""The domain of nodes that stand for several."""


@dataclass(frozen=True, slots=True)
class Node:
    """One operation. Missing optional inputs and outputs are empty names.

    `body`: what a node of the domain FUSED stands for, in order.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any]
    name: str
    domain: str = ""
    body: tuple[Node, ...] = ()

    def written(self) -> Iterator[Node]:
        """The node as ONNX knows it."""
        if not self.body:
            yield self
        for inner in self.body:
            yield from inner.written()


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or an output: `dtype` is NumPy's name of the element type.

    `reach`: the range of an input that follows from its use.
    """

    name: str
    dtype: str
    shape: Shape
    reach: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Graph:
    """A model with a fixed batch. `versions`: of the operators of other domains than ONNX's own."""

    name: str
    opset: int
    nodes: tuple[Node, ...]
    constants: Mapping[str, NDArray[Any]]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    shapes: Mapping[str, Shape]
    versions: Mapping[str, int] = field(default_factory=dict)

    def uses(self) -> dict[str, list[Node]]:
        """Name → nodes that read it, in order."""
        users: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in node.inputs:
                users.setdefault(name, []).append(node)
        return users

    def producers(self) -> dict[str, Node]:
        """Name → the node that defines it."""
        return {o: n for n in self.nodes for o in n.outputs if o}

    def with_nodes(self, nodes: list[Node], constants: Mapping[str, Any] | None = None) -> Graph:
        """The same model with other nodes; unused constants are dropped."""
        everything = dict(self.constants) | dict(constants or {})
        used = {i for n in nodes for w in (n, *n.written()) for i in w.inputs}
        used |= {o.name for o in self.outputs}
        kept = {k: v for k, v in everything.items() if k in used}
        return replace(self, nodes=tuple(nodes), constants=kept)


APART_BYTES = 1 << 20
"""A constant of so many bytes is worth the trouble of not writing it."""


def large_constants(graph: Graph, but: Collection[str] = ()) -> dict[str, NDArray[Any]]:
    """Those that a model need not hold to be run in this process, `but` some."""
    return {
        name: np.ascontiguousarray(value)
        for name, value in graph.constants.items()
        if value.nbytes >= APART_BYTES and value.dtype.kind == "f" and name not in but
    }


def to_onnx(
    graph: Graph, every_value: bool = False, apart: Collection[str] = ()
) -> onnx.ModelProto:
    """Write the graph as a model; with `every_value`, all intermediate tensors are outputs.

    Of constants that are kept `apart`, only name and type are written.
    """
    written = [w for n in graph.nodes for w in n.written()]
    outputs = [helper.make_tensor_value_info(o.name, _kind(o), o.shape) for o in graph.outputs]
    if every_value:
        known = {o.name for o in graph.outputs}
        names = [o for n in written for o in n.outputs if o and o not in known]
        outputs += [onnx.ValueInfoProto(name=name) for name in names]
    inputs = [helper.make_tensor_value_info(i.name, _kind(i), i.shape) for i in graph.inputs]
    nodes = [
        helper.make_node(
            n.op, n.inputs, n.outputs, name=n.name, domain=n.domain, **_protos(n.attrs)
        )
        for n in written
    ]
    constants = [
        _unwritten(k, v) if k in apart else numpy_helper.from_array(np.asarray(v), k)
        for k, v in graph.constants.items()
    ]
    proto = helper.make_graph(nodes, graph.name, inputs, outputs, constants)
    opsets = [helper.make_opsetid("", graph.opset)]
    opsets += [helper.make_opsetid(*version) for version in graph.versions.items()]
    ir_version = max(helper.find_min_ir_version_for(opsets, ignore_unknown=True), 8)
    return helper.make_model(proto, opset_imports=opsets, ir_version=ir_version)


def _unwritten(name: str, value: NDArray[Any]) -> onnx.TensorProto:
    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
    tensor = onnx.TensorProto(name=name, dims=value.shape, data_type=kind)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=name)
    return tensor


def static_shape(kind: onnx.TypeProto) -> Shape | None:
    """The shape of a tensor type, or None where any axis is unknown."""
    if not kind.tensor_type.HasField("shape"):
        return None
    dims = kind.tensor_type.shape.dim
    return tuple(d.dim_value for d in dims) if all(d.HasField("dim_value") for d in dims) else None


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """Attributes as Python values: text decoded, tensors as arrays."""
    return {a.name: _plain(helper.get_attribute_value(a)) for a in node.attribute}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return value


def _kind(tensor: Tensor) -> int:
    """The element type in which a graph computes: 16-bit reals are held as float32."""
    return int(helper.np_dtype_to_tensor_dtype(held(np.zeros(0, tensor.dtype)).dtype))


def _protos(attrs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        k: numpy_helper.from_array(v) if isinstance(v, np.ndarray) else v
        for k, v in attrs.items()
        if not isinstance(v, tuple) or v
    }
