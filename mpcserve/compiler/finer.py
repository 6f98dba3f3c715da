"""Finer scales where errors grow: of small values, and of weights.

A normalisation, a quotient or a root makes values of size one of whatever it is given, and so do
large weights: their operand must be right relatively. Where samples show that it is of size 2^-k,
it gets up to k more fraction bits, which are as many bits in all as a value of size one has; and so
does, as far as it is as small, what it is computed from. Values that local steps connect have one
scale: the largest of them says how fine it may be.

A weight's error is the same for all positions and inputs of a layer. Where trials show that it is
magnified by what follows, as by attention to scores that are large, the weight gets more bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import ceil, frexp, log2

from mpcserve.compiler.draft import Draft, Seen
from mpcserve.compiler.graph import Graph, Node
from mpcserve.compiler.lower import Scales
from mpcserve.compiler.noise import factor_of, noise_of_weights, powers_of
from mpcserve.compiler.precision import LARGE_GAIN_BITS, room_of, tunable_weights, with_weight_bits
from mpcserve.compiler.rings import families_of
from mpcserve.compiler.sensitivity import Felt
from mpcserve.plan.ops import PRODUCTS

RELATIVE: Mapping[str, tuple[int, ...]] = {
    "LayerNormalization": (0,),
    "RMSNormalization": (0,),
    "InstanceNormalization": (0,),
    "GroupNormalization": (0,),
    "MeanVarianceNormalization": (0,),
    "LpNormalization": (0,),
    "Normalize": (0,),
    "Div": (1, 0),
    "Reciprocal": (0,),
    "Sqrt": (0,),
    "Log": (0,),
}
"""Operators, and which of their operands must be right relatively to the first of these."""

EPSILON = 1e-5
"""What these add to a mean square where they do not say."""

MOST = 14
"""More bits than this are given to none."""

PEAK_BITS = 5
"""The largest of values is below 2^5 times their size; values that reach farther get fewer bits."""


def finer_scales(
    graph: Graph, draft: Draft, seen: Mapping[str, Seen], scales: Scales
) -> Scales | None:
    """The scales with more fraction bits for small values; None where no value is to have more.

    `draft`: the graph, lowered with `scales`. `seen`: what samples showed of its tensors.
    """
    family = families_of(draft)
    room = _room(draft, seen, family)
    wish: dict[int, int] = {}
    for node in graph.nodes:
        for name, bits in _asked(node, seen):
            if name in draft.tensors:
                _raise(wish, room, family[draft.tensors[name]], bits)
    _carried(draft, family, room, wish)
    if not wish:
        return None
    nodes, inputs = dict(scales.nodes), dict(scales.inputs)
    for node in graph.nodes:
        if (id := draft.tensors.get(node.outputs[0])) is not None and family[id] in wish:
            nodes[node.name] = scales.usual + wish[family[id]]
    for i in draft.inputs:
        if family[i.id] in wish:
            inputs[i.name] = scales.usual + wish[family[i.id]]
    return Scales(scales.usual, nodes, inputs)


def _asked(node: Node, seen: Mapping[str, Seen]) -> Iterator[tuple[str, float]]:
    """(operand, fraction bits it would have beside the usual, for its own size)."""
    places = RELATIVE.get(node.op, ())
    if not places or len(node.inputs) <= max(places) or node.inputs[places[0]] not in seen:
        return
    power = seen[node.inputs[places[0]]].power + _epsilon(node)
    if power > 0:
        for place in places:
            yield node.inputs[place], -log2(power) / 2


def _epsilon(node: Node) -> float:
    added = node.op.endswith("Normalization") and not node.op.startswith(("Lp", "Mean"))
    return float(node.attrs.get("epsilon", EPSILON if added else 0.0))


def _room(draft: Draft, seen: Mapping[str, Seen], family: list[int]) -> dict[int, int]:
    """Bits that each family may have more, by the largest of its tensors."""
    room: dict[int, int] = {}
    for name, id in draft.tensors.items():
        if name in seen and draft.steps[id].frac_bits:
            held = seen[name]
            size = -log2(held.power) / 2 if held.power > 0 else MOST
            peak = PEAK_BITS - frexp(max(-held.low, held.high))[1]
            bits = max(min(round(size), peak, MOST), 0)
            room[family[id]] = min(bits, room.get(family[id], MOST))
    return room


def _raise(wish: dict[int, int], room: Mapping[int, int], family: int, bits: float) -> None:
    bits = min(round(bits), room.get(family, 0))
    if bits > wish.get(family, 0):
        wish[family] = bits


def _carried(
    draft: Draft, family: list[int], room: Mapping[int, int], wish: dict[int, int]
) -> None:
    """Wishes go on to what finer values are computed from, as far as errors in it are felt.

    Large weights wish of themselves, as `tune_inputs` does.
    """
    powers, steps = powers_of(draft), draft.steps
    for id in reversed(range(len(steps))):
        step, bits = steps[id], wish.get(family[id], 0)
        factors = step.inputs[:2] if step.op in PRODUCTS else ()
        by_weights = any(steps[j].op == "weight" for j in factors)
        for j in step.inputs if bits or by_weights else ():
            more = 0.0
            if j in factors:
                felt = factor_of(draft, id, j, powers)
                more = log2(felt) / 2 if felt else -MOST
            spare = 0 if bits else LARGE_GAIN_BITS
            _raise(wish, room, family[j], bits + more - spare)


MOST_OF_WEIGHTS = 6
"""Fraction bits that a weight may have more."""


def finer_weights(draft: Draft, tolerance: float, felt: Felt) -> Draft:
    """With as many more bits of weights as keep what their rounding adds to the outputs' error
    within `tolerance`, both root mean squares, and as fit."""
    noise = noise_of_weights(draft, tolerance, felt)
    if sum(noise.values()) <= 1:
        return draft
    change: dict[int, int] = {}
    for weight, products in tunable_weights(draft):
        wish = ceil(log2(max(noise.get(weight, 0.0) * len(noise), 1.0)) / 2)
        by = min(wish, MOST_OF_WEIGHTS, *(room_of(draft.steps[p]) for p in products))
        if by > 0:
            change[weight] = by
    return with_weight_bits(draft, change)
