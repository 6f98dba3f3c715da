"""compile_model: the whole way from an ONNX model to a plan and encoded weights.

load      path, bytes, ModelProto → ModelProto with its data
survey    all that is wrong without running it
on_client what the data owner's client computes before it shares anything
import    newest opset, fixed batch; what is public is computed, loops unrolled → graph
PASSES    graph → graph, same function
ranges    declared, sampled or assumed
planning  graph → plan, at some precision
target    the precision at which samples show no more than some error
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np

from mpcserve.compiler.artifact import CompiledModel, Trace
from mpcserve.compiler.calibrate import Declared, ranges_of
from mpcserve.compiler.check import Imported, import_model, lowering_problems
from mpcserve.compiler.client_steps import Disclosure
from mpcserve.compiler.graph import Graph
from mpcserve.compiler.load import Source
from mpcserve.compiler.on_client import shared_ranges, shared_samples
from mpcserve.compiler.padding import TreeBounds
from mpcserve.compiler.passes import rewritten
from mpcserve.compiler.planning import Precision, Ring, Task, encoded_weights, planned
from mpcserve.compiler.problems import raise_all
from mpcserve.compiler.registry import Registry, registry
from mpcserve.compiler.samples import Given
from mpcserve.compiler.target import planned_within
from mpcserve.compiler.unknown import unknown_op
from mpcserve.errors import ConfigError
from mpcserve.plan import OutputSpec
from mpcserve.plan.estimate import Line


def compile_model(
    source: Source,
    *,
    name: str | None = None,
    calibrate: Given | None = None,
    input_range: Declared | None = None,
    batch: int = 1,
    ring: Ring = "auto",
    frac_bits: int | None = None,
    margin_bits: int | None = None,
    line: Line | None = None,
    target_error: float | None = None,
    trace: bool = False,
    tree_depth: int | None = None,
    tree_leaves: int | None = None,
    disclose: Collection[Disclosure] = (),
) -> CompiledModel:
    """Compile an ONNX model, for the fewest bytes or the least time on servers joined by `line`.

    Raises: ModelError whose `problems` lists all that is wrong.
    `calibrate`: typical inputs, or "random:N" for N random ones within the inputs' ranges. Lengths
    that the model leaves open, as of texts, are those of these inputs.
    `input_range`: of every input, or name → range.
    `margin_bits`: ranges reach 2^margin_bits times as far as the samples did; by default 1, and 2
    where samples are few.
    `frac_bits`: the same for all activations; else 16 in 64 bits, and in 32 bits what each range
    leaves. With `frac_bits` and no `ring`, products have 64 bits.
    `target_error`: of any output; precision is raised until samples show no more of it.
    `trace`: keep what `layer_errors` needs.
    `tree_depth`, `tree_leaves`: what the plan may tell of trees, if that is to be less than the
    depth of the deepest and the leaves of the largest, rounded up to three significant bits.
    `disclose`: what the plan may tell of encoders and imputers that read the input itself, so that
    the data owner's client runs them: "text-categories", "number-categories", "imputed-values".
    """
    _refuse_options(batch, ring, frac_bits, margin_bits)
    found = registry()
    imported = import_model(source, batch, found, disclose, calibrate)
    graph = sound_graph(imported, found)
    trees = TreeBounds(tree_depth, tree_leaves)
    options = Options(
        calibrate,
        input_range,
        ring,
        frac_bits,
        margin_bits,
        line,
        target_error,
        trace,
        trees,
        disclose,
    )
    return compile_graph(graph, name or graph.name, imported, found, options)


@dataclass(frozen=True, slots=True)
class Options:
    """How a graph is compiled; see `compile_model`."""

    calibrate: Given | None = None
    input_range: Declared | None = None
    ring: Ring = "auto"
    frac_bits: int | None = None
    margin_bits: int | None = None
    line: Line | None = None
    target_error: float | None = None
    trace: bool = False
    trees: TreeBounds | None = None
    disclose: Collection[Disclosure] = ()


def sound_graph(imported: Imported, found: Registry) -> Graph:
    """The graph of a model. Raises: ModelError that lists all that is wrong with it."""
    graph, problems = imported.graph, list(imported.problems)
    if graph is not None and problems:
        problems += lowering_problems(graph, found, problems)
    raise_all(imported.name, problems)
    assert graph is not None
    return graph


def compile_graph(
    graph: Graph, name: str, imported: Imported, found: Registry, options: Options
) -> CompiledModel:
    """The plan and the weights of an imported graph whose outputs all depend on an input."""
    client = imported.cut.client
    graph, declared = shared_ranges(graph, client, options.input_range)
    graph = rewritten(graph)
    unknown = [n for n in graph.nodes if found.find(n.op, graph.opset, n.domain) is None]
    # Samples are not run through what is refused anyway, and onnxruntime may not know it either.
    raise_all(graph.name, [unknown_op(n, graph.opset, found) for n in unknown])
    samples = shared_samples(client, options.calibrate)
    ranges, notes = ranges_of(graph, samples, declared, options.margin_bits)
    about: dict[str, Any] = {
        "batch": graph.inputs[0].shape[0] if graph.inputs and graph.inputs[0].shape else 1,
        "opset": graph.opset,
        "model_digest": imported.digest,
        "client": client,
    }
    task = Task(graph, ranges, found, options.line, name, about, options.trees)
    precision = Precision(options.ring, options.frac_bits)
    if options.target_error is None:
        made = planned(task, precision)
    else:
        made = planned_within(options.target_error, task, precision)
    outputs, told = _with_columns(made.plan.outputs, imported.columns, options.disclose)
    notes += [*imported.cut.notes, *told]
    plan = replace(made.plan, outputs=outputs, notes=(*notes, *made.notes))
    trace = Trace(graph, made.draft.tensors) if options.trace else None
    return CompiledModel(plan, encoded_weights(plan, made.draft), trace)


def _with_columns(
    outputs: Sequence[OutputSpec],
    columns: Mapping[str, tuple[str, ...] | tuple[int, ...]],
    disclose: Collection[str],
) -> tuple[tuple[OutputSpec, ...], list[str]]:
    """(outputs that say whose shares their columns are, notes).

    Names of classes are public, and numbers in arithmetic progression; others only if disclosed.
    """
    found, notes = [], []
    for o in outputs:
        classes = columns.get(o.name, ())
        numbers = [c for c in classes if isinstance(c, int)]
        if len(set(np.diff(numbers))) > 1 and "number-categories" not in disclose:
            classes = ()
            notes.append(
                f"output {o.name!r} is a matrix: the numbers of its {len(numbers)} classes are "
                "secret, unless --disclose number-categories"
            )
        found.append(replace(o, columns=classes) if classes else o)
    return tuple(found), notes


def _refuse_options(batch: int, ring: Ring, frac_bits: int | None, margin_bits: int | None) -> None:
    limits = {"batch": (batch, 1, 1 << 20)}
    if margin_bits is not None:
        limits["margin_bits"] = (margin_bits, 0, 16)
    if frac_bits is not None:
        limits["frac_bits"] = (frac_bits, 4, 30)
    for name, (value, low, high) in limits.items():
        if not low <= value <= high:
            raise ConfigError(f"{name} is {value}, expected {low} to {high}", f"change {name}")
    if ring not in get_args(Ring):
        raise ConfigError(f"ring is {ring!r}, expected 'auto', 32 or 64", "change ring")
