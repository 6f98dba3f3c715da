"""What may be traded for rounds: ways to lower the same graph, compared by estimated seconds.

A comparison in larger chunks deals more bits and, for wide values, saves a round. A maximum of
three or four values at once compares every pair: more bits dealt, but four rounds where a
tournament takes six. A smooth function of many elements is made of two halves (see `smooth`) for
fewer bits dealt, or whole in a round or two less. max(x, 0) of small layers may be one instruction
of two rounds (see `rectify`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from mpcserve.plan import Alternative, Plan, bill_of
from mpcserve.plan.estimate import LINES, Line, online_seconds


@dataclass(frozen=True, slots=True)
class Way:
    """How a graph is lowered. `group`: values of which a maximum is found at once; 2 is a
    tournament of pairs. `halves`: whether smooth functions of many elements are made of two.
    """

    group: int = 2
    halves: bool = True

    def __str__(self) -> str:
        maxima = "maxima by pairs" if self.group == 2 else f"maxima of {self.group} at once"
        return maxima if self.halves else f"{maxima}, smooth functions whole"


@dataclass(frozen=True, slots=True)
class Strategy:
    """`chunk`: most bits of a comparison's chunk. `rectified`: see `rectify`."""

    way: Way
    chunk: int
    rectified: bool = False

    def __str__(self) -> str:
        joined = ", max(x, 0) in two rounds" if self.rectified else ""
        return f"{self.way}, chunks of {self.chunk} bits{joined}"


BASIC, GROUPED, WHOLE, BOTH = Way(), Way(4), Way(halves=False), Way(4, False)
CHUNKS = (5, 8)
"""What is tried, fewest dealt bytes first: of two that take equally long, the earlier is taken."""

CLEARLY = 0.97
"""A plan with more bytes must be faster by this factor to be preferred."""


def fastest(strategies: Sequence[Strategy], plans: Sequence[Plan], line: Line | None) -> int:
    """Index of the plan to prefer on `line`; with none declared the first, of the fewest dealt
    bytes, or that with the rounds saved that cost less on any line."""
    if line is None:
        saved = replace(strategies[0], rectified=True)
        return strategies.index(saved) if saved in strategies else 0
    seconds = [online_seconds(plan, line) for plan in plans]
    good = [k for k, s in enumerate(seconds) if CLEARLY * s <= min(seconds)]
    return min(good, key=lambda k: bill_of(plans[k]).dealt_bytes)


def compared(
    strategies: Sequence[Strategy], plans: Sequence[Plan], chosen: int, line: Line | None
) -> tuple[Alternative, ...]:
    """What each costs, and its estimated seconds on every named network."""
    lines = LINES if line is None or line in LINES else (*LINES, line)
    found = []
    for k, (strategy, plan) in enumerate(zip(strategies, plans, strict=True)):
        bill = bill_of(plan)
        seconds = {at.name: float(f"{online_seconds(plan, at):.3g}") for at in lines}
        costs = bill.rounds, bill.online_bytes, bill.dealt_bytes
        found.append(Alternative(str(strategy), *costs, MappingProxyType(seconds), k == chosen))
    return tuple(found)
