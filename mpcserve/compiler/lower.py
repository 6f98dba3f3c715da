"""Graph → draft: every node through its lowering function, all problems collected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf

import numpy as np

from mpcserve.compiler.builder import Array, Builder, Operand, Ref
from mpcserve.compiler.draft import Draft, Seen
from mpcserve.compiler.graph import Graph, Node
from mpcserve.compiler.lookup import choices, number_of
from mpcserve.compiler.padding import TreeBounds
from mpcserve.compiler.problems import Problem, TooWide, Unsupported
from mpcserve.compiler.registry import Lowering, Registry
from mpcserve.compiler.strategy import BASIC, Way
from mpcserve.compiler.unknown import unknown_op

HALVE_FROM = 1 << 13
"""Elements of an activation from which on bytes dealt weigh more than rounds."""

Reach = tuple[float, float, str]
"""(low, high, known) of an input."""


@dataclass(frozen=True, slots=True)
class Ranges:
    """`inputs`: declared range per input. `values`: what samples showed of a tensor.

    `feeds`: a few batches of the samples; none if there are no samples. `finest`: of an input that
    is a matrix, the reach of the column that reaches least.
    """

    inputs: Mapping[str, Reach]
    values: Mapping[str, Seen]
    feeds: tuple[Mapping[str, Array], ...] = ()
    finest: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scales:
    """Fraction bits of what the nodes compute and of the inputs; `usual` for all that have none.

    `coarse`: nodes whose products read coarser operands where 64 bits would not hold them.
    """

    usual: int
    nodes: Mapping[str, int] = field(default_factory=dict)
    inputs: Mapping[str, int] = field(default_factory=dict)
    coarse: frozenset[str] = frozenset()


def lower(
    graph: Graph,
    ranges: Ranges,
    scales: Scales,
    registry: Registry,
    way: Way = BASIC,
    trees: TreeBounds | None = None,
) -> tuple[Draft, list[Problem]]:
    """The draft of a graph. It is of no use when problems were found."""
    halve_from = HALVE_FROM if way.halves else inf
    b = Builder(scales.usual, graph.opset, way.group, trees, halve_from, scales.coarse)
    known: dict[str, Operand] = dict(graph.constants)
    problems: list[Problem] = []
    chosen = choices(graph)
    for i in graph.inputs:
        b.frac_bits = scales.inputs.get(i.name, scales.usual)
        reach, classes = ranges.inputs[i.name], chosen.get(i.name, 0)
        x = b.input(i.name, i.dtype, i.shape, reach, classes)
        known[i.name] = x = number_of(b, x) if classes else x
        if i.name in ranges.values:
            b.sampled(x, ranges.values[i.name])
    for node in graph.nodes:
        b.frac_bits = scales.nodes.get(node.name, scales.usual)
        b.seen = ranges.values.get(node.outputs[0])
        problems += _lower_node(b, node, graph, known, registry)
        for name in node.outputs:
            value = known.get(name)
            if name in ranges.values and isinstance(value, Ref):
                b.sampled(value, ranges.values[name])
    for o in graph.outputs:
        value = known.get(o.name)
        if isinstance(value, Ref):
            b.layer = ""
            b.output(o.name, o.dtype, value)
        elif not problems:
            reason = f"output {o.name!r} depends on no input"
            problems.append(Problem("", "", reason, "remove it from the model's outputs"))
    tensors = {name: x.id for name, x in known.items() if isinstance(x, Ref)}
    return replace(b.draft(), tensors=tensors), problems


def _lower_node(
    b: Builder, node: Node, graph: Graph, known: dict[str, Operand], registry: Registry
) -> list[Problem]:
    b.layer, b.n_outputs = node.name, sum(map(bool, node.outputs))
    entry = registry.find(node.op, graph.opset, node.domain)
    if entry is None:
        problem = unknown_op(node, graph.opset, registry)
    else:
        try:
            known.update(_call(b, entry, node, known))
            return []
        except Unsupported as e:
            problem = Problem(node.name, node.op, e.reason, e.hint, isinstance(e, TooWide))
    # A stand-in lets the nodes behind this one be checked too.
    for name in node.outputs:
        if name in graph.shapes:
            known[name] = b.input(name, "float32", graph.shapes[name], (-1.0, 1.0, "assumed"))
    return [problem]


def _call(
    b: Builder, entry: Lowering, node: Node, known: Mapping[str, Operand]
) -> dict[str, Operand]:
    missing = [i for i in node.inputs if i and i not in known]
    if missing:
        raise Unsupported(f"its input {missing[0]!r} could not be lowered")
    operands = [known[i] if i else None for i in node.inputs]
    if not any(isinstance(x, Ref) for x in operands):
        raise Unsupported("all its inputs are constant, yet it could not be folded")
    unknown = sorted(set(node.attrs) - set(entry.attributes))
    if unknown:
        named = ", ".join(map(repr, unknown))
        raise Unsupported(f"attribute {named} is not supported", "export the model without it")
    arrays = [x for x in operands if isinstance(x, np.ndarray)]
    for x in arrays if not entry.domain else []:  # names of classes are text
        if x.dtype.kind not in "biuf":
            raise Unsupported(f"a constant input has elements of {x.dtype}")
    try:
        result = entry.function(b, *operands, **node.attrs)
    except (TypeError, ValueError, IndexError) as e:
        raise Unsupported(f"its inputs or attributes do not fit: {e}") from e
    outputs = result if isinstance(result, tuple) else (result,)
    pairs = zip(node.outputs, outputs, strict=False)
    return {name: value for name, value in pairs if name and value is not None}
