"""From a source to a graph with every problem on the way; and the report that `check` prints."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from mpcserve.compiler import importing
from mpcserve.compiler.calibrate import Declared, ranges_of
from mpcserve.compiler.expand import expanded, kept_functions
from mpcserve.compiler.graph import Graph
from mpcserve.compiler.load import Source, load_model, structure_digest
from mpcserve.compiler.lower import Ranges, Scales, lower
from mpcserve.compiler.ml.rewrite import in_standard_operators
from mpcserve.compiler.passes import rewritten
from mpcserve.compiler.problems import Problem
from mpcserve.compiler.registry import Registry, registry
from mpcserve.compiler.samples import Given
from mpcserve.compiler.survey import fix_batch, secret_nodes, survey, unknown_operators
from mpcserve.errors import ModelError


@dataclass(frozen=True, slots=True)
class NodeReport:
    """One node of the model as it was given. `status`: supported | constant | range | unsupported.

    A constant node depends on no input and is computed when compiling. One of status range compiles
    if samples or a declared input range show that what it reads is narrow enough. A problem of the
    whole model is a report with an empty `op`.
    """

    node: str
    op: str
    status: str
    reason: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Imported:
    """`graph` is None when the model is too broken to be read further; then there are problems."""

    name: str
    digest: str
    model: onnx.ModelProto
    graph: Graph | None
    problems: tuple[Problem, ...]


def import_model(source: Source, batch: int, found: Registry) -> Imported:
    """Load, convert, fold. Raises: ModelError only when the source is not an ONNX model."""
    model, name, problems = load_model(source)
    digest = structure_digest(model)
    given = importing.readable(importing.named(model))
    blocking = [*problems, *fix_batch(given, batch)]
    problems = [*blocking, *survey(given)]
    graph = None
    model, held = importing.lightened(given)
    weights = {t.name for t in held}
    try:
        importing.checked(model)
        model = in_standard_operators(importing.converted(model))
        if not blocking:
            model = expanded(importing.inferred(model), found, weights)
        problems += unknown_operators(model, found, weights)
        if not blocking:
            kept = kept_functions(model, found, weights)
            folded = importing.restored(importing.folded(model, kept), held)
            graph = importing.folded_graph(folded, name)
    except ModelError as e:
        # A model with unknown operators need not load; say only what is already known.
        problems = problems or [*unknown_operators(model, found, weights)]
        problems = problems or [Problem("", "", e.message, e.hint)]
    return Imported(name, digest, given, graph, tuple(problems))


def check_model(
    source: Source,
    batch: int = 1,
    *,
    calibrate: Given | None = None,
    input_range: Declared | None = None,
) -> list[NodeReport]:
    """Every node, supported or not, and every problem of the model, all at once.

    Without samples or a range, inputs are taken to lie in ±1, and what is too wide even so is no
    problem yet. Raises: ModelError only when the source is not an ONNX model.
    """
    found = registry()
    imported = import_model(source, batch, found)
    problems = list(imported.problems)
    if imported.graph is not None:
        ranges = None
        if calibrate is not None or input_range is not None:
            ranges, _ = ranges_of(imported.graph, calibrate, input_range, None)
        problems += lowering_problems(imported.graph, found, problems, ranges)
    known = calibrate is not None or input_range is not None
    by_node: dict[str, list[Problem]] = {}
    for p in problems:
        by_node.setdefault(p.node, []).append(p)
    secret = {n.name for n in secret_nodes(imported.model.graph)}
    reports = []
    for node in imported.model.graph.node:
        bad = by_node.pop(node.name, [])
        reports += [_report(p, node.op_type, known) for p in bad]
        if not bad:
            status = "supported" if node.name in secret else "constant"
            reports.append(NodeReport(node.name, node.op_type, status))
    rest = [_report(p, p.op, known) for problems in by_node.values() for p in problems]
    return rest + reports


def lowering_problems(
    graph: Graph, found: Registry, known: list[Problem], ranges: Ranges | None = None
) -> list[Problem]:
    """What lowering finds that is not in `known`, where unknown operators already are."""
    if ranges is None:
        ranges = Ranges({i.name: (-1.0, 1.0, "assumed") for i in graph.inputs}, {})
    seen = {(p.node, p.op) for p in known}
    problems = lower(rewritten(graph), ranges, Scales(16), found)[1]
    return [p for p in problems if (p.node, p.op) not in seen]


def _report(problem: Problem, op: str, known: bool) -> NodeReport:
    status = "range" if problem.of_range and not known else "unsupported"
    return NodeReport(problem.node, op, status, problem.reason, problem.hint)
