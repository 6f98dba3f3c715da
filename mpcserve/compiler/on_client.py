"""What the data owner's client computes: nodes on its own plain input that need no secret.

Text cannot be shared, so what reads it runs there or nowhere. Rows are normalised there, which
needs no parameter. Encoders and imputers hold something of the model: they move only if the model
owner discloses it. What lies before a node that moves and only moves elements or casts goes along.
What is left is a model whose inputs are the results.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from mpcserve.compiler.client_steps import Disclosure, Moved, is_text, moved
from mpcserve.compiler.constants import evaluated, hollow
from mpcserve.compiler.dtypes import natural_range
from mpcserve.compiler.graph import Graph
from mpcserve.compiler.ml.rewrite import ML
from mpcserve.compiler.problems import Problem, Unsupported
from mpcserve.compiler.samples import Given, raw_samples
from mpcserve.compiler.survey import captured
from mpcserve.errors import ConfigError
from mpcserve.plan.client import TEXT, ClientProgram, RawInput

if TYPE_CHECKING:
    from mpcserve.compiler.calibrate import Declared

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Cut:
    """A model in two: the client's program and what is left of the model.

    `nodes`: names of those that moved. `notes`: what else could.
    """

    model: onnx.ModelProto
    client: ClientProgram = field(default_factory=ClientProgram)
    nodes: frozenset[str] = frozenset()
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether no text is left to be shared."""
        return not any(map(_is_text, self.model.graph.input))


def disclosures(chosen: Collection[str]) -> frozenset[str]:
    """Raises: ConfigError on one that there is not."""
    known = get_args(Disclosure)
    if unknown := sorted(set(chosen) - set(known)):
        expected = ", ".join(known)
        raise ConfigError(f"disclose is {unknown[0]!r}, expected {expected}", "change disclose")
    return frozenset(chosen)


def cut_for_client(model: onnx.ModelProto, held: Collection[str], disclose: Collection[str]) -> Cut:
    """The cut that moves most of what may move. `held`: inputs that stand for weights."""
    graph, allowed = model.graph, disclosures(disclose)
    raw = [i for i in graph.input if i.name not in held]
    if not (any(map(_is_text, raw)) or any(n.domain == ML for n in graph.node)):
        return Cut(model)
    search = _Search({o.domain: o.version for o in model.opset_import}, allowed)
    search.has |= {i.name: _empty(i) for i in raw}
    search.constants |= {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    for node in graph.node:
        search.visit(node)
    return _cut(model, raw, search)


def shared_ranges(
    graph: Graph, client: ClientProgram, declared: Declared | None
) -> tuple[Graph, Declared | None]:
    """Ranges of raw inputs as those of what is shared; what follows from them is proved."""
    if not client.steps:
        return graph, declared
    numbers = [i for i in client.inputs if i.dtype != TEXT]
    if declared is not None and not isinstance(declared, Mapping):
        declared = {i.name: declared for i in numbers}
    raw = dict(declared or {})
    natural = {i.name: r for i in numbers if (r := natural_range(i.dtype)) is not None}
    made = {s.output for s in client.steps}
    found = {k: _wide(*r) for k, r in client.reaches(natural | raw).items() if k in made}
    inputs = tuple(replace(i, reach=found.get(i.name, i.reach)) for i in graph.inputs)
    known = {i.name for i in client.inputs} - {i.name for i in graph.inputs}
    rest = {k: r for k, r in raw.items() if k not in known}
    return replace(graph, inputs=inputs), rest or None


def shared_samples(client: ClientProgram, given: Given | None) -> Given | None:
    """Samples of raw inputs as those of what is shared. Raises: InputError."""
    if not client.steps or given is None:
        return given
    raw = raw_samples(given, client.inputs)
    return given if raw is None else client.applied(raw)


@dataclass(slots=True)
class _Search:
    """`has`: what the client has or can compute, as empty arrays. `found`: how it does."""

    opsets: Mapping[str, int]
    disclose: frozenset[str]
    has: dict[str, Array] = field(default_factory=dict)
    constants: dict[str, Array] = field(default_factory=dict)
    found: list[tuple[onnx.NodeProto, Moved]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def visit(self, node: onnx.NodeProto) -> None:
        """Note what the client can do with a node."""
        if node.op_type == "Constant" and not node.domain:
            self.constants |= evaluated(node, {}, self.opsets)
            return
        given = {i: self.has[i] for i in node.input if i in self.has}
        try:
            done = moved(node, given, self.constants, self.opsets) if given else None
        except Unsupported as e:
            self.problems.append(Problem(node.name, node.op_type, e.reason, e.hint))
            return
        if done is not None and self._may(node, done):
            self.has |= done.results
            self.found.append((node, done))

    def _may(self, node: onnx.NodeProto, done: Moved) -> bool:
        """Whether what must be disclosed is; text goes on all the same, with a problem."""
        kind = done.disclosing
        if kind is None or kind in self.disclose:
            return True
        if kind == "text-categories":
            self.problems.append(
                Problem(
                    node.name,
                    node.op_type,
                    f"encodes text, which cannot be shared; the data owner's client can encode it "
                    f"if its {done.told} become public",
                    f"disclose them: --disclose {kind}, disclose=({kind!r},) in Python",
                )
            )
        elif kind == "number-categories":
            self.notes.append(
                f"{node.op_type} {node.name!r} compares with {done.told}, which are secret: with "
                f"--disclose {kind} they are public, and the client compares for nothing"
            )
        elif done.steps[0].attrs["replaced"] is None:
            self.notes.append(
                f"rows with missing values are refused: with --disclose {kind} the client fills "
                f"them in by {node.op_type} {node.name!r}, whose {done.told} become public"
            )
        return kind == "text-categories"


def _cut(model: onnx.ModelProto, raw: list[onnx.ValueInfoProto], search: _Search) -> Cut:
    needed: set[str] = set()
    moving: list[tuple[onnx.NodeProto, Moved]] = []
    for node, done in reversed(search.found):
        if done.wanted or done.disclosing or not needed.isdisjoint(done.results):
            moving.insert(0, (node, done))
            needed.update(i for step in done.steps for i in step.inputs)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    del graph.node[:], graph.input[:]
    instead = {node.output[0]: done.rest for node, done in moving}
    for node in model.graph.node:
        if not (node.output and node.output[0] in instead):
            graph.node.append(node)
        elif (rest := instead[node.output[0]]) is not None:
            graph.node.extend(rest.nodes)
            graph.initializer.extend(rest.tensors)
    read = {i for n in graph.node for i in (*n.input, *captured(n))}
    read |= {o.name for o in graph.output}
    graph.input.extend(
        i for i in model.graph.input if i.name in read or (i.name not in needed and not _is_text(i))
    )
    made = [name for _, done in moving for name in done.results if name in read]
    graph.input.extend(_info(name, search.has[name]) for name in made)
    client = ClientProgram(
        tuple(_raw_input(i) for i in raw if moving),
        tuple(step for _, done in moving for step in done.steps),
    )
    names = frozenset(node.name for node, _ in moving)
    problems = (*search.problems, *_texts(graph))
    return Cut(result, client, names, problems, tuple(search.notes))


def _texts(graph: onnx.GraphProto) -> Iterator[Problem]:
    """What would have to be shared though it is text."""
    texts = {i.name for i in graph.input if _is_text(i)}
    hint = "encode it as numbers before the model is exported"
    for node in graph.node:
        if not texts.isdisjoint((*node.input, *captured(node))):
            yield Problem(node.name, node.op_type, "reads text, which cannot be shared", hint)
    for output in graph.output:
        if output.name in texts:
            yield Problem(f"output {output.name!r}", "", "is text of an input", hint)


def _is_text(info: onnx.ValueInfoProto) -> bool:
    return bool(info.type.tensor_type.elem_type == onnx.TensorProto.STRING)


def _shape(info: onnx.ValueInfoProto) -> tuple[int, ...]:
    return tuple(d.dim_value for d in info.type.tensor_type.shape.dim)


def _dtype(info: onnx.ValueInfoProto) -> np.dtype[Any]:
    if _is_text(info):
        return np.dtype("U1")
    return np.dtype(helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type))


def _empty(info: onnx.ValueInfoProto) -> Array:
    return hollow(_shape(info), _dtype(info))


def _raw_input(info: onnx.ValueInfoProto) -> RawInput:
    return RawInput(info.name, TEXT if _is_text(info) else str(_dtype(info)), _shape(info))


def _info(name: str, x: Array) -> onnx.ValueInfoProto:
    kind = onnx.TensorProto.STRING
    if not is_text(x):
        kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    return helper.make_tensor_value_info(name, kind, x.shape)


def _wide(low: float, high: float) -> tuple[float, float]:
    """A range with more than one number in it."""
    return (low, high) if low < high else (min(low, 0.0), max(high, 1.0))
