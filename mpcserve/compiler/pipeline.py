"""compile_model: the whole way from an ONNX model to a plan and encoded weights.

load      path, bytes, ModelProto → ModelProto with its data
survey    all that is wrong without running it
import    newest opset, fixed batch, shapes, folding → graph
PASSES    graph → graph, same function
ranges    declared, sampled or assumed
lower     graph → draft
DRAFTS    draft → draft
precision fraction bits of weights and inputs; rings of 32 bits, for which it is lowered again
widths    draft → plan; of every strategy, and the best on the declared network is kept
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mpcserve.compiler import calibrate as samples
from mpcserve.compiler.artifact import CompiledModel
from mpcserve.compiler.check import Imported, import_model, lowering_problems
from mpcserve.compiler.draft import Draft, check_draft
from mpcserve.compiler.graph import Graph
from mpcserve.compiler.load import Source
from mpcserve.compiler.lower import Ranges, Scales, lower
from mpcserve.compiler.narrow import Lowered, narrowed
from mpcserve.compiler.passes.deduplicate import deduplicate
from mpcserve.compiler.passes.fold_affine import fold_affine
from mpcserve.compiler.passes.identities import remove_identities
from mpcserve.compiler.passes.relu_after_maxpool import relu_after_maxpool
from mpcserve.compiler.passes.unused import remove_unused
from mpcserve.compiler.precision import check_fit, coarse_weights, tune_inputs, tune_weights
from mpcserve.compiler.problems import raise_all
from mpcserve.compiler.registry import Registry, registry
from mpcserve.compiler.sensitivity import Felt, felt_in
from mpcserve.compiler.strategy import CHUNKS, GROUPS, Strategy, describe, fastest
from mpcserve.compiler.widths import assign_widths, extended
from mpcserve.errors import ConfigError
from mpcserve.plan import Plan, verify_plan
from mpcserve.plan.estimate import Line
from mpcserve.plan.ops import PRODUCTS

PASSES: tuple[Callable[[Graph], Graph], ...] = (
    remove_identities,  # Identity, Dropout, casts between floats: nothing to do
    fold_affine,  # scalings, offsets, normalisations and means go into neighbouring weights
    relu_after_maxpool,  # Relu → MaxPool becomes MaxPool → Relu: fewer comparisons
)

DRAFTS: tuple[Callable[[Draft], Draft], ...] = (
    deduplicate,  # equal steps of equal operands are computed once
    remove_unused,  # what no output needs is not computed
)


Ring = Literal["auto", 32, 64]
"""Products are computed mod 2^32, mod up to 2^64, or mod 2^32 where that is accurate enough."""

USUAL = 16
"""Fraction bits of what has no reason for more or fewer."""


def compile_model(
    source: Source,
    *,
    name: str | None = None,
    calibrate: samples.Samples | None = None,
    input_range: samples.Declared | None = None,
    batch: int = 1,
    ring: Ring = "auto",
    frac_bits: int | None = None,
    margin_bits: int = 1,
    line: Line | None = None,
) -> CompiledModel:
    """Compile an ONNX model, for the fewest bytes or the least time on servers joined by `line`.

    Raises: ModelError whose `problems` lists all that is wrong.
    `input_range`: of every input, or name → range.
    `frac_bits`: the same for all activations; else 16 in 64 bits, and in 32 bits what each range
    leaves. With `frac_bits` and no `ring`, products have 64 bits.
    """
    _refuse_options(batch, ring, frac_bits, margin_bits)
    found = registry()
    imported = import_model(source, batch, found)
    graph = sound_graph(imported, found)
    options = Options(calibrate, input_range, ring, frac_bits, margin_bits, line)
    return compile_graph(graph, name or graph.name, imported.digest, found, options)


@dataclass(frozen=True, slots=True)
class Options:
    """How a graph is compiled; see `compile_model`."""

    calibrate: samples.Samples | None = None
    input_range: samples.Declared | None = None
    ring: Ring = "auto"
    frac_bits: int | None = None
    margin_bits: int = 1
    line: Line | None = None


def sound_graph(imported: Imported, found: Registry) -> Graph:
    """The graph of a model. Raises: ModelError that lists all that is wrong with it."""
    graph, problems = imported.graph, list(imported.problems)
    if graph is not None and problems:
        problems += lowering_problems(graph, found, problems)
    raise_all(imported.name, problems)
    assert graph is not None
    return graph


def compile_graph(
    graph: Graph, name: str, digest: str, found: Registry, options: Options
) -> CompiledModel:
    """The plan and the weights of an imported graph whose outputs all depend on an input."""
    ring, frac_bits, line = options.ring, options.frac_bits, options.line
    for run in PASSES:
        graph = run(graph)
    ranges, notes = samples.ranges_of(
        graph, options.calibrate, options.input_range, options.margin_bits
    )
    about: dict[str, Any] = {
        "batch": graph.inputs[0].shape[0] if graph.inputs and graph.inputs[0].shape else 1,
        "opset": graph.opset,
        "model_digest": digest,
    }
    felt = cache(partial(felt_in, graph, ranges))
    made = _alternatives(
        lambda group: _draft(
            graph, partial(_lowered, graph, ranges, found, group), felt, ring, frac_bits
        ),
        lambda draft, chunk: assign_widths(draft, name, chunk, **about),
        GROUPS if line else GROUPS[:1],
    )
    plans = [m.plan for m in made]
    best = fastest(plans, line)
    compared = describe([m.strategy for m in made], plans, best, line)
    plan = replace(plans[best], notes=(*notes, *made[best].notes, *compared))
    verify_plan(plan)
    return CompiledModel(plan, encoded_weights(plan, made[best].draft))


@dataclass(frozen=True, slots=True)
class _Made:
    """One way to evaluate the graph."""

    strategy: Strategy
    draft: Draft
    plan: Plan
    notes: tuple[str, ...]


def _alternatives(
    draft_of: Callable[[int], tuple[Draft, list[str]]],
    widths: Callable[[Draft, int], Plan],
    groups: tuple[int, ...],
) -> list[_Made]:
    """A plan of every strategy that makes a difference."""
    made: list[_Made] = []
    for group in groups:
        draft, notes = draft_of(group)
        if made and len(draft.steps) == len(made[0].draft.steps):
            continue  # no maximum of more than two values in it
        for chunk in CHUNKS:
            plan = widths(draft, chunk)
            if all(plan != m.plan for m in made):
                made.append(_Made(Strategy(group, chunk), draft, plan, tuple(notes)))
    return made


def _lowered(graph: Graph, ranges: Ranges, found: Registry, group: int, scales: Scales) -> Draft:
    """The graph at some scales. Raises: ModelError."""
    draft, problems = lower(graph, ranges, scales, found, group)
    raise_all(graph.name, problems)
    for step in DRAFTS:
        draft = step(draft)
        check_draft(draft, step.__name__)
    return draft


def _draft(
    graph: Graph, lowered: Lowered, felt: Callable[[], Felt], ring: Ring, frac_bits: int | None
) -> tuple[Draft, list[str]]:
    """(draft that needs no more extends, notes). Raises: ModelError."""
    usual = frac_bits or USUAL
    draft = tune_weights(lowered(Scales(usual)), usual)
    check_draft(draft, "tune_weights")
    draft = tune_inputs(draft, usual)
    check_draft(draft, "tune_inputs")
    if ring != 32:
        raise_all(graph.name, check_fit(draft, usual))
    if ring == 64 or (ring == "auto" and (frac_bits is not None or _varies(draft))):
        draft, notes = extended(draft), []
    else:
        fixed = frac_bits is not None
        result = narrowed(draft, lowered, felt(), usual, only=ring == 32, fixed=fixed)
        raise_all(graph.name, result.problems)
        draft, notes = result.draft, [result.note]
    check_draft(draft, "extended")
    return draft, [*notes, *coarse_weights(draft, usual)]


def _varies(draft: Draft) -> bool:
    """Whether rounding may be felt more at some inputs than at the samples: not for 32 bits then.

    So it is where secret values multiply each other or pass through a smooth function, as in a
    normalisation whose divisor may be small.
    """
    varying: set[int] = set()
    for id, s in enumerate(draft.steps):
        if s.op == "spectral" or (s.op in PRODUCTS and varying.issuperset(s.inputs[:2])):
            return True
        if s.op == "input" or not varying.isdisjoint(s.inputs):
            varying.add(id)
    return False


def _refuse_options(batch: int, ring: Ring, frac_bits: int | None, margin_bits: int) -> None:
    limits = {"batch": (batch, 1, 1 << 20), "margin_bits": (margin_bits, 0, 16)}
    if frac_bits is not None:
        limits["frac_bits"] = (frac_bits, 4, 30)
    for name, (value, low, high) in limits.items():
        if not low <= value <= high:
            raise ConfigError(f"{name} is {value}, expected {low} to {high}", f"change {name}")
    if ring not in get_args(Ring):
        raise ConfigError(f"ring is {ring!r}, expected 'auto', 32 or 64", "change ring")


def encoded_weights(plan: Plan, draft: Draft) -> Mapping[str, NDArray[np.int64]]:
    """Each weight as integers at its value's fraction bits."""
    return {
        name: np.rint(np.ldexp(draft.arrays[name], plan.value(id).frac_bits)).astype(np.int64)
        for name, id in plan.weights.items()
    }
