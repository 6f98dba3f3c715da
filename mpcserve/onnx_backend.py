"""mpcserve as an ONNX backend: any model, run by the real three-role protocol in this process.

    from mpcserve import onnx_backend
    onnx_backend.prepare(model).run([x])

Secret: every floating-point input, except where it is a parameter of its operators (`PARAMETERS`).
Public: integers, booleans and parameters; they are constants of the model that is compiled, which
therefore happens when the inputs are known. An output that depends on no secret is returned as it
was computed when compiling; all others are results of the protocol.

The plan is made for a range of each secret input. A backend is given the input itself, so unless
`input_range` is given the range is that of the input, rounded outward to powers of two.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import frexp
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.backend.base import Backend, BackendRep, namedtupledict

from mpcserve.compiler.artifact import CompiledModel
from mpcserve.compiler.check import import_model
from mpcserve.compiler.pipeline import Options, compile_graph, sound_graph
from mpcserve.compiler.registry import registry
from mpcserve.errors import InputError
from mpcserve.plan.bill import Bill
from mpcserve.protocol.together import simulate

Array = NDArray[Any]

FLOATS = ("float16", "bfloat16", "float32", "float64")
"""Element types of what is secret."""

PARAMETERS: Mapping[str, frozenset[int]] = {
    "AffineGrid": frozenset({1}),
    "Clip": frozenset({1, 2}),
    "DeformConv": frozenset({2}),
    "Dropout": frozenset({1}),
    "GridSample": frozenset({1}),
    "MelWeightMatrix": frozenset({3, 4}),
    "Mod": frozenset({1}),
    "NonMaxSuppression": frozenset({3, 4}),
    "OneHot": frozenset({1, 2}),
    "Pad": frozenset({2}),
    "Pow": frozenset({1}),
    "Range": frozenset({0, 1, 2}),
    "Resize": frozenset({1, 2}),
    "RoiAlign": frozenset({1}),
    "STFT": frozenset({2}),
    "Upsample": frozenset({1}),
}
"""Operator → inputs that are parameters: where to look, how far, with which bounds; never data."""


class MpcBackend(Backend):
    """`onnx.backend.base.Backend` over the protocol of alice, bob and carol."""

    @classmethod
    def is_compatible(cls, model: onnx.ModelProto, device: str = "CPU", **options: Any) -> bool:
        """Whether `device` is one; whether the model compiles is known when it is run."""
        return cls.supports_device(device)

    @classmethod
    def prepare(
        cls,
        model: onnx.ModelProto,
        device: str = "CPU",
        public: Collection[str] = (),
        **options: Any,
    ) -> SecretModel:
        """The model, ready to be given inputs.

        `public`: names of inputs that are parameters, though no operator of the model says so.
        `options`: those of `compiler.pipeline.Options`.
        """
        if not cls.supports_device(device):
            raise InputError(f"device {device!r} is not supported", "use CPU")
        return SecretModel(model, Options(**options), public)

    @classmethod
    def run_model(
        cls, model: onnx.ModelProto, inputs: Any, device: str = "CPU", **options: Any
    ) -> tuple[Any, ...]:
        """Outputs of the model."""
        return cls.prepare(model, device, **options).run(inputs)

    @classmethod
    def run_node(
        cls,
        node: onnx.NodeProto,
        inputs: Any,
        device: str = "CPU",
        outputs_info: Sequence[tuple[Any, tuple[int, ...]]] | None = None,
        **options: Any,
    ) -> tuple[Any, ...]:
        """Outputs of one node, in the newest opset unless `opset_version` is given."""
        opset = options.pop("opset_version", onnx.defs.onnx_opset_version())
        feed = _by_name(list(dict.fromkeys(i for i in node.input if i)), inputs)
        ins = [_info(name, value) for name, value in feed.items()]
        outs = [onnx.ValueInfoProto(name=o) for o in node.output if o]
        graph = helper.make_graph([node], node.op_type, ins, outs)
        opsets = [helper.make_opsetid(node.domain, opset)]
        model = onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=opsets))
        return cls.run_model(model, list(feed.values()), device, **options)

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """Only CPU is."""
        return device == "CPU"


@dataclass(frozen=True, slots=True)
class _Ready:
    """A model specialised to public inputs: `fixed` are outputs that depend on no secret.

    `outputs`: the type of each in the model's order.
    """

    compiled: CompiledModel | None
    secret: tuple[str, ...]
    outputs: Mapping[str, np.dtype[Any]]
    fixed: Mapping[str, Array]


class SecretModel(BackendRep):
    """A model that is run on secret inputs. `bill` is what the last run took."""

    def __init__(
        self, model: onnx.ModelProto, options: Options, public: Collection[str] = ()
    ) -> None:
        constants = {t.name for t in model.graph.initializer}
        self.model, self.options = model, options
        self.inputs = [i.name for i in model.graph.input if i.name not in constants]
        self.bill: Bill | None = None
        self._parameters = parameters_of(model.graph) | set(public)
        self._ready: dict[bytes, _Ready] = {}

    def run(self, inputs: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Outputs in the model's order. `inputs`: in the model's order, or name → array."""
        feed = _by_name(self.inputs, inputs)
        ready = self.specialised(feed)
        values = dict(ready.fixed)
        if ready.compiled is not None:
            plan = ready.compiled.plan
            values |= plan.client.run({i.name: feed[i.name] for i in plan.raw_inputs})
            arrays = [values[spec.name] for spec in plan.inputs]
            results, self.bill = simulate(plan, ready.compiled.weights, arrays)
            values |= {o.name: x for o, x in zip(plan.outputs, results, strict=True)}
        result: tuple[Any, ...] = namedtupledict("Outputs", list(ready.outputs))(
            *(values[name].astype(dtype) for name, dtype in ready.outputs.items())
        )
        return result

    def specialised(self, feed: Mapping[str, Array]) -> _Ready:
        """The plan for these public inputs and for the ranges of these secret ones."""
        secret = {k: x for k, x in feed.items() if self._is_secret(k, x)}
        ranges = self.options.input_range or {k: outward(k, x) for k, x in secret.items()}
        key = repr((ranges, [(k, x.shape, str(x.dtype)) for k, x in secret.items()])).encode()
        key += b"".join(x.tobytes() for k, x in feed.items() if k not in secret)
        if key not in self._ready:
            model = bound_to(self.model, feed, set(secret))
            self._ready[key] = _compiled(model, replace(self.options, input_range=ranges))
        return self._ready[key]

    def _is_secret(self, name: str, x: Array) -> bool:
        return str(x.dtype) in FLOATS and x.size > 0 and name not in self._parameters


def parameters_of(graph: onnx.GraphProto) -> set[str]:
    """Inputs of a model that are read as parameters only."""
    reads: dict[str, list[bool]] = {}
    for node in graph.node:
        for position, name in enumerate(node.input):
            public = position in PARAMETERS.get(node.op_type, ())
            reads.setdefault(name, []).append(public)
    return {name for name, public in reads.items() if all(public)}


def bound_to(
    model: onnx.ModelProto, feed: Mapping[str, Array], secret: set[str]
) -> onnx.ModelProto:
    """The model with public inputs as constants and secret ones in the shapes of their values."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    constants = {t.name for t in graph.initializer}
    kept = [_info(i.name, feed[i.name]) for i in graph.input if i.name in secret]
    kept += [i for i in graph.input if i.name in constants]
    del graph.input[:]
    graph.input.extend(kept)
    public = [numpy_helper.from_array(x, k) for k, x in feed.items() if k not in secret]
    graph.initializer.extend(public)
    return result


def outward(name: str, x: Array) -> tuple[float, float]:
    """The range of an input, its ends moved outward to powers of two. Raises: InputError."""
    if not np.isfinite(x.astype(np.float64)).all():
        raise InputError(f"input {name!r} is not finite", "replace NaN and infinity")
    low, high = _down(float(x.min())), -_down(-float(x.max()))
    if low < high:
        return low, high
    return (low / 2, high * 2) if low > 0 else (low * 2, high / 2) if low < 0 else (-1.0, 1.0)


def _down(x: float) -> float:
    """The greatest of 0 and ±2^k that is no greater than x."""
    mantissa, exponent = frexp(abs(x))
    if x < 0:
        return -(2.0 ** (exponent - 1 if mantissa == 0.5 else exponent))
    return 2.0 ** (exponent - 1) if x else 0.0


def _compiled(model: onnx.ModelProto, options: Options) -> _Ready:
    """Compile what depends on a secret; compute the rest. Raises: ModelError."""
    kinds = {o.name: o.type.tensor_type.elem_type for o in model.graph.output}
    names = {k: np.dtype(helper.tensor_dtype_to_np_dtype(v)) for k, v in kinds.items()}
    found = registry()
    imported = import_model(model, 1, found, options.disclose)
    graph = sound_graph(imported, found)
    fixed = {o.name: graph.constants[o.name] for o in graph.outputs if o.name in graph.constants}
    outputs = tuple(o for o in graph.outputs if o.name not in fixed)
    secret = tuple(i.name for i in graph.inputs)
    if not outputs:
        return _Ready(None, secret, names, fixed)
    rest = replace(graph, outputs=outputs)
    compiled = compile_graph(rest, imported.name, imported, found, options)
    return _Ready(compiled, secret, names, fixed)


def _by_name(names: Sequence[str], inputs: Any) -> dict[str, Array]:
    """Name → array. Raises: InputError."""
    if isinstance(inputs, Mapping):
        given = dict(inputs)
    else:
        listed = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
        if len(listed) != len(names):
            raise InputError(f"expected {len(names)} inputs, got {len(listed)}", "give one each")
        given = dict(zip(names, listed, strict=True))
    if set(given) != set(names):
        raise InputError(f"expected inputs {', '.join(names)}, got {', '.join(given)}")
    if any(isinstance(x, list | tuple | dict) or x is None for x in given.values()):
        raise InputError("sequences, maps and optionals are not supported", "give arrays")
    return {name: np.asarray(given[name]) for name in names}


def _info(name: str, x: Array) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)


prepare = MpcBackend.prepare
run_model = MpcBackend.run_model
run_node = MpcBackend.run_node
supports_device = MpcBackend.supports_device
