"""ONNX → ONNX: operators of ai.onnx.ml written with standard ones, before anything else sees them.

    @rewrites("Scaler")
    def scaler(w: Writer, x: str, /, *, offset: Sequence[float] = (), ...) -> str: ...

Positional parameters are the node's inputs, keywords its attributes; the result is the name of each
output, or None for a node that is left to its lowering. What remains is `TreeEnsembleRegressor`,
`TreeEnsemble`, and `LabelEncoder` and `ArrayFeatureExtractor` of a computed label. Both models can
be run by onnxruntime, and tests compare them.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import onnx
from onnx import helper, numpy_helper

from mpcserve.compiler.graph import attributes_of
from mpcserve.compiler.load import opset_of
from mpcserve.compiler.problems import Problem, Unsupported

F = TypeVar("F", bound=Callable[..., Any])

ML = "ai.onnx.ml"

OLDEST = 3
"""The version that rewritten models have at least: its LabelEncoder takes numbers."""

_MARK = "__rewrites__"


def rewrites(*ops: str) -> Callable[[F], F]:
    """Mark a function as the translation of operators of ai.onnx.ml."""

    def mark(function: F) -> F:
        setattr(function, _MARK, ops)
        return function

    return mark


@dataclass
class Writer:
    """Collects the nodes and constants that take the place of one node.

    `opset`: of the standard operators. `types`: element types of inputs and constants. `makers`:
    name → the node that makes it, so far. `constants`: names of what depends on no input.
    """

    name: str
    opset: int
    types: Mapping[str, int]
    makers: Mapping[str, onnx.NodeProto]
    constants: Collection[str]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: list[onnx.TensorProto] = field(default_factory=list)

    def constant(self, values: Any, dtype: Any = np.float32) -> str:
        """A constant of the model."""
        name = f"{self.name}/constant_{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(np.array(values, dtype), name))
        return name

    def op(self, op: str, *inputs: str, domain: str = "", **attrs: Any) -> str:
        """A node of one output; the output's name."""
        name = f"{self.name}/{op}_{len(self.nodes)}"
        given = {
            k: numpy_helper.from_array(v) if isinstance(v, np.ndarray) else v
            for k, v in attrs.items()
            if v is not None
        }
        self.nodes.append(
            helper.make_node(op, inputs, [f"{name}:0"], name=name, domain=domain, **given)
        )
        return f"{name}:0"

    def floats(self, x: str) -> str:
        """x as float32."""
        return x if self.types.get(x) == onnx.TensorProto.FLOAT else self.cast(x, np.float32)

    def cast(self, x: str, dtype: Any) -> str:
        """x as another type."""
        return self.op("Cast", x, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        """x in another shape."""
        return self.op("Reshape", x, self.constant(shape, np.int64))

    def columns(self, x: str, begin: int, end: int) -> str:
        """Columns of a matrix."""
        ends = [self.constant([k], np.int64) for k in (begin, end, 1)]
        return self.op("Slice", x, *ends)

    def reduce(self, op: str, x: str, axis: int) -> str:
        """A reduction over one axis, which keeps length 1."""
        first = {"ReduceSum": 13}.get(op, 18)
        if self.opset < first:
            return self.op(op, x, axes=[axis], keepdims=1)
        return self.op(op, x, self.constant([axis], np.int64), keepdims=1)

    def maker(self, name: str) -> onnx.NodeProto | None:
        """The node of the model that makes `name`."""
        return self.makers.get(name)


Rewrite = Callable[..., Any]


def rewriters() -> Mapping[str, Rewrite]:
    """Operator → its marked function, of every module in this package."""
    from mpcserve.compiler import ml

    found: dict[str, Rewrite] = {}
    for info in pkgutil.iter_modules(ml.__path__):
        module = importlib.import_module(f"{ml.__name__}.{info.name}")
        for function in vars(module).values():
            if getattr(function, "__module__", "") == module.__name__:
                found |= dict.fromkeys(getattr(function, _MARK, ()), function)
    return found


def in_standard_operators(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[Problem]]:
    """(the model with every node of ai.onnx.ml rewritten that has a translation, what is wrong).

    A node that is refused stays.
    """
    if not any(n.domain == ML for n in model.graph.node):
        return model, []
    problems: list[Problem] = []
    known = rewriters()
    types = {i.name: i.type.tensor_type.elem_type for i in model.graph.input}
    types |= {t.name: t.data_type for t in model.graph.initializer}
    constants = {t.name for t in model.graph.initializer} | {""}
    makers: dict[str, onnx.NodeProto] = {}
    nodes: list[onnx.NodeProto] = []
    tensors: list[onnx.TensorProto] = []
    for node in model.graph.node:
        writer = Writer(node.name, opset_of(model), types, makers, constants)
        function = known.get(node.op_type) if node.domain == ML else None
        try:
            done = function is not None and _rewritten(writer, node, function)
        except Unsupported as e:
            problems.append(Problem(node.name, node.op_type, e.reason, e.hint))
            done = False
        nodes += writer.nodes if done else [node]
        tensors += writer.tensors if done else []
        makers |= dict.fromkeys(node.output, node)
        if constants.issuperset(node.input):
            constants.update(node.output)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    result.graph.initializer.extend(tensors)
    for opset in result.opset_import:
        if opset.domain == ML:
            opset.version = max(opset.version, OLDEST)
    return result, problems


def _rewritten(w: Writer, node: onnx.NodeProto, function: Rewrite) -> bool:
    attrs = attributes_of(node)
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not takes_all and (unknown := sorted(set(attrs) - set(parameters))):
        raise Unsupported(f"attribute {unknown[0]!r} is not supported")
    result = function(w, *node.input, **attrs)
    if result is None:
        return False
    results = result if isinstance(result, tuple) else (result,)
    for name, output in zip(results, node.output, strict=False):
        if output:
            w.nodes.append(
                helper.make_node("Identity", [name], [output], name=f"{node.name}/{output}")
            )
    return True
