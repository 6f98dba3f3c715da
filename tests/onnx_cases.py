"""Small ONNX models and one way to hold a compiled plan against onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from mpcserve.compiler import CompiledModel, compile_model
from mpcserve.plan import Plan, verify_plan
from tests.plan_interpreter import Interpreter

Array = Any
NEWEST = onnx.defs.onnx_opset_version()


def rng_of(seed: int) -> np.random.Generator:
    """A printed seed, so that a failure can be run again."""
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int | str]],
    constants: Mapping[str, Array] | None = None,
    outputs: Sequence[str] = ("y",),
    opset: int = NEWEST,
    kind: int = onnx.TensorProto.FLOAT,
) -> onnx.ModelProto:
    """A model; Python floats in `constants` become float32, integers int64."""
    tensors = [numpy_helper.from_array(_typed(v), k) for k, v in (constants or {}).items()]
    ins = [helper.make_tensor_value_info(k, kind, list(v)) for k, v in inputs.items()]
    outs = [helper.make_tensor_value_info(o, kind, None) for o in outputs]
    graph = helper.make_graph(list(nodes), "small", ins, outs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def node(op: str, inputs: Sequence[str], outputs: Sequence[str] = ("y",), **attrs: Any) -> Any:
    """One node; named after its operator and first output."""
    return helper.make_node(op, inputs, outputs, name=f"{op}:{outputs[0]}", **attrs)


def plain(model: onnx.ModelProto, *inputs: Array) -> list[Array]:
    """onnxruntime's own answer."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    run = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    feed = {i.name: x for i, x in zip(run.get_inputs(), inputs, strict=True)}
    return list(run.run(None, feed))


def agree(
    model: onnx.ModelProto,
    inputs: Sequence[Array],
    *,
    ulps: float,
    rng: np.random.Generator | None = None,
    **options: Any,
) -> CompiledModel:
    """Compile, run on integers with the protocol's rounding, compare with onnxruntime.

    `ulps`: largest error allowed, in units of 2^-frac_bits; 0 asks for equality. The inputs are
    rounded to the plan's grid first, so that only the computation errs. Fraction bits are the same
    everywhere, as a number of ulps means little else.
    """
    options = {"input_range": (-8.0, 8.0), "ring": 64} | options
    compiled = compile_model(model, **options)
    verify_plan(compiled.plan)
    grid = [on_grid(compiled.plan, k, x) for k, x in enumerate(inputs)]
    outputs = Interpreter(compiled.plan, compiled.weights, rng).run(*grid)
    for got, expected in zip(outputs, plain(model, *grid), strict=True):
        assert got.shape == expected.shape
        assert got.dtype == expected.dtype
        error = np.abs(got.astype(np.float64) - expected).max(initial=0.0)
        limit = ulps * 2.0 ** -options.get("frac_bits", 16)
        assert error <= limit, f"error {error / 2.0**-16:.2f} ulp, allowed {ulps}"
    return compiled


def on_grid(plan: Plan, index: int, x: Array) -> Array:
    """x as the client encodes it."""
    frac_bits = plan.value(plan.inputs[index].id).frac_bits
    rounded = np.ldexp(np.rint(np.ldexp(np.asarray(x, np.float64), frac_bits)), -frac_bits)
    return np.asarray(rounded, x.dtype)


def ops_of(plan: Plan) -> list[str]:
    """The instructions, sources left out; what is rectified is compared and selected at once."""
    ops: list[str] = []
    for i in plan.instructions:
        if i.op not in ("input", "weight", "constant"):
            ops += ["sign", "select"] if i.op == "rectify" else [i.op]
    return ops


def _typed(value: Array) -> Array:
    array = np.asarray(value)
    if array.dtype == np.float64:
        return array.astype(np.float32)
    return array
