"""A draft: the plan before widths are decided, with real intervals instead of bounds.

Step i defines value i. Weights are still real arrays; their fraction bits may change until the
widths are assigned. `law` is checked after every draft pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpcserve.compiler.interval import Interval, bound_of
from mpcserve.errors import PlanError
from mpcserve.plan.ops import OPS, PRODUCTS
from mpcserve.plan.plan import InputSpec, OutputSpec

Shape = tuple[int, ...]

STRENGTH = ("exact", "proved", "calibrated", "assumed")
"""From what nothing can break to what only a convention says."""


def weakest(known: Sequence[str]) -> str:
    """How a bound is known that rests on several others."""
    return max(known, key=STRENGTH.index, default="exact")


@dataclass(frozen=True, slots=True)
class Seen:
    """What samples showed of a tensor: the hull of its elements, margin included; their mean square
    and the share of them that is neither zero nor at an end of a Clip. `nearest` to zero, where all
    are on one side of it."""

    low: float
    high: float
    power: float
    active: float
    nearest: float = 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction without a width.

    `stated`: a range that mathematics gives, `sampled`: one that samples give; both are intersected
    with what interval arithmetic finds. `power`, `active`: mean square and share of elements
    that are free to move, in samples. `is_bit`: the value is 0 or 1, shared mod 2. `nearest`: see
    `Seen`.
    """

    op: str
    inputs: tuple[int, ...]
    attrs: Mapping[str, Any]
    shape: Shape
    frac_bits: int
    interval: Interval
    known: str
    layer: str
    stated: Interval | None = None
    sampled: Interval | None = None
    power: float | None = None
    active: float | None = None
    is_bit: bool = False
    nearest: float = 0.0

    @property
    def bound(self) -> int:
        """|x| < 2^bound ulp."""
        return 0 if self.is_bit else bound_of(self.interval, self.frac_bits)


@dataclass(frozen=True, slots=True)
class Draft:
    """The whole program; `arrays`: real values per weight name, `tensors`: ids of the float graph's
    tensors, as far as they are computed as such."""

    steps: tuple[Step, ...]
    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]
    arrays: Mapping[str, NDArray[np.floating]] = field(default_factory=lambda: MappingProxyType({}))
    tensors: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    def users(self) -> dict[int, list[int]]:
        """Value id → ids of the steps that read it, in order."""
        found: dict[int, list[int]] = {}
        for id, step in enumerate(self.steps):
            for j in dict.fromkeys(step.inputs):
                found.setdefault(j, []).append(id)
        return found

    def renumbered(self, steps: Sequence[Step], number: Sequence[int]) -> Draft:
        """The program `steps`, in which value k of this one is called number[k]."""
        return replace(
            self,
            steps=tuple(steps),
            inputs=tuple(replace(i, id=number[i.id]) for i in self.inputs),
            outputs=tuple(replace(o, id=number[o.id]) for o in self.outputs),
            tensors={name: number[id] for name, id in self.tensors.items()},
        )

    def keep(self, ids: Sequence[int], instead: Mapping[int, int] | None = None) -> Draft:
        """Only the steps `ids`, renumbered; reads of a key of `instead` become its value."""
        instead = instead or {}
        number = {old: new for new, old in enumerate(ids)}

        def renamed(id: int) -> int:
            return number[instead.get(id, id)]

        steps = tuple(
            replace(self.steps[id], inputs=tuple(map(renamed, self.steps[id].inputs))) for id in ids
        )
        names = {s.attrs["name"] for s in steps if s.op == "weight"}
        return Draft(
            steps,
            tuple(replace(i, id=renamed(i.id)) for i in self.inputs),
            tuple(replace(o, id=renamed(o.id)) for o in self.outputs),
            {k: v for k, v in self.arrays.items() if k in names},
            {k: renamed(v) for k, v in self.tensors.items() if instead.get(v, v) in number},
        )


def check_draft(draft: Draft, after: str) -> None:
    """Check the law. Raises: PlanError naming the pass."""
    problems = tuple(_breaches(draft))
    if problems:
        raise PlanError(
            f"compiler pass {after!r} broke the draft: {problems[0]}",
            "this is a defect of mpcserve; please report the model",
            problems,
        )


def _breaches(draft: Draft) -> Iterator[str]:
    for id, s in enumerate(draft.steps):
        where = f"step {id} {s.op} ({s.layer})"
        if any(not 0 <= j < id for j in s.inputs):
            yield f"{where}: operand not defined before it"
            continue
        xs = [draft.steps[j] for j in s.inputs]
        rule = OPS[s.op].shape
        if rule is not None and rule([x.shape for x in xs], s.attrs) != s.shape:
            yield f"{where}: shape {s.shape}"
        if np.broadcast_shapes(s.interval.low.shape, s.shape) != s.shape:
            yield f"{where}: interval of shape {s.interval.low.shape} for {s.shape}"
        if s.op in PRODUCTS and s.frac_bits != (
            xs[0].frac_bits + xs[1].frac_bits - s.attrs["truncate"]
        ):
            yield f"{where}: frac_bits {s.frac_bits}"
        if s.op == "weight" and s.attrs["name"] not in draft.arrays:
            yield f"{where}: no values of {s.attrs['name']!r}"
