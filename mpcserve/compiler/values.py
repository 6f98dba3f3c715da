"""What is known of the values of a draft in the making: ranges proved, stated, seen in samples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpcserve.compiler import interval as iv
from mpcserve.compiler.draft import Seen, Shape, Step
from mpcserve.compiler.interval import Interval
from mpcserve.compiler.ranges import settle
from mpcserve.plan.ops import BIT_MOVES, OPS, PRODUCTS

WIDEST_BOUND = 62
"""A bound that every instruction can hold in 64 bits: two spare bits for a general select."""

ROUNDING_BITS = 6
"""By how many ulps fixed point may be outside what samples showed, as a power of two."""


def excess_of(step: Step) -> int:
    """Bits that a step needs beyond 64: a product has those that it truncates besides."""
    spare = step.attrs["truncate"] if step.op in PRODUCTS else 0
    return step.bound + int(spare) - WIDEST_BOUND


@dataclass(frozen=True, slots=True)
class Ref:
    """A secret value: its id in the draft, its shape and its fraction bits."""

    id: int
    shape: Shape
    frac_bits: int

    def __bool__(self) -> bool:
        raise TypeError("a secret has no truth value")


SOURCES = ("input", "weight", "constant")


class Values:
    """The steps so far, and what their intervals say. `frac_bits`: of what is computed."""

    def __init__(self, frac_bits: int) -> None:
        self.frac_bits = frac_bits
        self._steps: list[Step] = []
        self._places: set[int] = set()

    def interval(self, x: Ref) -> Interval:
        """Range of x as reals, per element (compact)."""
        return self._steps[x.id].interval

    def bound(self, x: Ref) -> int:
        """|x| < 2^bound ulp."""
        return self._steps[x.id].bound

    def known(self, x: Ref) -> str:
        """How the bound is known."""
        return self._steps[x.id].known

    def one_side(self, x: Ref) -> tuple[float, float]:
        """The ends of x, where samples that were all on one side of zero tell its sign.

        For divisors and the like, which cannot be zero: for all else a sign must be proved. Samples
        beyond what x can be tell nothing: of 1 / x near a pole, which fixed point cuts off, say.
        """
        held, step, factor = self.interval(x), self._steps[x.id], 1.0
        while not step.nearest and step.op in (*BIT_MOVES, "scale") and len(step.inputs) == 1:
            before = self._steps[step.inputs[0]]
            if step.op == "scale":
                factor *= step.attrs["factor"] * 2.0 ** (before.frac_bits - step.frac_bits)
            step = before
        nearest = step.nearest * factor
        if not held.least < nearest < held.most:
            return held.least, held.most
        if nearest > 0:
            return nearest, held.most
        return held.least, nearest if nearest < 0 else held.most

    def is_tight(self, x: Ref) -> bool:
        """Whether x takes every value of its interval: it comes from one value by local steps."""
        step = self._steps[x.id]
        while step.op not in SOURCES:
            if not OPS[step.op].local or len(step.inputs) != 1 or step.op == "sum":
                return False
            step = self._steps[step.inputs[0]]
        return True

    def within(self, x: Ref, low: Any, high: Any) -> Ref:
        """State a range of x that interval arithmetic cannot see; the same Ref."""
        rank = len(x.shape)
        ends = [_ranked(np.asarray(e, np.float64), rank) for e in (low, high)]
        step = replace(self._steps[x.id], stated=Interval(*ends))
        self._steps[x.id] = self._settle(step)
        return x

    def sampled(self, x: Ref, seen: Seen) -> None:
        """What samples showed of x; so also of what x merely rearranges.

        Of a place in a table they tell nothing: one that they did not show is as good as any other.
        """
        step = self._steps[x.id]
        if self.is_place(x):
            self._steps[x.id] = replace(step, power=seen.power, active=seen.active)
            return
        if step.op in ("reshape", "transpose"):
            self.sampled(self.ref(step.inputs[0]), seen)
        elif step.op == "offset":
            before = self._steps[step.inputs[0]]
            self._steps[step.inputs[0]] = replace(before, active=seen.active)
        # Samples pass through in floats; fixed point may be off by some ulps, also at zero.
        slack = 2.0 ** (ROUNDING_BITS - self.frac_bits)
        hull = iv.uniform(seen.low - slack, seen.high + slack, len(x.shape))
        nearest = float(np.copysign(max(abs(seen.nearest) - slack, 0.0), seen.nearest))
        step = replace(step, sampled=hull, power=seen.power, active=seen.active, nearest=nearest)
        self._steps[x.id] = self._settle(step)

    def as_place(self, x: Ref) -> Ref:
        """State that x is a place that structure bounds, as that of a largest element; same Ref."""
        self._places.add(x.id)
        return x

    def is_place(self, x: Ref) -> bool:
        """Whether x is such a place, or only moves some."""
        step = self._steps[x.id]
        if x.id in self._places or step.op not in BIT_MOVES or not step.inputs:
            return x.id in self._places
        return all(self.is_place(self.ref(j)) for j in step.inputs)

    def step(self, x: Ref) -> Step:
        """What makes x."""
        return self._steps[x.id]

    def ref(self, id: int) -> Ref:
        """The Ref of value `id`."""
        step = self._steps[id]
        return Ref(id, step.shape, step.frac_bits)

    def part_of(self, x: Ref, start: int, stop: int) -> tuple[Ref, int]:
        """What holds elements `start` … `stop` of x in memory order, and where in x it begins.

        That is x, or one of what x joins: whoever reads it need not wait for the others.
        """
        step, at = self._steps[x.id], 0
        if step.op == "reshape":
            return self.part_of(self.ref(step.inputs[0]), start, stop)
        if step.op == "concat" and prod(step.shape[: step.attrs["axis"]]) == 1:
            for part in map(self.ref, step.inputs):
                size = prod(part.shape)
                if at <= start and stop <= at + size:
                    found, first = self.part_of(part, start - at, stop - at)
                    return found, at + first
                at += size
        return x, 0

    def _settle(self, step: Step) -> Step:
        return settle(step, [self._steps[j] for j in step.inputs])


def _ranked(x: NDArray[np.float64], rank: int) -> NDArray[np.float64]:
    return x.reshape((1,) * (rank - x.ndim) + x.shape)
