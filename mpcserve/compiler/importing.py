"""ONNX → graph: conversion, shapes and folding are done by onnx and onnxruntime themselves."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, inliner, numpy_helper, shape_inference, version_converter

from mpcserve.compiler.cut import rejoined, without
from mpcserve.compiler.graph import Graph, Node, graph_of
from mpcserve.compiler.load import opset_of
from mpcserve.compiler.survey import secret_nodes
from mpcserve.errors import ModelError

LARGE_BYTES = 1 << 30
"""From here on a model is too large for the tools of onnx, whose protobufs end at 2 GiB: its large
weights are set aside while they work, and go to onnxruntime by a file."""

HELD_BYTES = 1 << 16
"""Weights from this size on are set aside in a large model; shapes and axes are smaller."""

OLDEST_IR = 8
"""Older intermediate representations are read by every onnxruntime that we support."""

_DISABLED = ["MatMulAddFusion"]
"""It would rename nodes and reshape batches; a bias after a MatMul is taken in by `fold_affine`."""


def named(model: onnx.ModelProto) -> onnx.ModelProto:
    """Local functions inlined, initialisers no longer inputs, every node with a name of its own.

    One version of each domain; no ZipMap: probabilities stay a matrix.
    """
    if model.functions:
        model = inliner.inline_local_functions(model)
    versions = {o.domain: o.version for o in model.opset_import}
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(d, v) for d, v in versions.items())
    _drop_zipmaps(model.graph)
    constants = {t.name for t in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in constants]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    taken: set[str] = set()
    for position, node in enumerate(model.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.name or node.op_type}_{position}"
        taken.add(node.name)
    return model


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
    """(model, weights set aside). In a large model these become inputs until `restored`."""
    tensors = model.graph.initializer
    if sum(len(t.raw_data) for t in tensors) < LARGE_BYTES:
        return model, []
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
    if opset_of(model) == target:
        return model
    try:
        result: onnx.ModelProto = version_converter.convert_version(model, target)
        onnx.checker.check_model(result)
    except (RuntimeError, onnx.checker.ValidationError, version_converter.ConvertError):
        return model
    return result


def readable(model: onnx.ModelProto) -> onnx.ModelProto:
    """Stamped with no newer intermediate representation than its opset needs."""
    needed = helper.find_min_ir_version_for(list(model.opset_import), ignore_unknown=True)
    model.ir_version = min(model.ir_version, max(needed, OLDEST_IR))
    return model


def newest_opset() -> int:
    """The newest opset that onnx writes and onnxruntime reads."""
    info = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "probe", [info], [out])
    for opset in range(onnx.defs.onnx_opset_version(), 7, -1):
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
        try:
            session(readable(model))
        except ModelError:
            continue
        return opset
    raise ModelError("onnx and onnxruntime share no opset", "install matching versions of the two")


def session(model: onnx.ModelProto, optimized: Path | None = None) -> ort.InferenceSession:
    """onnxruntime on a model; with `optimized`, its basic optimisation is written there."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = (
        level.ORT_ENABLE_BASIC if optimized else level.ORT_DISABLE_ALL
    )
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    size = sum(len(t.raw_data) for t in model.graph.initializer)
    with tempfile.TemporaryDirectory(prefix="mpcserve-") as folder:
        source: str | bytes
        if size < LARGE_BYTES:
            source = model.SerializeToString()
        else:
            source = str(Path(folder) / "model.onnx")
            onnx.save(model, source, save_as_external_data=True, location="data")
        return _opened(source, options, None if optimized is None else _DISABLED)


def _opened(
    source: str | bytes, options: ort.SessionOptions, disabled: list[str] | None
) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(
            source, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
        )
    except Exception as e:  # onnxruntime's own exception classes share no base
        reason = str(e).splitlines()[0].split(" : ")[-1]
        kind = (
            Unimplemented if reason.startswith("Could not find an implementation") else ModelError
        )
        raise kind(
            f"onnxruntime cannot load the model: {reason}", "check it with onnx.checker"
        ) from None


class Unimplemented(ModelError):
    """A valid model with an operator, or a version of one, that onnxruntime has no kernel for."""


class Runner(Protocol):
    """What runs a float model."""

    def run(self, names: Any, feed: Any, /) -> Any:
        """The named outputs."""


def runner(model: onnx.ModelProto) -> Runner:
    """onnxruntime; where it lacks an operator, onnx's own slow reference. Raises: ModelError."""
    try:
        found: Runner = session(model)
    except Unimplemented:
        from onnx.reference import ReferenceEvaluator

        found = ReferenceEvaluator(model)
    return found


def folded(model: onnx.ModelProto, kept: Collection[str] = ()) -> onnx.ModelProto:
    """Constants and Conv/BatchNormalization folded, shapes everywhere.

    Nodes named in `kept` stay as they are: onnxruntime would write functions out.
    """
    model = inferred(model)
    cut = without(model, kept)
    if not cut.graph.node or not cut.graph.output:
        return model
    with tempfile.TemporaryDirectory(prefix="mpcserve-") as folder:
        path = Path(folder) / "optimized.onnx"
        try:
            session(cut, path)
        except Unimplemented:
            return model
        optimized = onnx.load(path)
    return inferred(rejoined(optimized, model, kept))


def inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """All shapes anew from the inputs'. Raises: ModelError when they contradict each other."""
    del model.graph.value_info[:]
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    try:
        return shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except (shape_inference.InferenceError, RuntimeError) as e:
        reason = _plain(str(e))
        raise ModelError(f"shapes do not fit: {reason}", "export the model again") from None


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


def folded_graph(model: onnx.ModelProto, name: str) -> Graph:
    """The graph of a folded model; constant nodes that are left are computed here."""
    graph = graph_of(named(model), name)
    infos = (*model.graph.value_info, *model.graph.output)
    types = {i.name: i.type.tensor_type.elem_type for i in infos}
    secret = {n.name for n in secret_nodes(model.graph)}
    constants: dict[str, Any] = dict(graph.constants)
    nodes = []
    for node in graph.nodes:
        if all(0 in graph.shapes.get(o, ()) for o in node.outputs if o):
            for o in filter(None, node.outputs):
                dtype = helper.tensor_dtype_to_np_dtype(types[o])
                constants[o] = np.zeros(graph.shapes[o], dtype)
        elif node.name in secret:
            nodes.append(node)
        else:
            constants.update(_evaluated(node, constants, graph))
    return graph.with_nodes(nodes, constants)


def _evaluated(node: Node, constants: dict[str, Any], graph: Graph) -> dict[str, Any]:
    """A constant node's outputs."""
    if node.op in ("Shape", "Size") and node.inputs[0] not in constants:
        shape = np.array(graph.shapes[node.inputs[0]], np.int64)
        start, end = node.attrs.get("start", 0), node.attrs.get("end")
        value = shape[start:end] if node.op == "Shape" else np.prod(shape)
        return {node.outputs[0]: np.asarray(value, np.int64)}
    from onnx.reference import ReferenceEvaluator

    inputs = [helper.make_value_info(i, onnx.TypeProto()) for i in node.inputs if i]
    outputs = [helper.make_value_info(o, onnx.TypeProto()) for o in node.outputs if o]
    attrs = {
        k: numpy_helper.from_array(v) if isinstance(v, np.ndarray) else v
        for k, v in node.attrs.items()
    }
    proto = helper.make_node(
        node.op, node.inputs, node.outputs, node.name, domain=node.domain, **attrs
    )
    model = helper.make_model(
        helper.make_graph([proto], "constant", inputs, outputs),
        opset_imports=[helper.make_opsetid(node.domain, graph.opset)],
    )
    values = ReferenceEvaluator(model).run(None, {i: constants[i] for i in node.inputs if i})
    return dict(zip([o for o in node.outputs if o], values, strict=True))
