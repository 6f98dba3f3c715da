"""A model as the peers run it: a list of steps and their weights in one .npz.

BatchNormalization is folded into the convolutions by onnxruntime, as their users would do.
Members: `program` (JSON: steps and names), the weights, `input/…`, and `expected`, the output in
float by onnxruntime.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from benchmarks.rows import Row

PLAIN = ("MatMul", "Relu", "Add", "GlobalAveragePool", "Flatten", "Softmax", "Gelu")
"""Operators without attributes that matter."""


class Unsupported(Exception):
    """The model has an operator that the peers' scripts do not know."""


def write_program(row: Row, model: Path, path: Path) -> None:
    """Write the program of `model`, a batch and its float output. Raises: Unsupported."""
    folded, expected = _folded(model, row)
    weights = {t.name: numpy_helper.to_array(t) for t in folded.graph.initializer}
    steps = [_step(node, weights) for node in folded.graph.node]
    inputs = row.inputs(folded)
    program = {"steps": steps, "inputs": list(inputs), "output": folded.graph.output[0].name}
    np.savez(
        path,
        program=np.array(json.dumps(program)),
        expected=expected,
        **{f"weight/{name}": weights[name] for s in steps for name in s["weights"]},
        **{f"input/{name}": x for name, x in inputs.items()},
    )


def _folded(model: Path, row: Row) -> tuple[onnx.ModelProto, NDArray[Any]]:
    """The model after onnxruntime's basic optimisations, and its output."""
    with TemporaryDirectory(prefix="mpcserve-fold-") as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(Path(folder) / "folded.onnx")
        session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        folded = onnx.load(options.optimized_model_filepath)
        return folded, np.asarray(session.run(None, row.inputs(folded))[0])


def _step(node: onnx.NodeProto, weights: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """{op, inputs, weights, output, …}: a Gemm's weight as [inputs, outputs], symmetric pads."""
    at = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    step: dict[str, Any] = {
        "op": node.op_type,
        "inputs": [n for n in node.input if n not in weights],
        "weights": [n for n in node.input if n in weights],
        "output": node.output[0],
    }
    if node.op_type == "Gemm":
        if at.get("transB", 0):
            name = f"{node.input[1]}/transposed"
            weights[name] = np.ascontiguousarray(weights[node.input[1]].T)
            step["weights"][0] = name
    elif node.op_type in ("Conv", "MaxPool"):
        pads = at.get("pads", [0] * 4)
        if len(set(pads)) > 1 or at.get("group", 1) != 1 or at.get("ceil_mode", 0):
            raise Unsupported(f"{node.op_type} with {at} is not in the peers' scripts")
        step |= {"pad": pads[0], "stride": list(at.get("strides", [1, 1]))}
        step["kernel"] = list(at.get("kernel_shape", ()))
    elif node.op_type == "Reshape":
        step |= {"weights": [], "shape": weights[node.input[1]].tolist()}
    elif node.op_type == "Mul" and step["weights"] and weights[step["weights"][0]].size == 1:
        step |= {"weights": [], "factor": float(weights[step["weights"][0]])}
    elif node.op_type == "Transpose":
        step["perm"] = at["perm"]
    elif node.op_type == "LayerNormalization":
        step["epsilon"] = at.get("epsilon", 1e-5)
    elif node.op_type not in PLAIN:
        raise Unsupported(f"{node.op_type} is not in the peers' scripts")
    if node.op_type in ("Softmax", "LayerNormalization") and at.get("axis", -1) != -1:
        raise Unsupported(f"{node.op_type} along axis {at['axis']} is not in the peers' scripts")
    return step
