"""From a source to a graph with every problem on the way; and the report that `check` prints."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import defs

from mpcserve.compiler import control, importing
from mpcserve.compiler.calibrate import Declared, ranges_of
from mpcserve.compiler.client_steps import Disclosure
from mpcserve.compiler.graph import Graph
from mpcserve.compiler.load import (
    OLDEST_OPSET,
    Source,
    load_model,
    opset_of,
    structure_digest,
)
from mpcserve.compiler.lower import Ranges, Scales, lower
from mpcserve.compiler.ml.rewrite import in_standard_operators
from mpcserve.compiler.on_client import Cut, cut_for_client, shared_ranges, shared_samples
from mpcserve.compiler.passes import rewritten
from mpcserve.compiler.problems import Problem, Unsupported
from mpcserve.compiler.registry import Registry, registry
from mpcserve.compiler.running import readable
from mpcserve.compiler.samples import Given, lengths_of
from mpcserve.compiler.survey import (
    fix_lengths,
    numbers_of,
    other_opset,
    secret_nodes,
    types_of,
    unknown_operators,
)
from mpcserve.errors import ModelError


@dataclass(frozen=True, slots=True)
class NodeReport:
    """One node of the model as it was given.

    `status`: supported | on the client | constant | range | unsupported. A constant node depends on
    no input and is computed when compiling. One of status range compiles if samples or a declared
    input range show that what it reads is narrow enough. A problem of the whole model is a report
    with an empty `op`.
    """

    node: str
    op: str
    status: str
    reason: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Imported:
    """`graph` is None when the model is too broken to be read further; then there are problems.

    `public`: names of nodes that were computed. `cut`: what runs on the client, and why no more.
    `columns`: classes of outputs that a ZipMap makes.
    """

    name: str
    digest: str
    model: onnx.ModelProto
    graph: Graph | None
    public: frozenset[str]
    problems: tuple[Problem, ...]
    cut: Cut
    columns: Mapping[str, tuple[str, ...] | tuple[int, ...]]


def import_model(
    source: Source,
    batch: int,
    found: Registry,
    disclose: Collection[str] = (),
    samples: Given | None = None,
) -> Imported:
    """Load, convert, fold. Lengths that the model leaves open are those of `samples`.

    Raises: ModelError only when the source is not an ONNX model, InputError when samples cannot be
    read.
    """
    model, name, problems = load_model(source)
    digest, columns = structure_digest(model), importing.zipped(model.graph)
    given = readable(importing.named(model))
    problems += fix_lengths(given, batch, lengths_of(samples))
    blocked = bool(problems)
    problems += types_of(given.graph)
    graph, public = None, frozenset[str]()
    model, held = importing.lightened(given)
    cut = Cut(model)
    try:
        importing.checked(model)
        if not blocked:
            names = {t.name for t in held}
            cut = cut_for_client(importing.converted(model), names, disclose)
            problems += cut.problems
            blocked = not cut.is_whole
        model, refused = in_standard_operators(cut.model)
        problems += refused
        problems += other_opset(model)
        if not blocked and opset_of(model) >= OLDEST_OPSET:
            graph, unfolding = importing.unfolded(model, held, name, found)
            problems += [*numbers_of(graph), *unfolding.problems]
            public = frozenset(unfolding.public)
    except (ModelError, Unsupported) as e:
        # What is already known may well be the reason.
        problems += [] if problems else [Problem("", "", str(e), e.hint)]
    if problems:
        # Nothing was said of nodes behind one that was refused.
        named = {p.node for p in problems}
        unknown = unknown_operators(model, found, {t.name for t in held})
        problems += [p for p in unknown if p.node not in named and not _unfolds(p.op)]
    return Imported(name, digest, given, graph, public, tuple(problems), cut, columns)


def _unfolds(op: str) -> bool:
    """Whether the operator is replaced by others: a graph that it holds, or its definition."""
    if op in control.UNROLLED or not defs.has(op):
        return op in control.UNROLLED
    schema: Any = defs.get_schema(op)
    return bool(schema.has_function or schema.has_context_dependent_function)


def check_model(
    source: Source,
    batch: int = 1,
    *,
    calibrate: Given | None = None,
    input_range: Declared | None = None,
    disclose: Collection[Disclosure] = (),
) -> list[NodeReport]:
    """Every node, supported or not, and every problem of the model, all at once.

    Without samples or a range, inputs are taken to lie in ±1, and what is too wide even so is no
    problem yet. Raises: ModelError only when the source is not an ONNX model.
    """
    found = registry()
    imported = import_model(source, batch, found, disclose, calibrate)
    problems = list(imported.problems)
    if imported.graph is not None:
        ranges = None
        if calibrate is not None or input_range is not None:
            client = imported.cut.client
            graph, declared = shared_ranges(imported.graph, client, input_range)
            ranges, _ = ranges_of(graph, shared_samples(client, calibrate), declared, None)
        problems += lowering_problems(imported.graph, found, problems, ranges)
    known = calibrate is not None or input_range is not None
    by_node: dict[str, list[Problem]] = {}
    for p in problems:
        by_node.setdefault(p.node, []).append(p)
    secret = {n.name for n in secret_nodes(imported.model.graph)} - imported.public
    reports = []
    for node in imported.model.graph.node:
        bad = by_node.pop(node.name, [])
        zipped = not imported.columns.keys().isdisjoint(node.output)
        reports += [_report(p, node.op_type, known) for p in bad]
        if not bad:
            status = "supported" if node.name in secret else "constant"
            if node.name in imported.cut.nodes or zipped:
                status = "on the client"
            reports.append(NodeReport(node.name, "ZipMap" if zipped else node.op_type, status))
    rest = [_report(p, p.op, known) for problems in by_node.values() for p in problems]
    return rest + reports


def lowering_problems(
    graph: Graph, found: Registry, known: list[Problem], ranges: Ranges | None = None
) -> list[Problem]:
    """What lowering finds that is not in `known`."""
    if ranges is None:
        ranges = Ranges({i.name: (-1.0, 1.0, "assumed") for i in graph.inputs}, {})
    seen = {(p.node, p.op) for p in known}
    problems = lower(rewritten(graph), ranges, Scales(16), found)[1]
    return [p for p in problems if (p.node, p.op) not in seen]


def _report(problem: Problem, op: str, known: bool) -> NodeReport:
    status = "range" if problem.of_range and not known else "unsupported"
    return NodeReport(problem.node, op, status, problem.reason, problem.hint)
