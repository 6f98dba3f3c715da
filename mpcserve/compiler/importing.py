"""ONNX → graph: checking and conversion are onnx's own; what is public is computed on the way."""

from __future__ import annotations

import re

import numpy as np
import onnx
from onnx import helper, inliner, numpy_helper, shape_inference, version_converter

from mpcserve.compiler.graph import Graph, Tensor, attributes_of, static_shape
from mpcserve.compiler.load import opset_of
from mpcserve.compiler.registry import Registry
from mpcserve.compiler.running import newest_opset
from mpcserve.compiler.unfold import Scope, Unfolding
from mpcserve.errors import ModelError

HELD_BYTES = 1 << 16
"""Weights from this size on are set aside while the tools of onnx work on a model: they would only
be copied, and a protobuf ends at 2 GiB. Shapes and axes are smaller."""


CONSTANTS_ARE_NO_INPUTS = 4
"""From this intermediate representation on, initialisers need not be inputs."""


def named(model: onnx.ModelProto) -> onnx.ModelProto:
    """Local functions inlined, initialisers no longer inputs, every node with a name of its own.

    One version of each domain; no ZipMap: probabilities stay a matrix.
    """
    if model.functions:
        model = inliner.inline_local_functions(model)
    versions = {"": newest_opset()} if not opset_of(model) else {}
    versions |= {o.domain: o.version for o in model.opset_import}
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(d, v) for d, v in versions.items())
    _drop_zipmaps(model.graph)
    constants = {t.name for t in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in constants]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.ir_version = max(model.ir_version, CONSTANTS_ARE_NO_INPUTS)
    taken: set[str] = set()
    for position, node in enumerate(model.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.name or node.op_type}_{position}"
        taken.add(node.name)
        _write_defaults(node, model)
    return model


def _write_defaults(node: onnx.NodeProto, model: onnx.ModelProto) -> None:
    """Attributes that a function's body refers to: onnx itself wants them there."""
    if node.domain or node.op_type != "MeanVarianceNormalization" or node.attribute:
        return
    schema = onnx.defs.get_schema(node.op_type, opset_of(model), "")
    node.attribute.append(schema.attributes["axes"].default_value)


def zipped(graph: onnx.GraphProto) -> dict[str, tuple[str, ...] | tuple[int, ...]]:
    """Output that a ZipMap makes → its classes, one a column."""
    found: dict[str, tuple[str, ...] | tuple[int, ...]] = {}
    for node in graph.node:
        if node.op_type == "ZipMap":
            attrs = attributes_of(node)
            numbers = tuple(map(int, attrs.get("classlabels_int64s", ())))
            found[node.output[0]] = tuple(attrs.get("classlabels_strings", ())) or numbers
    return found


def _drop_zipmaps(graph: onnx.GraphProto) -> None:
    """Outputs that name each probability by its class become the matrix of probabilities."""
    zipped = {n.output[0]: n for n in graph.node if n.op_type == "ZipMap"}
    for output in graph.output:
        if output.name in zipped:
            zipmap = zipped[output.name]
            kind = helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, None)
            output.type.CopyFrom(kind)
            identity = helper.make_node("Identity", zipmap.input, zipmap.output, zipmap.name)
            zipmap.CopyFrom(identity)


def lightened(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[onnx.TensorProto]]:
    """(model, weights set aside). These are inputs until `restored`."""
    tensors = model.graph.initializer
    held = [t for t in tensors if len(t.raw_data) >= HELD_BYTES]
    names = {t.name for t in held}
    light = onnx.ModelProto()
    light.ir_version, light.graph.name = model.ir_version, model.graph.name
    light.opset_import.extend(model.opset_import)
    light.graph.node.extend(model.graph.node)
    light.graph.input.extend(model.graph.input)
    light.graph.output.extend(model.graph.output)
    light.graph.initializer.extend(t for t in tensors if t.name not in names)
    for t in held:
        info = helper.make_tensor_value_info(t.name, t.data_type, list(t.dims))
        light.graph.input.append(info)
    return light, held


def restored(model: onnx.ModelProto, held: list[onnx.TensorProto]) -> onnx.ModelProto:
    """The weights that were set aside are constants again."""
    names = {t.name for t in held}
    inputs = [i for i in model.graph.input if i.name not in names]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.graph.initializer.extend(held)
    return model


def converted(model: onnx.ModelProto) -> onnx.ModelProto:
    """In the newest opset that onnx and onnxruntime share; unchanged where there is no way."""
    target = newest_opset()
    if opset_of(model) < 7:
        _slopes_by_channel(model)
    if opset_of(model) == target or _has_old_scan(model):
        return model
    try:
        result: onnx.ModelProto = version_converter.convert_version(model, target)
        onnx.checker.check_model(result)
    except (RuntimeError, onnx.checker.ValidationError, version_converter.ConvertError):
        return model
    return result


def _slopes_by_channel(model: onnx.ModelProto) -> None:
    """Until opset 6 a row of slopes of PRelu is one a channel; broadcasting reads it otherwise."""
    graph = shape_inference.infer_shapes(model).graph
    shapes = {i.name: static_shape(i.type) for i in (*graph.input, *graph.value_info)}
    shapes |= {t.name: tuple(t.dims) for t in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        x, slope = (shapes.get(i) for i in (*node.input, "", "")[:2])
        if node.op_type == "PRelu" and x and slope and len(slope) == 1 and slope[0] > 1:
            name = f"{node.name}/slope"
            shape = np.array([-1, *[1] * (len(x) - 2)], np.int64)
            model.graph.initializer.append(numpy_helper.from_array(shape, f"{name}/shape"))
            inputs = [node.input[1], f"{name}/shape"]
            nodes.append(helper.make_node("Reshape", inputs, [name], f"{name}/reshape"))
            node.input[1] = name
        nodes.append(node)
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _has_old_scan(model: onnx.ModelProto) -> bool:
    """Whether a Scan has a batch, which conversion would drop."""
    return opset_of(model) < 9 and any(n.op_type == "Scan" for n in model.graph.node)


def checked(model: onnx.ModelProto) -> None:
    """onnx's own checker. Raises: ModelError."""
    for output in model.graph.output:
        # The checker insists on some shape; the true one is inferred later.
        if not output.type.tensor_type.HasField("shape"):
            output.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as e:
        raise ModelError(f"not a valid model: {_plain(str(e))}", "export the model again") from None


def _plain(message: str) -> str:
    """onnx's message on one line, without its own tags."""
    message = re.sub(r"\[\w+\] |Inference error\(s\): |==>.*", "", message)
    return " ".join(message.split()).rstrip(".")


def unfolded(
    model: onnx.ModelProto, held: list[onnx.TensorProto], name: str, found: Registry
) -> tuple[Graph, Unfolding]:
    """(what is left of a model when all that is public is computed, how it came about)."""
    opsets = {"" if o.domain == "ai.onnx" else o.domain: o.version for o in model.opset_import}
    u = Unfolding(found, opsets)
    weights = {t.name for t in held}
    given = [i for i in model.graph.input if i.name not in weights]
    scope = Scope({i.name: u.secret(i.name, i.type) for i in given})
    u.weights(held, scope)
    outputs = []
    for info, value in zip(model.graph.output, u.graph(model.graph, scope), strict=True):
        if u.is_known(value):
            u.called(info.name, value)
            outputs.append(_tensor(info, u.types.get(value, info.type)))
    inputs = [_tensor(i, i.type) for i in given]
    shapes = {k: s for k, t in u.types.items() if (s := static_shape(t)) is not None}
    domains = {n.domain for n in u.nodes} - {""}
    versions = {d: v for d, v in opsets.items() if d in domains}
    graph = Graph(
        name, opsets.get("", 1), (), u.constants, tuple(inputs), tuple(outputs), shapes, versions
    )
    return graph.with_nodes(u.nodes), u


def _tensor(info: onnx.ValueInfoProto, kind: onnx.TypeProto) -> Tensor:
    """`info` says the element type, `kind` the shape. bfloat16, which NumPy lacks, is float32."""
    given = info.type.tensor_type.elem_type or kind.tensor_type.elem_type
    dtype = str(np.dtype(helper.tensor_dtype_to_np_dtype(given)))
    return Tensor(info.name, "float32" if dtype == "bfloat16" else dtype, static_shape(kind) or ())
