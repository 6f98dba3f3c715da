"""A model run on what is public: the nodes that are left compute on secrets.

Every node is visited once, in order, with the types of its operands and the values of those that
are constant. What depends on no input's values is computed; an `If` whose condition is known
becomes the branch it takes, a `Loop` or `Scan` as many copies of its body as it has turns; what has
no lowering but a definition by other operators becomes that definition. Shapes are known on the
way, so nothing has to be inferred twice. Reals of 16 bits are held as float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import defs, helper, numpy_helper, shape_inference

from mpcserve.compiler import control
from mpcserve.compiler.constants import evaluated, hollow
from mpcserve.compiler.contrib import contrib_body
from mpcserve.compiler.dtypes import held
from mpcserve.compiler.expand import Body, body_of
from mpcserve.compiler.graph import Node, Shape, attributes_of, static_shape
from mpcserve.compiler.problems import Problem, Unsupported
from mpcserve.compiler.registry import Registry
from mpcserve.compiler.signs import extreme, is_wild, side_of, side_of_constant
from mpcserve.compiler.unknown import REASONS

Array = NDArray[Any]

INFERRED_ELEMENTS = 1 << 12
"""Constants up to this size are shown to shape inference; those that give shapes are small."""

MOST_NODES = 1 << 16
"""More would take minutes to compile: a loop of thousands of turns."""

_HELD: Mapping[int, int] = {
    int(onnx.TensorProto.FLOAT16): int(onnx.TensorProto.FLOAT),
    int(onnx.TensorProto.BFLOAT16): int(onnx.TensorProto.FLOAT),
}
"""Element types that are held as others."""

_OF_SHAPE = frozenset({"EyeLike", "Shape", "Size"})
"""Operators whose result depends on a shape alone."""

_RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform"}
    | {"RandomUniformLike"}
)


@dataclass(frozen=True, slots=True)
class Scope:
    """Where a graph's own names lead: to `values` of the unfolded graph.

    What it defines is called as in `names`, or by its own name behind `prefix`.
    """

    values: dict[str, str]
    prefix: str = ""
    names: Mapping[str, str] = field(default_factory=dict)

    def inside(self, prefix: str, names: Mapping[str, str] | None = None) -> Scope:
        """The scope of a subgraph, which sees all that is seen here."""
        return Scope(dict(self.values), prefix, names or {})


class _NoRule(Exception):
    """A definition needs `op`, which has no lowering, or has none as it is used there."""

    def __init__(self, op: str) -> None:
        super().__init__(op)
        self.op = op


class Unfolding:
    """What is left of a model: `nodes` on secrets, `constants`, and the `types` of all values.

    `public`: names of nodes whose results are all constants.
    """

    def __init__(self, registry: Registry, opsets: Mapping[str, int]) -> None:
        self.registry, self.opsets = registry, dict(opsets)
        self.nodes: list[Node] = []
        self.constants: dict[str, Array] = {}
        self.types: dict[str, onnx.TypeProto] = {}
        self.problems: list[Problem] = []
        self.public: set[str] = set()
        self._broken: set[str] = set()
        self._sides: dict[str, int] = {}
        self._wild: set[str] = set()
        self._trials = 0
        self._imports = [helper.make_opsetid(d, v) for d, v in opsets.items()]

    def secret(self, name: str, kind: onnx.TypeProto) -> str:
        """An input of the model; its name."""
        self.types[name] = _held_type(kind)
        return name

    def constant(self, name: str, value: Any) -> str:
        """A public value under a name; the name."""
        array = held(np.asarray(value))
        self.constants[name] = array
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        self.types[name] = helper.make_tensor_type_proto(kind, array.shape)
        return name

    def weights(self, tensors: Iterable[onnx.TensorProto], scope: Scope) -> None:
        """Constants of a graph."""
        for tensor in tensors:
            name = self.fresh(scope.prefix + tensor.name)
            scope.values[tensor.name] = self.constant(name, numpy_helper.to_array(tensor))

    def called(self, name: str, value: str) -> None:
        """The value under another name too: an output of the model must have its own."""
        if name == value:
            return
        if value in self.constants:
            self.constant(name, self.constants[value])
            return
        self.types[name] = self.types.get(value, onnx.TypeProto())
        self.nodes.append(Node("Identity", (value,), (name,), {}, self.fresh(f"{name}/result")))

    def is_known(self, name: str) -> bool:
        """Whether nothing that the value rests on was refused."""
        return name not in self._broken

    def fresh(self, name: str) -> str:
        """The name, or one like it that is not taken."""
        while name in self.types or name in self._broken:
            name += "'"
        return name

    def shape(self, name: str) -> Shape | None:
        """The shape of a value, if all of it is known."""
        return static_shape(self.types[name]) if name in self.types else None

    def make(self, op: str, inputs: Sequence[str], output: str, /, **attrs: Any) -> str:
        """One more node on values of the unfolded graph; the name of its result."""
        scope = Scope({i: i for i in inputs})
        self.node(helper.make_node(op, inputs, [output], output, **attrs), scope)
        return scope.values[output]

    def graph(self, graph: onnx.GraphProto, scope: Scope) -> list[str]:
        """A graph whose inputs are in scope → its outputs."""
        self.weights(graph.initializer, scope)
        for node in graph.node:
            self.node(node, scope)
        return [scope.values[o.name] for o in graph.output]

    def node(self, node: onnx.NodeProto, scope: Scope) -> None:
        """One node: computed, unrolled, replaced by its definition, or kept."""
        name = scope.prefix + (node.name or next(filter(None, node.output), node.op_type))
        if len(self.nodes) > MOST_NODES:
            raise Unsupported(f"more than {MOST_NODES} nodes", "run fewer turns of its loops")
        before = len(self.nodes)
        try:
            if any(scope.values[i] in self._broken for i in _read(node, scope)):
                self._break(node, scope)
                return
            self._visit(node, scope, name)
        except Unsupported as e:
            if self._trials:
                raise _NoRule(node.op_type) from None
            self.problems.append(Problem(name, node.op_type, e.reason, e.hint))
            self._break(node, scope)
        if len(self.nodes) == before:
            self.public.add(name)

    def _visit(self, node: onnx.NodeProto, scope: Scope, name: str) -> None:
        standard = node.domain in ("", "ai.onnx")
        if standard and node.op_type in control.UNROLLED:
            names = [self._name(o, scope) for o in node.output]
            found = control.UNROLLED[node.op_type](self, node, scope, name, names)
            _define(scope, node.output, found)
            return
        own = self._renamed(node, scope, name)
        rule = self.registry.find(own.op_type, self.opsets.get("", 1), own.domain)
        if standard and own.op_type in _RANDOM:
            raise Unsupported("draws random numbers", "give them to the model as an input")
        body = None if rule else contrib_body(own)
        if body is None and self._computed(own):
            _define(scope, node.output, own.output)
            return
        if (same := self._passed(own)) is not None:
            _define(scope, node.output, [same])
            return
        body = body or (None if rule else body_of(own, self.opsets, self.types))
        outputs = None if body is None else self._defined(own, body)
        if outputs is None:
            if rule is None and self._trials:
                raise _NoRule(own.op_type)
            self._keep(own)
        _define(scope, node.output, own.output if outputs is None else outputs)

    def _computed(self, node: onnx.NodeProto) -> bool:
        """Whether the results are public; then they are constants now."""
        if self._never(node):
            for output, kind in self._inferred(node).items():
                self.constant(output, np.zeros(static_shape(kind) or (), bool))
            return True
        if (element := self._wherever(node)) is not None:
            for output, kind in self._inferred(node).items():
                self.constant(output, np.full(static_shape(kind) or (), element))
            return True
        bound = extreme(node, self.constants, self._sides)
        if bound is None and self._vanishes(node):
            bound = np.zeros((), self._dtype(node))
        if bound is not None:
            for output, kind in self._inferred(node).items():
                if (shape := static_shape(kind)) is None:
                    return False
                self.constant(output, np.broadcast_to(bound, shape).copy())
            return True
        feed = {i: self.constants[i] for i in node.input if i in self.constants}
        if node.op_type in _OF_SHAPE:
            shape = self.shape(node.input[0])
            feed = {} if shape is None else {node.input[0]: hollow(shape, self._dtype(node))}
        elif node.op_type == "CastLike" and node.input[1] not in feed:
            feed[node.input[1]] = hollow((), self._dtype(node, 1))
        if any(i not in feed for i in node.input if i):
            return False
        for output, value in evaluated(node, feed, self.opsets).items():
            self.constant(output, value)
        return True

    def _never(self, node: onnx.NodeProto) -> bool:
        """Whether the node is false of any secret: infinite, no number, or one and more besides."""
        if node.domain or any(self.shape(i) is None for i in node.input):
            return False
        known = [self.constants[i] for i in node.input if i in self.constants]
        if node.op_type == "And":
            return any(not k.any() for k in known)
        if not self._wild.isdisjoint(node.input):
            return False  # samples are run in floats, where it may be true
        if node.op_type in ("IsNaN", "IsInf"):
            return node.input[0] not in self.constants
        return node.op_type == "Equal" and len(known) == 1 and not np.isfinite(known[0]).any()

    def _vanishes(self, node: onnx.NodeProto) -> bool:
        """Whether it multiplies whole numbers, of which none is NaN, by zeros."""
        if node.op_type != "Mul" or node.domain or self._dtype(node).kind not in "iu":
            return False
        known = (self.constants.get(i) for i in node.input)
        return any(x is not None and not x.any() for x in known)

    def _wherever(self, node: onnx.NodeProto) -> Any:
        """What a secret index finds in whole numbers that are all the same; else None.

        Of reals, which may be weights, the plan must not tell it.
        """
        if node.domain or node.op_type not in ("Gather", "GatherElements", "GatherND"):
            return None
        table = self.constants.get(node.input[0])
        indices = self.shape(node.input[1])
        if table is None or table.dtype.kind not in "iu" or not table.size or indices is None:
            return None
        if node.input[1] in self.constants:
            return None
        first = table.reshape(-1)[0]
        return first if (table == first).all() else None

    def _passed(self, node: onnx.NodeProto) -> str | None:
        """The input that is the result, element by element."""
        first = str(node.input[0]) if node.input else ""
        if node.op_type == "OptionalGetElement" and not node.domain:
            return first
        if node.op_type != "Where" or node.domain or first not in self.constants:
            return None
        condition = self.constants[first]
        if not condition.size or condition.all() != condition.any():
            return None
        side = str(node.input[1 if condition.all() else 2])
        shapes = [self.shape(i) for i in node.input]
        if None in shapes:
            return None
        whole = np.broadcast_shapes(*(s for s in shapes if s is not None))
        return side if self.shape(side) == whole else None

    def _defined(self, node: onnx.NodeProto, body: Body) -> list[str] | None:
        """Results of the definition in the node's place; None if it needs what has no lowering."""
        nodes, values, constants = len(self.nodes), len(self.types), len(self.constants)
        given = [*node.input, *[""] * (len(body.inputs) - len(node.input))]
        names = {k: v for k, v in zip(body.outputs, node.output, strict=False) if v}
        scope = Scope(dict(zip(body.inputs, given, strict=True)), f"{node.name}/", names)
        self._trials += 1
        try:
            for step in body.nodes:
                self.node(step, scope)
        except _NoRule:
            del self.nodes[nodes:]
            _shorten(self.types, values)
            _shorten(self.constants, constants)
            return None
        finally:
            self._trials -= 1
        return [scope.values.get(o, "") for o in body.outputs]

    def _keep(self, node: onnx.NodeProto) -> None:
        """A node on secrets."""
        if node.op_type == "Concat" and not node.domain:
            full = [i for i in node.input if 0 not in (self.shape(i) or ())]
            del node.input[:]
            node.input.extend(full)
        if node.op_type == "Div" and not node.domain and self._dtype(node).kind in "iu":
            way = "cast to float, divide, and take the Floor of what is positive"
            raise Unsupported("divides secret whole numbers, which drops the remainder", way)
        outputs = list(node.output)
        for name, kind in self._inferred(node).items():
            self.types[name] = _held_type(kind)
        for position, name in enumerate(outputs):
            shape = self.shape(name)
            if shape is not None and (0 in shape or _is_mask(node, position)):
                # Without elements there is no secret; and in a Dropout at rest all stay.
                self.constant(name, np.ones(shape, self._dtype_of(name)))
                outputs[position] = ""
        self._note_side(node)
        if any(outputs) or not node.output:
            attrs = attributes_of(node)
            if node.op_type == "Cast" and not node.domain:
                attrs["to"] = _HELD.get(attrs["to"], attrs["to"])
            self.nodes.append(
                Node(node.op_type, tuple(node.input), tuple(outputs), attrs, node.name, node.domain)
            )

    def _inferred(self, node: onnx.NodeProto) -> Mapping[str, onnx.TypeProto]:
        """Types of the results. Raises: Unsupported when shapes contradict each other."""
        domain = "" if node.domain == "ai.onnx" else node.domain
        if not defs.has(node.op_type, domain):
            return {}
        schema = defs.get_schema(node.op_type, self.opsets.get(domain, 1), domain)
        types = {i: self.types.get(i, onnx.TypeProto()) for i in node.input if i}
        small = {
            i: numpy_helper.from_array(self.constants[i], i)
            for i in node.input
            if i in self.constants and self.constants[i].size <= INFERRED_ELEMENTS
        }
        try:
            found = shape_inference.infer_node_outputs(
                schema, node, types, small, opset_imports=self._imports
            )
        except (shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError) as e:
            if node.op_type in REASONS and not domain:
                raise Unsupported(*REASONS[node.op_type]) from None
            reason = str(e).splitlines()[0].removeprefix("[ShapeInferenceError] ")
            raise Unsupported(f"shapes do not fit: {reason}", "export the model again") from None
        return self._of_features(node) if node.op_type == "ArrayFeatureExtractor" else found

    def _note_side(self, node: onnx.NodeProto) -> None:
        """Remember on which side of zero the node's result is, and whether it may have no end."""
        if is_wild(node, self.constants, self._wild):
            self._wild.update(node.output)
        if node.input and node.output:
            sides = [
                side_of_constant(self.constants[i])
                if i in self.constants
                else self._sides.get(i, 0)
                for i in node.input
            ]
            self._sides[node.output[0]] = side_of(node, sides)

    def _of_features(self, node: onnx.NodeProto) -> Mapping[str, onnx.TypeProto]:
        """What onnx leaves open: all indices in one axis, behind those of the table."""
        table, index = (self.shape(i) for i in node.input)
        kind = helper.np_dtype_to_tensor_dtype(self._dtype(node))
        if table is None or index is None:
            return {}
        shape = (*(table[:-1] or (1,)), prod(index))
        return {node.output[0]: helper.make_tensor_type_proto(kind, shape)}

    def _renamed(self, node: onnx.NodeProto, scope: Scope, name: str) -> onnx.NodeProto:
        own = onnx.NodeProto()
        own.CopyFrom(node)
        own.name = name
        del own.input[:], own.output[:]
        own.input.extend(scope.values[i] if i else "" for i in node.input)
        own.output.extend(self._name(o, scope) for o in node.output)
        return own

    def _name(self, output: str, scope: Scope) -> str:
        wanted = scope.names.get(output, scope.prefix + output)
        return self.fresh(wanted) if output else ""

    def _break(self, node: onnx.NodeProto, scope: Scope) -> None:
        """Nothing can be said of what reads the node's results."""
        for output in filter(None, node.output):
            name = scope.values[output] = self._name(output, scope)
            self._broken.add(name)

    def _dtype(self, node: onnx.NodeProto, position: int = 0) -> np.dtype[Any]:
        return self._dtype_of(node.input[position])

    def _dtype_of(self, name: str) -> np.dtype[Any]:
        return np.dtype(helper.tensor_dtype_to_np_dtype(self.types[name].tensor_type.elem_type))


def _held_type(kind: onnx.TypeProto) -> onnx.TypeProto:
    result = onnx.TypeProto()
    result.CopyFrom(kind)
    if not result.HasField("tensor_type"):
        return result
    tensor = result.tensor_type
    tensor.elem_type = _HELD.get(int(tensor.elem_type), int(tensor.elem_type))
    return result


def _read(node: onnx.NodeProto, scope: Scope) -> Iterable[str]:
    """Names in scope that a node reads. Raises: Unsupported if it reads one that is not."""
    for name in filter(None, node.input):
        if name not in scope.values:
            raise Unsupported(f"reads {name!r}, which nothing defines", "export the model again")
        if scope.values[name]:
            yield name
    yield from (i for i in control.captured(node) if scope.values.get(i))


def _define(scope: Scope, outputs: Sequence[str], found: Sequence[str]) -> None:
    scope.values.update({k: v for k, v in zip(outputs, found, strict=False) if k})


def _shorten(values: dict[str, Any], length: int) -> None:
    while len(values) > length:
        values.popitem()


def _is_mask(node: onnx.NodeProto, position: int) -> bool:
    return node.op_type == "Dropout" and position == 1 and len(node.input) < 3
