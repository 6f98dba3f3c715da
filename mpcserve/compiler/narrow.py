"""Draft → draft whose products run mod 2^32: all of them, or those where that is accurate enough.

The graph is lowered twice. The first draft, with the same fraction bits everywhere, tells ranges
and sensitivities; `rings` chooses scales; the second is lowered with these. Then the weights of the
chosen products get the bits that their rings have left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import ceil, log2

from mpcserve.compiler.draft import Draft, Step, check_draft
from mpcserve.compiler.lower import Scales
from mpcserve.compiler.noise import noise_of
from mpcserve.compiler.precision import (
    significant,
    tunable_weights,
    tune_inputs,
    tune_weights,
    with_weight_bits,
)
from mpcserve.compiler.problems import Problem
from mpcserve.compiler.ranges import rescaled, settle_all
from mpcserve.compiler.rings import (
    Allocation,
    Choice,
    Key,
    allocation_of,
    families_of,
    products_of,
)
from mpcserve.compiler.sensitivity import Felt
from mpcserve.compiler.widths import demanded_widths, extended, rings_of
from mpcserve.plan.plan import RING_BITS
from mpcserve.ring import HALF_BITS
from mpcserve.units import counted

Lowered = Callable[[Scales], Draft]
"""The same graph, lowered with other scales."""

TOLERANCE = 2.0**-12
"""Expected error of an output, both root mean squares; the largest of many is about five times."""

AS_WIDE = 1.25
"""Variance allowed beside what 64 bits give, where that is more: an eighth more error. Of tens of
thousands of outputs the largest error is six times the root mean square."""

ATTEMPTS = 4
"""How often scales are chosen anew where rounding has moved a bound across a power of two."""

FITTINGS = 8
"""How often weights are fitted to their rings; in the second half they only lose bits."""


@dataclass(frozen=True, slots=True)
class Narrowed:
    """`draft` needs no more extends. `note`: what was chosen, `problems`: why it cannot be."""

    draft: Draft
    note: str
    problems: tuple[Problem, ...] = ()


def narrowed(
    wide: Draft,
    lowered: Lowered,
    felt: Felt,
    usual: int,
    *,
    only: bool,
    fixed: bool,
    tolerance: float = TOLERANCE,
) -> Narrowed:
    """The draft `wide`, tuned to 64 bits at `usual` fraction bits, with products in 32 bits.

    `only`: every product or a problem; else as many as the tolerance allows. `fixed`: activations
    keep their `usual` fraction bits.
    """
    noise = noise_of(wide, tolerance, felt)
    problem = allocation_of(wide, noise, demanded_widths(wide), usual, fixed)
    allowed = max(1.0, AS_WIDE * problem.all_wide().variance) if _seen(wide) else 1.0
    short: dict[Key, int] = {}
    for _ in range(ATTEMPTS):
        if only:
            short = {p.key: bits for p in problem.products if (bits := problem.short(p)) > 0}
        choice = problem.all_narrow() if only else problem.within(allowed)
        if short or not choice.narrow:
            break
        draft = _coarsened(lowered(_scales(wide, problem, choice)), choice)
        check_draft(draft, "narrowed")
        draft, short = _fitted(draft, choice, usual, HALF_BITS if only else RING_BITS)
        if not short:
            return Narrowed(draft, _note(draft, felt))
        problem, short = problem.tightened(short), {}
    if short:
        return Narrowed(wide, "", tuple(_problems(wide, short)))
    ready = extended(wide)
    return Narrowed(ready, _note(ready, felt))


def _scales(draft: Draft, problem: Allocation, choice: Choice) -> Scales:
    """What was chosen for the families, said of the nodes that make their values."""
    family = families_of(draft)
    nodes = {
        step.layer: choice.frac_bits[family[id]]
        for id, step in enumerate(draft.steps)
        if step.inputs and step.frac_bits
    }
    inputs = {i.name: choice.frac_bits[family[i.id]] for i in draft.inputs}
    return Scales(problem.usual, nodes, inputs)


def _coarsened(draft: Draft, choice: Choice) -> Draft:
    """A shift before each product that is to read its operand with fewer bits than it has."""
    ids = products_of(draft)
    by = {ids[key]: bits for key, bits in choice.narrow.items() if bits and key in ids}
    weights = {w for w, _ in tunable_weights(draft)}
    number: list[int] = []
    steps: list[Step] = []
    for id, step in enumerate(draft.steps):
        inputs = [number[j] for j in step.inputs]
        if id in by:
            place = 0 if step.inputs[1] in weights else 1
            inputs[place] = len(steps)
            steps.append(_shifted(draft.steps[step.inputs[place]], number, step, place, by[id]))
            for addend in inputs[2:]:
                steps[addend] = rescaled(draft, steps[addend], -by[id])
            truncate = step.attrs["truncate"] - by[id]
            step = replace(step, attrs=dict(step.attrs) | {"truncate": truncate})
        number.append(len(steps))
        steps.append(replace(step, inputs=tuple(inputs)))
    return settle_all(draft.renumbered(steps, number)) if by else draft


def _shifted(x: Step, number: list[int], reader: Step, place: int, bits: int) -> Step:
    return Step(
        "shift",
        (number[reader.inputs[place]],),
        {"bits": bits},
        x.shape,
        x.frac_bits - bits,
        x.interval,
        x.known,
        reader.layer,
    )


def _fitted(draft: Draft, choice: Choice, usual: int, ring: int) -> tuple[Draft, dict[Key, int]]:
    """The draft with extends, its weights fitted, and by how many bits products do not fit."""
    keys = {id: key for key, id in products_of(draft).items() if key in choice.narrow}
    draft = tune_inputs(tune_weights(draft, usual, keys), usual, keys)
    own = {w: [p for p in products if p in keys] for w, products in tunable_weights(draft)}
    own = {w: products for w, products in own.items() if products}
    spare = {
        id: HALF_BITS - 1 - step.bound - int(step.attrs["truncate"])
        for id, step in enumerate(draft.steps)
        if id in keys
    }
    for fitting in range(FITTINGS):
        change = {w: min(spare[p] for p in products) for w, products in own.items()}
        change = {w: by for w, by in change.items() if by < 0 or (by and fitting < FITTINGS // 2)}
        draft = with_weight_bits(draft, change)
        ready = extended(draft, ring)
        rings, there = rings_of(ready), products_of(ready)
        spare = {id: HALF_BITS - rings[there[key]] for id, key in keys.items()}
        if not change or (fitting >= FITTINGS // 2 and min(spare.values()) >= 0):
            break
    short = {keys[id]: -bits for id, bits in spare.items() if bits < 0}
    for w, products in own.items():
        lacking = significant(draft, w) - draft.steps[w].frac_bits
        lacking = max(lacking, *(-int(draft.steps[p].attrs["truncate"]) for p in products))
        if lacking > 0:
            short |= {keys[p]: max(lacking, short.get(keys[p], 0)) for p in products}
    return ready, short


def _problems(draft: Draft, short: Mapping[Key, int]) -> list[Problem]:
    ids = products_of(draft)
    return [
        Problem(
            key[0],
            draft.steps[ids[key]].op,
            f"its range ±2^{draft.steps[ids[key]].bound - draft.steps[ids[key]].frac_bits} leaves "
            f"32 bits {counted(bits, 'bit')} short of the fewest fraction bits",
            "calibrate with samples (--calibrate), narrow --input-range, or give --ring auto",
        )
        for key, bits in short.items()
    ]


def _note(draft: Draft, felt: Felt) -> str:
    """What was chosen, of a draft that needs no more extends."""
    rings = rings_of(draft)
    narrow = [id for id, bits in rings.items() if bits <= HALF_BITS]
    note = f"{len(narrow)} of {len(rings)} products in the ring of 2^32"
    if narrow:
        operands = [draft.steps[draft.steps[id].inputs[0]].frac_bits for id in narrow]
        note += f", their operands with {min(operands)} to {max(operands)} fraction bits"
    error = noise_of(draft, 1.0, felt).variance ** 0.5
    if error and _seen(draft):
        note += f"; expected error of an output: 2^{ceil(log2(error))} of its size"
    return note


def _seen(draft: Draft) -> bool:
    """Whether samples tell how large the outputs are; ranges alone are far too wide."""
    return all(draft.steps[o.id].power is not None for o in draft.outputs)
