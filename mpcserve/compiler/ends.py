"""Where a function goes over into its asymptote: coarse comparisons, and a choice.

A comparison with an end needs only a few high bits of x. It may be off by its coarseness: within
that, the function and what takes over are both right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, floor, log2

import numpy as np

from mpcserve.compiler.builder import Builder, Ref

ONE_CHUNK = 250
"""A comparison of integers up to here is one round and one bit."""

COARSEST = 16
"""A comparison with an end is at least as fine as a 16th of that end."""

NEARLY = 1.25
"""A range that goes beyond an end by no more than this is fitted as a whole, not compared."""


@dataclass(frozen=True, slots=True)
class End:
    """One end of a range: `bit` is set beyond it (None: x is never there); fit up to `reach`."""

    bit: Ref | None
    reach: float


def below(
    b: Builder, x: Ref, end: float, nearly: float = NEARLY, grain: float | None = None
) -> End:
    """The bit [x < about `end`]: set only below `end`, and always below `reach`.

    `grain`: of the comparison; by default a part of `end`. Cost: a comparison of the high bits of x
    alone.
    """
    held = b.interval(x)
    if held.least >= end - (nearly - 1) * abs(end):
        return End(None, held.least)
    wide = ceil(log2((held.magnitude + abs(end)) / ONE_CHUNK))
    grain = max(abs(end), 2.0**-x.frac_bits) / COARSEST if grain is None else grain
    bits = min(max(-min(wide, floor(log2(grain))), 0), x.frac_bits)
    step = 2.0**-bits
    # The shift errs by less than 1.5 steps.
    threshold = floor(end / step - 0.5)
    coarse = b.offset(b.shift(x, x.frac_bits - bits), -threshold * step)
    return End(b.sign(coarse), max((threshold - 1.5) * step, held.least))


def above(b: Builder, x: Ref, end: float, grain: float | None = None) -> End:
    """As `below`, of the upper end."""
    found = below(b, b.scale(x, -1), -end, grain=grain)
    return End(found.bit, -found.reach)


def replaced(b: Builder, y: Ref, ends: list[tuple[End, Callable[[], Ref]]]) -> Ref:
    """y, and beyond each end the value given there. Cost: one select, where there are ends.

    A select writes as many bits as its readers need; so y is selected too, unless that takes more
    values to choose from: else it would be widened on its own.
    """
    beyond = [(end.bit, value()) for end, value in ends if end.bit is not None]
    if not beyond:
        return y
    within = b.xor([bit for bit, _ in beyond], flip=1)
    some = [(bit, value) for bit, value in beyond if b.interval(value).magnitude > 0]
    if len(some) < len(beyond):
        chosen = b.choose([within, *(bit for bit, _ in some)], [y, *(value for _, value in some)])
        return b.within(chosen, *_hull(b, [y, *(value for _, value in beyond)]))
    gaps = [b.sub(value, y) for _, value in beyond]
    return b.add(y, b.choose([bit for bit, _ in beyond], gaps))


def _hull(b: Builder, xs: list[Ref]) -> tuple[float, float]:
    held = [b.interval(x) for x in xs]
    return min(h.least for h in held), max(h.most for h in held)


def level(b: Builder, like: Ref, value: float) -> Ref:
    """A public number in the shape and at the scale of `like`."""
    one = b.constant(np.full((1,) * len(like.shape), value), like.frac_bits)
    return b.expand(one, like.shape)
