"""Several evaluations in one: the same plan over a new leading axis, one slot for each.

Everything fixed at deployment stays as it is, every other value of shape s becomes one of shape
(slots, *s). Rounds and instructions are the plan's own, so that what is paid per instruction is
paid once for all slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from mpcserve.plan.ops import OPS
from mpcserve.plan.plan import Instruction, Plan, Value

BROADCAST = frozenset({"add", "sub", "mul", "matmul", "expand"})
"""Ops that align operands' axes from the last: lower ranks need ones behind the new axis."""


@dataclass(frozen=True, slots=True)
class Stacked:
    """`of[id]` is the id in `plan` of what was value `id`, `done_by[id]` of what was its op."""

    plan: Plan
    of: tuple[int, ...]
    done_by: tuple[int, ...]


def can_stack(plan: Plan) -> bool:
    """Whether slots can share an evaluation of this plan: most plans' can."""
    if not plan.inputs or any(o.id in plan.static for o in plan.outputs):
        return False
    return not any(_is_alone(plan, i) for i in plan.instructions if i.id not in plan.static)


def _is_alone(plan: Plan, i: Instruction) -> bool:
    if i.op != "conv":
        return False
    # Slots become images of one batch: kernels and whatever is added must be those of all images.
    if i.inputs[1] not in plan.static:
        return True
    for j in i.inputs[2:]:
        shape = plan.value(j).shape
        if j in plan.static:
            if len(shape) == len(i.value.shape) and shape[0] != 1:
                return True
        elif shape != i.value.shape:
            return True
    return False


def stack(plan: Plan, slots: int) -> Stacked:
    """The plan of `slots` evaluations of `plan`, of which `can_stack` holds."""
    assert slots > 1 and can_stack(plan)
    build = _Stacking(plan, slots)
    for i in plan.instructions:
        done_by, made = build.keep(i) if i.id in plan.static else build.stack(i)
        build.done_by.append(done_by)
        build.of.append(made)
    stacked = Plan(
        name=plan.name,
        instructions=tuple(build.made),
        inputs=tuple(replace(s, id=build.of[s.id], shape=(slots, *s.shape)) for s in plan.inputs),
        outputs=tuple(replace(s, id=build.of[s.id], shape=(slots, *s.shape)) for s in plan.outputs),
        batch=slots * plan.batch,
        opset=plan.opset,
        model_digest=plan.model_digest,
        notes=plan.notes,
        alternatives=plan.alternatives,
    )
    return Stacked(stacked, tuple(build.of), tuple(build.done_by))


@dataclass(slots=True)
class _Stacking:
    plan: Plan
    slots: int
    made: list[Instruction] = field(default_factory=list)
    of: list[int] = field(default_factory=list)
    done_by: list[int] = field(default_factory=list)

    def keep(self, i: Instruction) -> tuple[int, int]:
        """What is fixed at deployment: who does it, and who has its value."""
        made = self.add(i, i.op, [self.of[j] for j in i.inputs], i.value, i.attrs)
        return made, made

    def stack(self, i: Instruction) -> tuple[int, int]:
        """The same of everything else."""
        if i.op == "conv":
            return self.conv(i)
        if i.op == "tally":
            return self.tally(i)
        rank = len(i.value.shape)
        operands = [self.operand(i, j, rank) for j in i.inputs]
        attrs = {**i.attrs, **_ATTRS[i.op](i.attrs, self.slots)} if i.op in _ATTRS else i.attrs
        value = replace(i.value, shape=(self.slots, *i.value.shape))
        made = self.add(i, i.op, operands, value, attrs)
        return made, made

    def operand(self, i: Instruction, j: int, rank: int) -> int:
        """Value j as a stacked instruction of this rank reads it."""
        value = self.plan.value(j)
        if j in self.plan.static:
            if i.op in BROADCAST:
                return self.of[j]
            return self.shaped(i, "expand", self.of[j], value, (self.slots, *value.shape))
        if i.op not in BROADCAST or len(value.shape) == rank:
            return self.of[j]
        ones = (1,) * (rank - len(value.shape))
        return self.shaped(i, "reshape", self.of[j], value, (self.slots, *ones, *value.shape))

    def conv(self, i: Instruction) -> tuple[int, int]:
        """Slots are images of one batch."""
        images = [self.images(i, j) for j in i.inputs]
        n, *rest = i.value.shape
        value = replace(i.value, shape=(self.slots * n, *rest))
        out = self.add(i, "conv", images, value, i.attrs)
        return out, self.shaped(i, "reshape", out, value, (self.slots, *i.value.shape))

    def tally(self, i: Instruction) -> tuple[int, int]:
        """The bits that are counted lie along the first axis."""
        (j,) = i.inputs
        bits = self.plan.value(j)
        perm = (1, 0, *range(2, len(bits.shape) + 1))
        turned = replace(bits, shape=(bits.shape[0], self.slots, *bits.shape[1:]))
        turn = self.add(i, "transpose", [self.of[j]], turned, {"perm": perm})
        value = replace(i.value, shape=(self.slots, *i.value.shape))
        made = self.add(i, "tally", [turn], value, i.attrs)
        return made, made

    def images(self, i: Instruction, j: int) -> int:
        """Value j with the slots' images in one row."""
        if j in self.plan.static:
            return self.of[j]
        value = self.plan.value(j)
        n, *rest = value.shape
        return self.shaped(i, "reshape", self.of[j], value, (self.slots * n, *rest))

    def shaped(
        self, i: Instruction, op: str, operand: int, value: Value, shape: tuple[int, ...]
    ) -> int:
        """A view of `operand`, whose value was `value`, in another shape."""
        return self.add(i, op, [operand], replace(value, shape=shape), {"shape": shape})

    def add(
        self,
        i: Instruction,
        op: str,
        operands: Sequence[int],
        value: Value,
        attrs: Mapping[str, Any],
    ) -> int:
        """Append an instruction for the sake of `i`; its id."""
        attrs = attrs if isinstance(attrs, MappingProxyType) else MappingProxyType(dict(attrs))
        self.made.append(Instruction(len(self.made), op, tuple(operands), value, attrs, i.layer))
        return len(self.made) - 1


_Attrs = Mapping[str, Any]


_ATTRS: Mapping[str, Callable[[_Attrs, int], dict[str, Any]]] = {
    "reshape": lambda a, n: {"shape": (n, *a["shape"])},
    "expand": lambda a, n: {"shape": (n, *a["shape"])},
    "transpose": lambda a, n: {"perm": (0, *(p + 1 for p in a["perm"]))},
    "slice": lambda a, n: {
        "starts": (0, *a["starts"]),
        "stops": (n, *a["stops"]),
        "steps": (1, *a["steps"]),
    },
    "concat": lambda a, n: {"axis": a["axis"] + 1},
    "gather": lambda a, n: {"axis": a["axis"] + 1},
    "combine": lambda a, n: {"axis": a["axis"] + 1},
    "pad": lambda a, n: {"before": (0, *a["before"]), "after": (0, *a["after"])},
    "sum": lambda a, n: {"axes": tuple(axis + 1 for axis in a["axes"])},
}
"""What an op's attributes become, where they speak of axes: no axis of a plan is negative."""

assert set(_ATTRS) <= set(OPS)
