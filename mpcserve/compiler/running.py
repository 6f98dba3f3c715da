"""Float models are run by onnxruntime: to see ranges, and how far errors are felt."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from mpcserve.errors import ModelError

LARGE_BYTES = 1 << 30
"""From here on a model goes to onnxruntime by a file: protobufs end at 2 GiB."""

OLDEST_IR = 8
"""Older intermediate representations are read by every onnxruntime that we support."""


Apart = Mapping[str, NDArray[Any]]
NOTHING: Apart = MappingProxyType({})


class Runner(Protocol):
    """What runs a float model."""

    def run(self, names: Any, feed: Any, /) -> Any:
        """The named outputs."""


def runner(model: onnx.ModelProto, apart: Apart = NOTHING) -> Runner:
    """onnxruntime; where it lacks an operator or an opset, onnx's own slow reference.

    Raises: ModelError where neither knows the model.
    """
    try:
        found: Runner = session(model, apart)
    except ModelError as refused:
        from onnx.reference import ReferenceEvaluator

        for tensor in model.graph.initializer:
            if tensor.name in apart:
                tensor.CopyFrom(numpy_helper.from_array(apart[tensor.name], tensor.name))
        try:
            found = ReferenceEvaluator(model)
        except NotImplementedError:
            raise refused from None
    return found


def session(model: onnx.ModelProto, apart: Apart = NOTHING) -> ort.InferenceSession:
    """onnxruntime on a model as it is, on its own. Raises: ModelError when it cannot load it.

    `apart`: constants that the model only names; they are not copied, so keep them.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    values = [ort.OrtValue.ortvalue_from_numpy(v) for v in apart.values()]
    options.add_external_initializers(list(apart), values)
    size = sum(len(t.raw_data) for t in model.graph.initializer)
    with tempfile.TemporaryDirectory(prefix="mpcserve-") as folder:
        source: str | bytes
        if size < LARGE_BYTES:
            source = model.SerializeToString()
        else:
            source = str(Path(folder) / "model.onnx")
            onnx.save(model, source, save_as_external_data=True, location="data")
        try:
            return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as e:  # onnxruntime's own exception classes share no base
            reason = str(e).splitlines()[0].split(" : ")[-1]
            raise ModelError(
                f"onnxruntime cannot load the model: {reason}", "check it with onnx.checker"
            ) from None


def ran(run: Runner, names: Any, feed: Any) -> Any:
    """The named outputs. Raises: ModelError where the model itself fails on what it is fed."""
    try:
        # Overflow and division by zero are answers here; the reference would warn of them.
        with np.errstate(all="ignore"):
            return run.run(names, feed)
    except Exception as e:  # as in `session`
        reason = str(e).splitlines()[0].split(" : ")[-1] if str(e) else type(e).__name__
        raise ModelError(
            f"the model fails on a sample: {reason}", "try the samples in onnxruntime"
        ) from None


@cache
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


def readable(model: onnx.ModelProto) -> onnx.ModelProto:
    """Stamped with no newer intermediate representation than its opset needs."""
    needed = helper.find_min_ir_version_for(list(model.opset_import), ignore_unknown=True)
    model.ir_version = min(model.ir_version, max(needed, OLDEST_IR))
    return model
