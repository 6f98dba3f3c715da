"""A plan as one server walks it: what the plan says is looked up here, once per deployment.

A step knows where its operands lie, which values nobody reads after it, and a function that does
nothing but its work. There is a list of steps for before the input and one for each round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mpcserve.kernels.tasks import Run
from mpcserve.plan.ops import OPS, PRODUCTS
from mpcserve.plan.plan import Instruction, Plan
from mpcserve.plan.schedule import cost_of_instruction, schedule_of
from mpcserve.protocol.opening import told
from mpcserve.protocol.parties import Material, PrepareIO, Side, Steps
from mpcserve.protocol.primitives import join, product, rectify, select, sign, spectral, tally
from mpcserve.protocol.primitives.local_ops import Local, ready_local
from mpcserve.protocol.results import Results
from mpcserve.ring import Words

NOTHING: Words = np.empty(0, np.uint64)
"""Stands for a product's fixed operand, which is not read again, and for what is not known yet."""

Prepare = Callable[[PrepareIO, Sequence[Words]], tuple[Words, Material]]
Evaluate = Callable[[Material, list[Words]], Steps[Any]]


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction. `over`: operands that nobody reads afterwards. Local, or both others."""

    id: int
    operands: tuple[int, ...]
    over: tuple[int, ...]
    local: Local | None = None
    prepare: Prepare | None = None
    evaluate: Evaluate | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Fixed:
    """What one server knows of a plan from its deployment on: by id Δ, its shares of λ, weights."""

    deltas: Mapping[int, Words]
    halves: Mapping[int, Words]
    products: Mapping[int, product.Fixed]


class Walk:
    """The steps of `plan` on one server: `before` the input, and `levels`, one for each round.

    Inputs are no step; what is fixed is none either. `results` reads values at the end.
    """

    def __init__(self, plan: Plan, side: Side, fixed: Fixed, run: Run, results: Results) -> None:
        self.plan, self.results = plan, results
        self.deltas = _values(plan, fixed.deltas)
        self.halves = _values(plan, fixed.halves)
        before = (_before(plan, i, fixed, run) for i in plan.computed)
        self.before = tuple(_finishing(plan, before, ()))
        ids = {i.id for i in plan.computed}
        order = [id for level in schedule_of(plan).levels for id in level if id in ids]
        online = (_online(plan, plan[id], side, fixed, run) for id in order)
        steps = _finishing(plan, online, results.tagged)
        made = {step.id: step for step in steps}
        self.levels = tuple(
            tuple(made[id] for id in level if id in ids) for level in schedule_of(plan).levels
        )


def _values(plan: Plan, known: Mapping[int, Words]) -> list[Words]:
    return [known.get(i.id, NOTHING) for i in plan.instructions]


def _finishing(plan: Plan, steps: Iterable[Step], tagged: Iterable[int]) -> list[Step]:
    """The same steps in the same order, each with the operands it is the last to read."""
    made = list(steps)
    kept = plan.static | {o.id for o in plan.outputs} | set(tagged)
    done: list[Step] = []
    for step in reversed(made):
        over = tuple(set(step.operands) - kept)
        kept |= set(over)
        done.append(Step(step.id, step.operands, over, step.local, step.prepare, step.evaluate))
    return done[::-1]


def _before(plan: Plan, i: Instruction, fixed: Fixed, run: Run) -> Step:
    if OPS[i.op].local:
        return Step(i.id, i.inputs, (), local=ready_local(i, plan.operands(i), False))
    return Step(i.id, i.inputs, (), prepare=_prepare(i, fixed, run))


def _prepare(i: Instruction, fixed: Fixed, run: Run) -> Prepare:
    if i.op in PRODUCTS:
        weight = fixed.products.get(i.id)
        return lambda io, halves: product.prepare(io, i, halves, fixed.deltas, weight, run)
    if i.op == "sign":
        return lambda io, halves: sign.prepare(io, i)
    if i.op == "rectify":
        return lambda io, halves: rectify.prepare(io, i, halves)
    if i.op == "all":
        return lambda io, halves: join.prepare(io, i, halves)
    if i.op == "spectral":
        return lambda io, halves: spectral.prepare(io, i, halves)
    if i.op == "tally":
        return lambda io, halves: tally.prepare(io, i)
    if i.op == "select":
        return lambda io, halves: select.prepare_select(io, i, halves)
    assert i.op == "extend"
    return lambda io, halves: select.prepare_extend(io, i, halves)


def _online(plan: Plan, i: Instruction, side: Side, fixed: Fixed, run: Run) -> Step:
    if OPS[i.op].local:
        return Step(i.id, i.inputs, (), local=ready_local(i, plan.operands(i), True))
    evaluate = _evaluate(i, side, fixed, run)
    if i.id in plan.unopened:
        rounds = len(cost_of_instruction(plan, i.id).rounds)
        return Step(i.id, i.inputs, (), evaluate=lambda m, d: told(evaluate(m, d), rounds))
    return Step(i.id, i.inputs, (), evaluate=evaluate)


def _evaluate(i: Instruction, side: Side, fixed: Fixed, run: Run) -> Evaluate:
    if i.op in PRODUCTS:
        weight = fixed.products.get(i.id)
        return lambda m, deltas: product.evaluate(side, i, m, deltas, fixed.deltas, weight, run)
    if i.op == "sign":
        return lambda m, deltas: sign.evaluate(side, i, m, deltas[0])
    if i.op == "rectify":
        return lambda m, deltas: rectify.evaluate(side, i, m, deltas[0], run)
    if i.op == "all":
        return partial(join.evaluate, side, i)
    if i.op == "spectral":
        return lambda m, deltas: spectral.evaluate(side, i, m, deltas[0])
    if i.op == "tally":
        return lambda m, deltas: tally.evaluate(side, i, m, deltas[0])
    if i.op == "select":
        return lambda m, deltas: select.evaluate_select(side, i, m, deltas, run)
    assert i.op == "extend"
    return lambda m, deltas: select.evaluate_extend(side, i, m, deltas[0])


def complete(plan: Plan, known: dict[int, Words], is_delta: bool) -> None:
    """Add what local ops make of the values that are fixed at deployment."""
    for i in plan.instructions:
        missing = i.id in plan.static and i.id not in known and i.op != "weight"
        if missing and all(j in known for j in i.inputs):
            operands = [known[j] for j in i.inputs]
            known[i.id] = ready_local(i, plan.operands(i), is_delta)(operands)
