"""A float graph with its ranges → the plan of fewest bytes, or the fastest, at some precision.

lower     graph → draft
DRAFTS    draft → draft
precision fraction bits of weights and inputs; rings of 32 bits, for which it is lowered again
widths    draft → plan; of every strategy, and the best on the declared network is kept
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import ceil, log2, prod
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mpcserve.compiler.draft import Draft, check_draft
from mpcserve.compiler.finer import finer_scales, finer_weights
from mpcserve.compiler.forest import has_trees
from mpcserve.compiler.graph import Graph
from mpcserve.compiler.lower import HALVE_FROM, Ranges, Scales, lower
from mpcserve.compiler.narrow import TOLERANCE, narrowed
from mpcserve.compiler.noise import noise_of
from mpcserve.compiler.padding import TreeBounds
from mpcserve.compiler.passes.deduplicate import deduplicate
from mpcserve.compiler.passes.unused import remove_unused
from mpcserve.compiler.precision import (
    check_fit,
    coarse_operands,
    coarse_weights,
    finer_inputs,
    short_layers,
    tune_inputs,
    tune_weights,
)
from mpcserve.compiler.problems import raise_all
from mpcserve.compiler.ranges import in_ulps
from mpcserve.compiler.rectify import GONE, rectified
from mpcserve.compiler.registry import Registry
from mpcserve.compiler.sensitivity import Felt, felt_in
from mpcserve.compiler.strategy import (
    BASIC,
    BOTH,
    CHUNKS,
    GROUPED,
    WHOLE,
    Strategy,
    Way,
    compared,
    fastest,
)
from mpcserve.compiler.widths import assign_widths, extended
from mpcserve.errors import ConfigError, ModelError
from mpcserve.plan import Plan, verify_plan
from mpcserve.plan.estimate import LINES, Line
from mpcserve.plan.ops import PRODUCTS

DRAFTS: tuple[Callable[[Draft], Draft], ...] = (
    deduplicate,  # equal steps of equal operands are computed once
    remove_unused,  # what no output needs is not computed
)

Ring = Literal["auto", 32, 64]
"""Products are computed mod 2^32, mod up to 2^64, or mod 2^32 where that is accurate enough."""

USUAL = 16
"""Fraction bits of what has no reason for more or fewer."""

FAIR = 2.0**-11
"""Expected error of an output in 64 bits, both root mean squares; where it is more, as in very deep
networks, all have more fraction bits."""

MOST_FINER = 4
"""So many at most."""


@dataclass(frozen=True, slots=True)
class Precision:
    """`frac_bits`: the same for all activations; else 16 in 64 bits, and in 32 bits what each range
    leaves. With `frac_bits` and no `ring`, products have 64 bits. `tolerance`: expected error of an
    output that 32 bits may cost, both root mean squares."""

    ring: Ring = "auto"
    frac_bits: int | None = None
    tolerance: float = TOLERANCE


@dataclass(frozen=True)
class Task:
    """What is to be planned. `about`: what the plan says of its model; `line`: between servers;
    `trees`: what it may say of trees."""

    graph: Graph
    ranges: Ranges
    registry: Registry
    line: Line | None
    name: str
    about: Mapping[str, Any]
    trees: TreeBounds | None = None

    @cached_property
    def felt(self) -> Felt:
        """How far errors of each layer are felt; tried once, whatever the precision."""
        return felt_in(self.graph, self.ranges)


@dataclass(frozen=True, slots=True)
class Made:
    """One way to evaluate the graph."""

    strategy: Strategy
    draft: Draft
    plan: Plan
    notes: tuple[str, ...]


def planned(task: Task, precision: Precision) -> Made:
    """The best of all strategies on the task's line. Raises: ModelError."""
    made = _alternatives(task, precision)
    plans, strategies = [m.plan for m in made], [m.strategy for m in made]
    best = fastest(strategies, plans, task.line)
    verify_plan(plans[best])
    ways = compared(strategies, plans, best, task.line)
    reason = f"chosen for {task.line.name}" if task.line else "chosen for few bytes"
    advice = "" if task.line else "; `mpcserve compile --network` chooses by time"
    note = f"{reason}: {made[best].strategy}{advice}"
    plan = replace(plans[best], alternatives=ways)
    return replace(made[best], plan=plan, notes=(*made[best].notes, note))


def encoded_weights(plan: Plan, draft: Draft) -> Mapping[str, NDArray[np.int64]]:
    """Each weight as integers at its value's fraction bits."""
    return {
        name: in_ulps(draft.arrays[name], plan.value(id).frac_bits).astype(np.int64)
        for name, id in plan.weights.items()
    }


def _alternatives(task: Task, precision: Precision) -> list[Made]:
    """A plan of every strategy that makes a difference."""
    made: list[Made] = []
    basic, notes = _draft(task, precision, BASIC)
    ways: dict[Way, tuple[Draft, list[str]]] = {BASIC: (basic, notes)}
    if task.line:
        grouped = _draft(task, precision, GROUPED)
        if len(grouped[0].steps) != len(basic.steps):
            ways[GROUPED] = grouped
        if any(s.op == "spectral" and prod(s.shape) >= HALVE_FROM for s in basic.steps):
            ways[WHOLE] = _draft(task, precision, WHOLE)
            if GROUPED in ways:
                ways[BOTH] = _draft(task, precision, BOTH)
    for way, (draft, notes) in ways.items():
        for chunk in CHUNKS:
            plan = assign_widths(draft, task.name, chunk, **task.about)
            if all(plan != m.plan for m in made):
                made.append(Made(Strategy(way, chunk), draft, plan, tuple(notes)))
    return made + [other for m in made if (other := _rectified(m, task.line or LINES[0]))]


def _rectified(made: Made, line: Line) -> Made | None:
    """With a round less for every max(x, 0) where that pays."""
    if (found := rectified(made.plan, line)) is None:
        return None
    plan, number = found
    moved = ((name, number[id]) for name, id in made.draft.tensors.items())
    tensors = {name: id for name, id in moved if id != GONE}
    strategy = replace(made.strategy, rectified=True)
    return Made(strategy, replace(made.draft, tensors=tensors), plan, made.notes)


def _lowered(task: Task, way: Way, scales: Scales) -> Draft:
    """The graph at some scales. Raises: ModelError."""
    draft, problems = lower(task.graph, task.ranges, scales, task.registry, way, task.trees)
    raise_all(task.graph.name, problems)
    for step in DRAFTS:
        draft = step(draft)
        check_draft(draft, step.__name__)
    return draft


def _draft(task: Task, precision: Precision, way: Way) -> tuple[Draft, list[str]]:
    """(draft that needs no more extends, notes). Raises: ModelError."""
    ring, frac_bits = precision.ring, precision.frac_bits
    usual = frac_bits or USUAL
    compares = has_trees(task.graph)
    if compares and ring == 32:
        raise ConfigError("ring is 32, trees are compared in 64 bits", "leave ring out")
    finer = finer_inputs(task.ranges, usual) if compares else {}
    scales = Scales(usual, inputs=finer)
    draft = _tuned(task, way, scales)
    if ring != 32:
        draft, scales = _fitted(task, way, draft, scales, frac_bits is None)
    coarse = bool(scales.coarse)
    wide = (
        ring == 64
        or coarse
        or (ring == "auto" and (compares or frac_bits is not None or varies(draft)))
    )
    if ring == "auto" and not wide and (by := _lacking(draft, task.felt)):
        other = _tuned(task, way, Scales(usual + by))
        if not check_fit(other, usual + by):
            draft, usual = other, usual + by
    if wide:
        if frac_bits is None and not compares:
            draft = _with_finer(task, way, draft, Scales(usual))
            draft = finer_weights(draft, FAIR, task.felt)
        draft, notes = extended(draft), []
    else:
        result = narrowed(
            draft,
            partial(_lowered, task, way),
            task.felt,
            usual,
            only=ring == 32,
            fixed=frac_bits is not None,
            tolerance=precision.tolerance,
        )
        raise_all(task.graph.name, result.problems)
        draft, notes = result.draft, [result.note]
    check_draft(draft, "extended")
    return draft, [*notes, *coarse_weights(draft, usual), *coarse_operands(scales.coarse)]


def _fitted(
    task: Task, way: Way, draft: Draft, scales: Scales, may_coarsen: bool
) -> tuple[Draft, Scales]:
    """The draft, or one in which operands of products that need more than 64 bits are coarser.

    Raises: ModelError where that is not enough.
    """
    lacking = check_fit(draft, scales.usual)
    while may_coarsen and (short := short_layers(draft).keys() - scales.coarse):
        scales = replace(scales, coarse=scales.coarse | short)
        draft = _tuned(task, way, scales)
    if short_layers(draft):
        raise_all(task.graph.name, lacking)
    return draft, scales


def _tuned(task: Task, way: Way, scales: Scales) -> Draft:
    """The graph at some scales, its weights and inputs as fine as they need to be."""
    draft = tune_weights(_lowered(task, way, scales), scales.usual)
    check_draft(draft, "tune_weights")
    draft = tune_inputs(draft, scales.usual)
    check_draft(draft, "tune_inputs")
    return draft


def _with_finer(task: Task, way: Way, draft: Draft, scales: Scales) -> Draft:
    """With more fraction bits for small values that must be right relatively, if they fit."""
    finer = finer_scales(task.graph, draft, task.ranges.values, scales)
    if finer is None:
        return draft
    try:
        other = _tuned(task, way, finer)
    except ModelError:  # some bound has no room for more bits
        return draft
    return draft if check_fit(other, scales.usual) else other


def _lacking(draft: Draft, felt: Felt) -> int:
    """Fraction bits to add, as far as samples tell."""
    if any(draft.steps[o.id].power is None for o in draft.outputs):
        return 0
    variance = noise_of(draft, FAIR, felt).variance
    return min(max(ceil(log2(variance) / 2), 0), MOST_FINER) if variance else 0


def varies(draft: Draft) -> bool:
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
