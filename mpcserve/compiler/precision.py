"""Fraction bits of weights: enough that rounding a weight is not felt, few enough to fit 64 bits.

A weight w at `frac_bits` errs by 2^-(frac_bits+1). The product truncates as many bits as the
weight brings, so its accumulator is that much wider than its result: bound + truncate ≤ 62.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from math import frexp

import numpy as np
from numpy.typing import NDArray

from mpcserve.compiler.draft import Draft, Step
from mpcserve.compiler.lower import Ranges
from mpcserve.compiler.problems import Problem
from mpcserve.compiler.ranges import rescaled, settle_all
from mpcserve.compiler.values import WIDEST_BOUND, excess_of
from mpcserve.compiler.widths import rings_of
from mpcserve.plan.ops import PRODUCTS
from mpcserve.ring import HALF_BITS
from mpcserve.units import counted

SMALL_WEIGHT_BITS = 4
"""The largest entry of a weight keeps at least frac_bits − 4 significant bits."""

LARGE_OPERAND_BITS = 6
"""Operands beyond ±2^6 ask for as many more weight bits: a weight's error is multiplied by them."""

LARGE_GAIN_BITS = 2
"""Weights of norm beyond 2^2 ask for as many more bits of the input."""

MOST_EXTRA_BITS = 16
FEWEST_SIGNIFICANT_BITS = 10
"""With fewer for the largest entry of a weight the layer is noise; then the model does not fit."""

FEWEST_NARROW = 6
"""The same in 32 bits, for the largest weight of a layer and for its largest activation."""

FEATURE_BITS, COMPARED_BITS = 30, 48
"""Significant bits of the feature that reaches least, and the most that any of them may have.

float32 has 24: a feature is exact down to a 64th of its reach, so that it equals a threshold
wherever it does so in float32."""

COARSEST = 6
"""Fewer fraction bits than this are not worth proposing."""


def tune_weights(draft: Draft, frac_bits: int, but: Collection[int] = ()) -> Draft:
    """Every weight that only products read gets the fraction bits it needs, as far as they fit.

    Weights of the products `but` are left alone.
    """
    change: dict[int, int] = {}
    for id, products in tunable_weights(draft):
        if not set(products).isdisjoint(but):
            continue
        step = draft.steps[id]
        exact = _exact(draft, id)
        wish = 0 if exact else _wished(draft, id, products, frac_bits) - step.frac_bits
        room = min(room_of(draft.steps[p]) for p in products)
        by = min(wish, room) if room >= 0 else room
        least = max(-int(draft.steps[p].attrs["truncate"]) for p in products)
        fewest = _fewest(draft, id) - step.frac_bits
        by = max(by, min(fewest, 0) if exact else fewest, least)
        if by:
            change[id] = by
    return with_weight_bits(draft, change)


def with_weight_bits(draft: Draft, change: Mapping[int, int]) -> Draft:
    """Fraction bits added to some weights (taken away where negative)."""
    if not change:
        return draft
    steps = list(draft.steps)
    for id, by in change.items():
        steps[id] = rescaled(draft, steps[id], by)
    return _products_moved(draft, steps, change)


def finer_inputs(ranges: Ranges, frac_bits: int) -> dict[str, int]:
    """Fraction bits of inputs that trees may compare: enough for the feature that reaches least.

    The same for all inputs, as they may be columns that are put side by side.
    """
    if not ranges.finest:
        return {}
    reach = max(abs(end) for name in ranges.finest for end in ranges.inputs[name][:2])
    wish = FEATURE_BITS - frexp(min(ranges.finest.values()))[1]
    bits = max(min(wish, COMPARED_BITS - frexp(reach)[1]), frac_bits)
    return dict.fromkeys(ranges.finest, bits)


def tune_inputs(draft: Draft, frac_bits: int, but: Collection[int] = ()) -> Draft:
    """An input that only products with large weights read gets more fraction bits, if they fit.

    Its rounding error, 2^-(frac_bits+1) per element, comes out of the product multiplied by the
    norm of the weights of one output.
    """
    users = draft.users()
    change: dict[int, int] = {}
    for spec in draft.inputs:
        path, products = _readers(draft, users, spec.id)
        if not products or draft.steps[spec.id].frac_bits != frac_bits:
            continue
        if not set(products).isdisjoint(but):
            continue
        wish = max(frexp(_gain(draft, p, path))[1] for p in products) - LARGE_GAIN_BITS
        by = min(wish, *(room_of(draft.steps[p]) for p in products))
        if by > 0:
            change |= dict.fromkeys(path, by)
    if not change:
        return draft
    steps = list(draft.steps)
    for id, by in change.items():
        steps[id] = rescaled(draft, steps[id], by)
    return _products_moved(draft, steps, change)


def check_fit(draft: Draft, frac_bits: int) -> list[Problem]:
    """One problem per layer whose bounds need more than 64 bits."""
    short = short_layers(draft)
    worst = max((excess for excess, _ in short.values()), default=0)
    way_out = _way_out(frac_bits - -(-worst // 2))
    return [
        Problem(
            layer or "input",
            step.op,
            f"its range ±2^{step.bound - step.frac_bits} does not fit 64 bits: "
            f"{counted(excess, 'bit')} short",
            way_out,
        )
        for layer, (excess, step) in short.items()
    ]


def short_layers(draft: Draft) -> dict[str, tuple[int, Step]]:
    """Layer → (bits that its widest step needs beyond 64, that step), of those that need any."""
    short: dict[str, tuple[int, Step]] = {}
    for step in draft.steps:
        if (excess := excess_of(step)) > short.get(step.layer, (0, step))[0]:
            short[step.layer] = (excess, step)
    return short


def coarse_weights(draft: Draft, frac_bits: int) -> list[str]:
    """A note per layer whose weights had to give up fraction bits although it has 64 bits."""
    rings = rings_of(draft)
    return [
        f"weights of layer {step.layer!r} have {step.frac_bits} fraction bits: "
        "its range leaves no more, calibrate with samples"
        for id, products in tunable_weights(draft)
        if (step := draft.steps[id]).frac_bits < frac_bits
        and not _exact(draft, id)
        and max(rings[p] for p in products) > HALF_BITS
    ]


def coarse_operands(layers: Collection[str]) -> list[str]:
    """A note on the layers that read coarser operands than others."""
    if not layers:
        return []
    more = f" and of {len(layers) - 1} more" if len(layers) > 1 else ""
    return [
        f"operands of layer {min(layers)!r}{more} give up fraction bits: their range leaves no "
        "more, calibrate with samples or scale the model's inputs"
    ]


def fewest_bits(largest: float) -> int:
    """Fraction bits that leave values of up to `largest` FEWEST_NARROW significant bits."""
    return max(FEWEST_NARROW - frexp(largest)[1], 0) if largest else 0


def significant(draft: Draft, weight: int) -> int:
    """The fewest fraction bits that a weight may have in 32 bits."""
    return fewest_bits(_largest(draft, weight))


def _way_out(frac_bits: int) -> str:
    lower = f", or give --frac-bits {frac_bits}" if frac_bits >= COARSEST else ""
    way = "calibrate with samples (--calibrate, random:16 to try) or narrow --input-range"
    return f"{way}{lower}"


def _exact(draft: Draft, weight: int) -> bool:
    """Whether more fraction bits would change nothing."""
    step = draft.steps[weight]
    values = draft.arrays[step.attrs["name"]].ravel("K")
    # Nearly always the first few tell.
    parts = (values[:FIRST], values[FIRST:])
    return all(_whole(np.ldexp(part, step.frac_bits)) for part in parts)


def _whole(values: NDArray[np.floating]) -> bool:
    return bool(np.all(values == np.rint(values)))


FIRST = 4096
"""Elements of a weight that are looked at before the others."""


def _largest(draft: Draft, weight: int) -> float:
    """max |w|, without a copy of what may be a hundred million numbers."""
    values = draft.arrays[draft.steps[weight].attrs["name"]]
    return float(max(-values.min(initial=0.0), values.max(initial=0.0)))


def _fewest(draft: Draft, weight: int) -> int:
    largest = _largest(draft, weight)
    return max(FEWEST_SIGNIFICANT_BITS - frexp(largest)[1], 0)


def room_of(product: Step) -> int:
    """By how many bits the truncation may grow (negative: must shrink)."""
    # One bit is kept back: rounding the weight anew may move the bound across a power of two.
    return WIDEST_BOUND - 1 - product.bound - int(product.attrs["truncate"])


def _wished(draft: Draft, id: int, products: list[int], frac_bits: int) -> int:
    largest = _largest(draft, id)
    if largest == 0.0:
        return frac_bits
    small = frac_bits - SMALL_WEIGHT_BITS - frexp(largest)[1] + 1
    reach = max(_other(draft, p, id).interval.magnitude for p in products)
    near = any(_near_input(draft, p, id) for p in products)
    large = frac_bits + frexp(reach)[1] - LARGE_OPERAND_BITS if near else frac_bits
    return min(max(frac_bits, small, large), frac_bits + MOST_EXTRA_BITS)


def _other(draft: Draft, product: int, operand: int) -> Step:
    """The other factor of a product."""
    x, y = draft.steps[product].inputs[:2]
    return draft.steps[y if x == operand else x]


def _near_input(draft: Draft, product: int, weight: int) -> bool:
    """Whether the other operand's range is a real one: an input's, or one seen in samples."""
    step = _other(draft, product, weight)
    while step.op in ("reshape", "transpose", "pad", "slice", "offset", "add", "sub", "concat"):
        if step.sampled is not None:
            return True
        step = draft.steps[step.inputs[0]]
    return step.op == "input" or step.sampled is not None


REARRANGES = ("reshape", "transpose", "slice", "gather", "expand")


def _readers(draft: Draft, users: Mapping[int, list[int]], id: int) -> tuple[list[int], list[int]]:
    """(the value and its rearrangements, the products that read them); none if others do too."""
    path, products = [id], []
    for source in path:
        for reader in users.get(source, []):
            if draft.steps[reader].op in REARRANGES:
                path.append(reader)
            elif _takes(draft, users, reader, source):
                products.append(reader)
            else:
                return [], []
    if {o.id for o in draft.outputs} & set(path):
        return [], []
    return list(dict.fromkeys(path)), list(dict.fromkeys(products))


def _takes(draft: Draft, users: Mapping[int, list[int]], product: int, x: int) -> bool:
    """Whether a step is a product of x with a weight, and no other step reads its addend."""
    step = draft.steps[product]
    if step.op not in PRODUCTS or step.inputs[:2].count(x) != 1 or x in step.inputs[2:]:
        return False
    weight = _other(draft, product, x)
    return weight.op == "weight" and _own_addends(draft, users, product)


def _gain(draft: Draft, product: int, path: list[int]) -> float:
    """Largest norm of the weights that make one output."""
    step = draft.steps[product]
    x, y = step.inputs[:2]
    weight, left = (y, True) if x in path else (x, False)
    values = draft.arrays[draft.steps[weight].attrs["name"]]
    if step.op == "mul":
        return float(np.abs(values).max(initial=0.0))
    axes = tuple(range(1, values.ndim)) if step.op == "conv" else (-2 if left else -1,)
    return float(np.sqrt(np.square(values).sum(axis=axes)).max(initial=0.0))


def _own_addends(draft: Draft, users: Mapping[int, list[int]], product: int) -> bool:
    addends = draft.steps[product].inputs[2:]
    return all(draft.steps[a].op == "weight" and users[a] == [product] for a in addends)


def tunable_weights(draft: Draft) -> Iterator[tuple[int, list[int]]]:
    """(weight, its products) where nothing but products reads the weight, as one factor."""
    users = draft.users()
    for id, step in enumerate(draft.steps):
        if step.op != "weight" or not step.frac_bits:
            continue  # whole numbers are exact as they are
        readers = users.get(id, [])
        if readers and all(_tunes(draft, users, r, id) for r in readers):
            yield id, readers


def _tunes(draft: Draft, users: Mapping[int, list[int]], product: int, weight: int) -> bool:
    step = draft.steps[product]
    if step.op not in PRODUCTS or step.inputs[:2].count(weight) != 1 or weight in step.inputs[2:]:
        return False
    return _other(draft, product, weight).op != "weight" and _own_addends(draft, users, product)


def _products_moved(draft: Draft, steps: list[Step], change: Mapping[int, int]) -> Draft:
    """With the products that read what has changed: they truncate more, their addends are finer."""
    changed = set(change)
    for id, step in enumerate(draft.steps):
        if step.op not in PRODUCTS:
            continue
        for by in [change[x] for x in step.inputs[:2] if x in change][:1]:
            for addend in step.inputs[2:]:
                steps[addend] = rescaled(draft, steps[addend], by)
            attrs = dict(step.attrs) | {"truncate": step.attrs["truncate"] + by}
            steps[id] = replace(step, attrs=attrs)
            changed |= {id, *step.inputs[2:]}
    return settle_all(replace(draft, steps=tuple(steps)), changed)
