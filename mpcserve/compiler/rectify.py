"""max(x, 0) in two rounds, where it is cheaper to deal for that than to wait for a third.

A selection of x by its own sign becomes one instruction, `rectify`, if carol deals what it takes
more in less time than a round takes: of small layers, and the slower the network the larger these
may be. Compared are the plans as they come out of `widths`, so that every strategy is tried both
ways.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import MappingProxyType

from mpcserve.plan import Instruction, Plan
from mpcserve.plan.estimate import RATES, Line
from mpcserve.plan.ops import OPS
from mpcserve.plan.schedule import cost_of_instruction
from mpcserve.plan.verify import MAX_CHUNK

DEALING = 0.3e9
"""Bytes a second, small ones, that carol deals, bob unpacks and alice and bob expand on one machine
whose cores they share."""

MOST_CHUNKS = 4

GONE = -1


def rectified(plan: Plan, line: Line) -> tuple[Plan, tuple[int, ...]] | None:
    """The plan with `rectify` where that pays on `line`, and each old value's new id: GONE of a
    sign that is read no more. None if it pays nowhere."""
    readers = Counter(j for i in plan.instructions for j in i.inputs)
    readers.update(o.id for o in plan.outputs)
    instead = {
        i.id: rectify
        for i in plan.instructions
        if (rectify := _rectify(plan, i, readers)) is not None and _pays(plan, i, rectify, line)
    }
    if not instead:
        return None
    gone = {plan[id].inputs[0] for id in instead}
    number: list[int] = []
    made: list[Instruction] = []
    for i in plan.instructions:
        if i.id in gone:
            number.append(GONE)
            continue
        new = instead.get(i.id, i)
        inputs = tuple(number[j] for j in new.inputs)
        number.append(len(made))
        made.append(replace(new, id=len(made), inputs=inputs))
    renamed = replace(
        plan,
        instructions=tuple(made),
        inputs=tuple(replace(s, id=number[s.id]) for s in plan.inputs),
        outputs=tuple(replace(o, id=number[o.id]) for o in plan.outputs),
    )
    return renamed, tuple(number)


def _rectify(plan: Plan, i: Instruction, readers: Counter[int]) -> Instruction | None:
    """What may take the place of a selection: of x where it is not negative, by a sign of its own
    that nobody else reads and that takes two rounds."""
    if i.op != "select" or len(i.inputs) != 2 or i.attrs["when"] or not i.attrs["nonnegative"]:
        return None
    bit, x = plan[i.inputs[0]], i.inputs[1]
    if bit.op != "sign" or bit.inputs != (x,) or readers[bit.id] != 1:
        return None
    (m,) = i.attrs["widths"]
    if sum(bit.attrs["chunks"]) + 1 != m or len(cost_of_instruction(plan, bit.id).rounds) < 2:
        return None
    ways = (
        replace(i, op="rectify", inputs=(x,), attrs=MappingProxyType({"chunks": chunks}))
        for count in range(2, MOST_CHUNKS + 1)
        if max(chunks := _even(m - 1, count)) <= MAX_CHUNK
    )
    return min(ways, key=_dealt, default=None)


def _even(bits: int, count: int) -> tuple[int, ...]:
    """So many chunks, as even as may be, the larger first."""
    each, more = divmod(bits, count)
    return tuple(each + (k < more) for k in range(count))


def _dealt(i: Instruction) -> int:
    return OPS["rectify"].cost(i.value.size, i.value.width, i.attrs, 1).dealt


def _pays(plan: Plan, select: Instruction, rectify: Instruction, line: Line) -> bool:
    """Whether dealing what it takes more is quicker than the round that it saves."""
    both = (cost_of_instruction(plan, id).dealt for id in (select.id, select.inputs[0]))
    more = _dealt(rectify) - sum(both)
    return more / min(line.bits_per_second / 8, DEALING) <= line.rtt / 2 + RATES.turn
