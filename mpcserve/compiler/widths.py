"""Draft → plan: how many bits each value is shared with, decided by what its readers need.

Backwards over the steps, every reader states the width it needs of each operand:

    sign, relu's select       bound + 1           (they read no more)
    general select, extend    bound + 2
    product                   its ring: accumulator bound + 1, or what its result must deliver + t
    shift by k                own width + k
    other local steps         own width
    output                    bound + 1

A product delivers at most 64 − t bits after truncating t. Where more is needed, an `extend` is put
where it touches the fewest elements: a round and the bits that a wider ring costs, nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from types import MappingProxyType
from typing import Any

from mpcserve.compiler.builder import REARRANGES
from mpcserve.compiler.chunks import CHUNK_BITS, sign_chunks
from mpcserve.compiler.draft import Draft, Step
from mpcserve.plan.ops import OPS, PRODUCTS
from mpcserve.plan.plan import RING_BITS, Instruction, Plan, Value
from mpcserve.plan.verify import MAX_CHUNK

MANY_ELEMENTS = 1 << 13
"""From here on, what a comparison deals weighs more than a round."""


MUCH_WIDER, MANY_TERMS, MANY_SUMMED = 8, 32, 1 << 15
"""Bits that a reader asks of sums beyond their own, elements added in each, and in all: where all
are more, the sums are extended and not what they add."""


def extended(draft: Draft, ring: int = RING_BITS) -> Draft:
    """The draft with `extend` steps where a product of `ring` bits cannot deliver enough."""
    while wider := _Needs(draft, ring).wider:
        draft = _insert(draft, wider)
    return draft


def demanded_widths(draft: Draft) -> list[int]:
    """Per value, the most bits that a reader needs of it, extends left aside."""
    return _Needs(draft, RING_BITS).width


def rings_of(draft: Draft) -> dict[int, int]:
    """The ring of each product of a draft that needs no more `extend`."""
    width = demanded_widths(draft)
    return {
        id: ring_of(step, width[id]) for id, step in enumerate(draft.steps) if step.op in PRODUCTS
    }


def assign_widths(
    draft: Draft, name: str, chunk: int = CHUNK_BITS, many: float = MANY_ELEMENTS, **about: Any
) -> Plan:
    """The plan of a draft that needs no more `extend`. `chunk`: most bits compared at once; `many`:
    elements of a comparison from which on bytes dealt weigh more than a round."""
    needs = _Needs(draft, RING_BITS)
    assert not needs.wider, "insert the extends first"
    instructions = tuple(
        _instruction(id, step, needs.width, draft, chunk, many)
        for id, step in enumerate(draft.steps)
    )
    return Plan(name, instructions, draft.inputs, draft.outputs, **about)


TOO_MANY = 1 << 62
"""More elements than any tensor has."""

TRUNCATING = (*PRODUCTS, "spectral")
"""Instructions that open a truncated share: they deliver at most 64 − t bits."""

MOVED = ("reshape", "transpose")
"""Rearrangements that keep every element once."""

OUTPUT = -1
"""Stands for the data owner among the readers of a value."""


def least_width(step: Step) -> int:
    """The narrowest width that holds the value."""
    return 1 if step.is_bit else max(step.bound + 1, 2)


@dataclass
class _Needs:
    """One backward walk. `width`: per value. `wider`: value to extend → width → its readers."""

    draft: Draft
    ring: int
    width: list[int] = field(init=False)
    wider: dict[int, dict[int, int]] = field(default_factory=dict)
    _found: dict[tuple[int, int], frozenset[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        steps = self.draft.steps
        self.caps = _caps(steps, self.ring)
        self.width = [_own_width(s, steps) for s in steps]
        for o in self.draft.outputs:
            self.need(OUTPUT, o.id, least_width(steps[o.id]))
        for id in reversed(range(len(steps))):
            for j, width in operand_needs(steps[id], self.width[id], steps):
                self.need(id, j, width)

    def need(self, reader: int, id: int, width: int) -> None:
        """`reader` reads `id` with `width` bits."""
        # What an extend itself would read is no reason for one.
        least = self.draft.steps[id].bound + 2
        fits = width <= max(self.caps[id], least) or self._cheaper_before(id, width)
        if fits and not self._dear_before(id, width):
            self.width[id] = max(self.width[id], width)
        else:
            readers = self.wider.setdefault(id, {})
            readers[reader] = max(width, readers.get(reader, 0))

    def _dear_before(self, id: int, width: int) -> bool:
        """Whether `id` is a sum of so many elements that each would be much wider for its sake."""
        step = self.draft.steps[id]
        if step.op != "sum" or width < step.bound + 2 + MUCH_WIDER:
            return False
        terms = prod(self.draft.steps[step.inputs[0]].shape)
        return terms >= max(MANY_SUMMED, MANY_TERMS * prod(step.shape))

    def _cheaper_before(self, id: int, width: int) -> bool:
        """Whether extending what `id` is made of touches fewer elements than extending `id`.

        Or as many, of a value that is only rearranged: several may be made of it.
        """
        step, here = self.draft.steps[id], self._here(id)
        if step.op in MOVED:
            return sum(map(self._here, self._places(step.inputs[0], width))) <= here
        return sum(map(self._here, self._places(id, width))) < here

    def _here(self, id: int) -> int:
        """Elements that an extend behind `id` touches, if it can read the value at all."""
        step = self.draft.steps[id]
        return prod(step.shape) if step.bound + 2 <= self.caps[id] else TOO_MANY

    def _places(self, id: int, width: int) -> frozenset[int]:
        """Values behind which an extend stands, at best, so that `id` has `width` bits."""
        known = self._found.get((id, width))
        if known is None:
            known = self._found[id, width] = self._searched(id, width)
        return known

    def _searched(self, id: int, width: int) -> frozenset[int]:
        step = self.draft.steps[id]
        if width <= self.caps[id]:
            return frozenset()
        spare = step.attrs["bits"] if step.op == "shift" else 0
        here = frozenset([id])
        if not OPS[step.op].local or width + spare > RING_BITS:
            return here
        # Parts of one value share its extend.
        before = here.union(*(self._places(j, width + spare) for j in step.inputs)) - here
        return here if self._here(id) <= sum(map(self._here, before)) else before


def _caps(steps: tuple[Step, ...], ring: int) -> list[int]:
    """The widest that each value can be without an extend."""
    caps: list[int] = []
    for s in steps:
        if s.op in TRUNCATING:
            # Waves keep their own scale, whatever ring the products are to fit.
            widest = ring if s.op in PRODUCTS else RING_BITS
            caps.append(widest - s.attrs["truncate"])
        elif OPS[s.op].local and s.inputs:
            spare = s.attrs["bits"] if s.op == "shift" else 0
            widest = s.attrs["bits"] if s.op == "wrap" else RING_BITS
            caps.append(min(widest, *(caps[j] for j in s.inputs)) - spare)
        else:
            caps.append(RING_BITS)
    return caps


def ring_of(step: Step, width: int) -> int:
    """A product's ring when its result has `width` bits."""
    return max(least_width(step), width) + int(step.attrs["truncate"])


def operand_needs(step: Step, width: int, steps: tuple[Step, ...]) -> list[tuple[int, int]]:
    """(operand, width) for each operand of a step whose value has `width` bits."""
    if step.op == "spectral":
        return [(step.inputs[0], step.attrs["width"])]
    if step.op in PRODUCTS:
        return [(j, ring_of(step, width)) for j in step.inputs]
    if step.op == "select":
        read_bits = _read_widths(step, steps)
        for k, j in enumerate(step.inputs[1::2]):
            if _public(steps, j):  # as wide as one likes, and then nothing is dealt to widen it
                read_bits[k] = width
        pairs = zip(step.inputs[::2], step.inputs[1::2], read_bits, strict=True)
        return [need for bit, x, read in pairs for need in ((bit, 1), (x, read))]
    if step.op in ("sign", "extend"):
        (read,) = _read_widths(step, steps)
        return [(step.inputs[0], read)]
    if step.op == "tally" or step.is_bit:
        return [(j, 1) for j in step.inputs]
    spare = step.attrs["bits"] if step.op == "shift" else 0
    return [(j, width + spare) for j in step.inputs]


def _public(steps: tuple[Step, ...], id: int) -> bool:
    """Whether the plan shows the value: a constant, rearranged."""
    while steps[id].op in REARRANGES:
        id = steps[id].inputs[0]
    return steps[id].op == "constant"


def _own_width(step: Step, steps: tuple[Step, ...]) -> int:
    """The narrowest value that the step can make: a select writes no fewer bits than it reads."""
    if step.op in ("select", "extend"):
        return max(least_width(step), *_read_widths(step, steps))
    return least_width(step)


def _read_widths(step: Step, steps: tuple[Step, ...]) -> list[int]:
    """The bits of each of its operands that a sign, select or extend reads."""
    tight = step.op == "sign" or (step.op == "select" and step.attrs["nonnegative"])
    read = step.inputs[1::2] if step.op == "select" else step.inputs
    return [max(1, steps[j].bound) + (1 if tight else 2) for j in read]


def _insert(draft: Draft, wider: dict[int, dict[int, int]]) -> Draft:
    """An extend right behind each key of `wider`; its readers read that instead."""
    number: list[int] = []
    extension: dict[int, int] = {}
    steps: list[Step] = []
    for id, step in enumerate(draft.steps):
        inputs = tuple(extension[j] if id in wider.get(j, ()) else number[j] for j in step.inputs)
        number.append(len(steps))
        steps.append(replace(step, inputs=inputs))
        if id in wider:
            extension[id] = len(steps)
            extend = replace(step, op="extend", inputs=(number[id],), attrs={}, sampled=None)
            steps.append(extend)
    return draft.renumbered(steps, number)


def _instruction(
    id: int, step: Step, widths: list[int], draft: Draft, chunk: int, many: float
) -> Instruction:
    width = widths[id]
    value = Value(step.shape, width, step.frac_bits, step.bound, step.known)
    attrs = dict(step.attrs)
    if step.op in TRUNCATING:
        attrs["ring"] = ring_of(step, width)
    elif step.op == "sign":
        (read,) = _read_widths(step, draft.steps)
        single = chunk if prod(step.shape) >= many else MAX_CHUNK
        attrs["chunks"], attrs["groups"] = sign_chunks(read, chunk, single)
    elif step.op == "select":
        least = _read_widths(step, draft.steps)
        # Bits that are there anyway need not be dealt.
        pairs = zip(least, step.inputs[1::2], strict=True)
        attrs["widths"] = [max(read, min(width, widths[j])) for read, j in pairs]
    elif step.op == "extend":
        (attrs["width"],) = _read_widths(step, draft.steps)
    return Instruction(id, step.op, step.inputs, value, MappingProxyType(attrs), step.layer)
