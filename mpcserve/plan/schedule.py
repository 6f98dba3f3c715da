"""Rounds: an instruction starts when its operands are known; all that wait, wait together.

The schedule is a pure function of the plan, so alice and bob send the same messages in the same
order, and the bill can count rounds without running anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mpcserve.plan.ops import OPS, Cost
from mpcserve.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class Schedule:
    """`start[i]`: round before which instruction i begins. `levels[r]`: ids that begin there.

    Messages of round r are ordered by (start round, id).
    """

    start: tuple[int, ...]
    levels: tuple[tuple[int, ...], ...]
    rounds: int


def schedule_of(plan: Plan, cost_of: Callable[[Plan, int], Cost] | None = None) -> Schedule:
    """ASAP schedule: start = latest finish of the operands; finish = start + own rounds."""
    cost_of = cost_of or cost_of_instruction
    start: list[int] = []
    finish: list[int] = []
    for i in plan.instructions:
        begin = max((finish[j] for j in i.inputs), default=0)
        start.append(begin)
        finish.append(begin + len(cost_of(plan, i.id).rounds))
    rounds = max(finish, default=0)
    levels: list[list[int]] = [[] for _ in range(rounds + 1)]
    for id, begin in enumerate(start):
        levels[begin].append(id)
    return Schedule(tuple(start), tuple(map(tuple, levels)), rounds)


def cost_of_instruction(plan: Plan, id: int) -> Cost:
    """The cost face of one instruction. Sign is paid per operand element, select per output.

    What is not opened saves the last round, which would open it.
    """
    i = plan[id]
    cost = OPS[i.op].cost(i.value.size, i.value.width, i.attrs, len(i.inputs))
    return Cost(cost.rounds[:-1], cost.dealt) if id in plan.unopened else cost
