"""compile_model: the whole way from an ONNX model to a plan and encoded weights.

load      path, bytes, ModelProto → ModelProto with its data
survey    all that is wrong without running it
import    newest opset, fixed batch, shapes, folding → graph
PASSES    graph → graph, same function
ranges    declared, sampled or assumed
lower     graph → draft
DRAFTS    draft → draft
widths    draft → plan; of every strategy, and the fastest on the declared network is kept
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpcserve.compiler import calibrate as samples
from mpcserve.compiler.artifact import CompiledModel
from mpcserve.compiler.check import import_model, lowering_problems
from mpcserve.compiler.draft import Draft, check_draft
from mpcserve.compiler.graph import Graph
from mpcserve.compiler.load import Source
from mpcserve.compiler.lower import Ranges, lower
from mpcserve.compiler.passes.deduplicate import deduplicate
from mpcserve.compiler.passes.fold_affine import fold_affine
from mpcserve.compiler.passes.identities import remove_identities
from mpcserve.compiler.passes.relu_after_maxpool import relu_after_maxpool
from mpcserve.compiler.passes.unused import remove_unused
from mpcserve.compiler.precision import check_fit, coarse_weights, tune_inputs, tune_weights
from mpcserve.compiler.problems import raise_all
from mpcserve.compiler.registry import Registry, registry
from mpcserve.compiler.strategy import CHUNKS, GROUPS, Strategy, describe, fastest
from mpcserve.compiler.widths import assign_widths, extended
from mpcserve.errors import ConfigError
from mpcserve.plan import Plan, verify_plan
from mpcserve.plan.estimate import Line

PASSES: tuple[Callable[[Graph], Graph], ...] = (
    remove_identities,  # Identity, Dropout, casts between floats: nothing to do
    fold_affine,  # scalings, offsets, normalisations and means go into neighbouring weights
    relu_after_maxpool,  # Relu → MaxPool becomes MaxPool → Relu: fewer comparisons
)

DRAFTS: tuple[Callable[[Draft], Draft], ...] = (
    deduplicate,  # equal steps of equal operands are computed once
    remove_unused,  # what no output needs is not computed
)


def compile_model(
    source: Source,
    *,
    name: str | None = None,
    calibrate: samples.Samples | None = None,
    input_range: tuple[float, float] | None = None,
    batch: int = 1,
    frac_bits: int = 16,
    margin_bits: int = 1,
    line: Line | None = None,
) -> CompiledModel:
    """Compile an ONNX model, for the fewest bytes or the least time on servers joined by `line`.

    Raises: ModelError whose `problems` lists all that is wrong.
    """
    _refuse_options(batch, frac_bits, margin_bits)
    found = registry()
    imported = import_model(source, batch, found)
    graph, problems = imported.graph, list(imported.problems)
    if graph is not None and problems:
        problems += lowering_problems(graph, found, problems)
    raise_all(imported.name, problems)
    assert graph is not None
    name = name or graph.name
    for run in PASSES:
        graph = run(graph)
    ranges, notes = samples.ranges_of(graph, calibrate, input_range, margin_bits, frac_bits)
    about: dict[str, Any] = {
        "batch": graph.inputs[0].shape[0] if graph.inputs and graph.inputs[0].shape else 1,
        "opset": graph.opset,
        "model_digest": imported.digest,
    }
    made = _alternatives(
        graph,
        ranges,
        frac_bits,
        found,
        lambda draft, chunk: assign_widths(draft, name, chunk, **about),
    )
    plans = [plan for _, plan, _ in made]
    best = fastest(plans, line)
    _, plan, draft = made[best]
    compared = describe([strategy for strategy, _, _ in made], plans, best, line)
    plan = replace(plan, notes=(*notes, *coarse_weights(draft, frac_bits), *compared))
    verify_plan(plan)
    return CompiledModel(plan, encoded_weights(plan, draft))


def _alternatives(
    graph: Graph,
    ranges: Ranges,
    frac_bits: int,
    found: Registry,
    widths: Callable[[Draft, int], Plan],
) -> list[tuple[Strategy, Plan, Draft]]:
    """A plan of every strategy that makes a difference."""
    made: list[tuple[Strategy, Plan, Draft]] = []
    for group in GROUPS:
        draft = _draft(graph, ranges, frac_bits, found, group)
        if made and len(draft.steps) == len(made[0][2].steps):
            continue  # no maximum of more than two values in it
        for chunk in CHUNKS:
            plan = widths(draft, chunk)
            if all(plan != other for _, other, _ in made):
                made.append((Strategy(group, chunk), plan, draft))
    return made


def _draft(graph: Graph, ranges: Ranges, frac_bits: int, found: Registry, group: int) -> Draft:
    """The graph lowered and tuned, all but widths."""
    draft, problems = lower(graph, ranges, frac_bits, found, group)
    raise_all(graph.name, problems)
    for step in DRAFTS:
        draft = step(draft)
        check_draft(draft, step.__name__)
    draft = tune_weights(draft, frac_bits)
    check_draft(draft, "tune_weights")
    draft = tune_inputs(draft, frac_bits)
    check_draft(draft, "tune_inputs")
    raise_all(graph.name, check_fit(draft, frac_bits))
    draft = extended(draft)
    check_draft(draft, "extended")
    return draft


def _refuse_options(batch: int, frac_bits: int, margin_bits: int) -> None:
    limits = {"batch": (batch, 1, 1 << 20), "frac_bits": (frac_bits, 4, 30)}
    limits["margin_bits"] = (margin_bits, 0, 16)
    for name, (value, low, high) in limits.items():
        if not low <= value <= high:
            raise ConfigError(f"{name} is {value}, expected {low} to {high}", f"change {name}")


def encoded_weights(plan: Plan, draft: Draft) -> Mapping[str, NDArray[np.int64]]:
    """Each weight as integers at its value's fraction bits."""
    return {
        name: np.rint(np.ldexp(draft.arrays[name], plan.value(id).frac_bits)).astype(np.int64)
        for name, id in plan.weights.items()
    }
