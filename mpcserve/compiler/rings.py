"""Which products run mod 2^32, and how their bits are shared between activations and weights.

A product whose result is below 2^b needs b + f_x + f_w + 1 bits, for f_x fraction bits of its
operand and f_w of its weights: in 32 bits f_x + f_w ≤ 31 − b, whatever its result keeps of them.
Values that local steps and selects connect have one scale: they are a *family*. What a family's
scale leaves over goes to the weights of the products that read it. `noise` tells how far each
rounding is felt at the outputs, and

    Σ over families f  S·4^−f  +  Σ over products that read it  W·4^−(31 − b − f)

is least at one f per family, whatever the others have. Where that is too much, those products get
64 bits that buy the most accuracy per multiply-add.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod

from mpcserve.compiler.draft import Draft
from mpcserve.compiler.noise import SHIFTED, Noise, factor_of, inner
from mpcserve.compiler.precision import REARRANGES, fewest_bits, significant, tunable_weights
from mpcserve.plan.ops import OPS, PRODUCTS
from mpcserve.ring import HALF_BITS

Key = tuple[str, int]
"""A product: its node and which of that node's products it is."""

FINEST = 24
"""Fraction bits that only small values with large weights have any use for."""

MOST_DEMANDED = 4
"""Bits beyond a result's own that a sum with others may ask of it; a product would ask for more."""


@dataclass(frozen=True, slots=True)
class Product:
    """`families`: of its operands but the weight that is its own, `result`: of what it makes.

    `room`: f_x + f_w that 32 bits hold. `weight_noise`: at no fraction bits; `wide_weight`: its
    fraction bits in 64; `fewest`: in 32. `coarse`: noise of rounding the operand once more before
    it is read, None where that is no option. `possible`: in 32 bits without an extend.
    """

    key: Key
    families: tuple[int, ...]
    result: int
    room: int
    weight_noise: float
    wide_weight: int
    fewest: int
    coarse: float | None
    work: int
    possible: bool


@dataclass(frozen=True, slots=True)
class Family:
    """Values of one scale. `noise`: at no fraction bits; `fixed`: where they are not to choose."""

    noise: float
    fewest: int
    fixed: int | None


@dataclass(frozen=True, slots=True)
class Choice:
    """`frac_bits`: per family. `narrow`: products in 32 bits, each with the bits by which it reads
    its operand coarser than it is. `variance`: of the outputs, in squared tolerances."""

    frac_bits: tuple[int, ...]
    narrow: Mapping[Key, int]
    variance: float


@dataclass(frozen=True)
class Allocation:
    """The problem, as one lowering at `usual` fraction bits tells it."""

    usual: int
    families: tuple[Family, ...]
    products: tuple[Product, ...]
    readers: Mapping[int, tuple[Product, ...]] = field(init=False)
    writers: Mapping[int, tuple[Product, ...]] = field(init=False)
    _known: dict[tuple[int, frozenset[Key]], tuple[int, float]] = field(
        init=False, default_factory=dict, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        readers: dict[int, tuple[Product, ...]] = {}
        writers: dict[int, tuple[Product, ...]] = {}
        for p in self.products:
            writers[p.result] = (*writers.get(p.result, ()), p)
            for f in dict.fromkeys(p.families):
                readers[f] = (*readers.get(f, ()), p)
        object.__setattr__(self, "readers", readers)
        object.__setattr__(self, "writers", writers)

    def all_narrow(self) -> Choice:
        """Every product in 32 bits."""
        return self._choice({p.key for p in self.products})

    def all_wide(self) -> Choice:
        """No product in 32 bits."""
        return self._choice(())

    def within(self, variance: float) -> Choice:
        """As much work in 32 bits as `variance` allows."""
        possible = {p.key: p for p in self.products if p.possible and self.short(p) <= 0}
        narrow = set(possible)
        while narrow and self._variance(narrow) > variance:
            gain = {k: self._gain(possible[k], narrow) / possible[k].work for k in narrow}
            narrow.remove(max(sorted(narrow), key=gain.__getitem__))
        # The last ones taken out may have made room for some of the first.
        for key in sorted(set(possible) - narrow, key=lambda k: (-possible[k].work, k)):
            if self._variance(narrow | {key}) <= variance:
                narrow.add(key)
        return self._choice(narrow)

    def tightened(self, short: Mapping[Key, int]) -> Allocation:
        """The same with less room in products that turned out not to fit."""
        products = (replace(p, room=p.room - short.get(p.key, 0)) for p in self.products)
        return Allocation(self.usual, self.families, tuple(products))

    def short(self, p: Product) -> int:
        """How many bits 32 lack for a product with the fewest fraction bits that make sense."""
        return sum(map(self._least, p.families)) + p.fewest - p.room

    def _least(self, family: int) -> int:
        held = self.families[family]
        return held.fewest if held.fixed is None else held.fixed

    def _choice(self, narrow: Collection[Key]) -> Choice:
        bits = tuple(self._best(f, narrow)[0] for f in range(len(self.families)))
        coarser = {
            p.key: self._shared(p, bits[p.families[0]])[0] if p.families else 0
            for p in self.products
            if p.key in narrow
        }
        return Choice(bits, coarser, self._variance(narrow))

    def _variance(self, narrow: Collection[Key]) -> float:
        return sum(self._best(f, narrow)[1] for f in range(len(self.families)))

    def _gain(self, p: Product, narrow: set[Key]) -> float:
        """By how much the variance falls when p gets 64 bits."""
        after = narrow - {p.key}
        return sum(
            self._best(f, narrow)[1] - self._best(f, after)[1]
            for f in dict.fromkeys((*p.families, p.result))
        )

    def _best(self, family: int, narrow: Collection[Key]) -> tuple[int, float]:
        """(fraction bits, variance) of a family and of the weights that it meets."""
        around = (*self.readers.get(family, ()), *self.writers.get(family, ()))
        key = family, frozenset(p.key for p in around if p.key in narrow)
        if key not in self._known:
            self._known[key] = self._found(family, key[1])
        return self._known[key]

    def _found(self, family: int, narrow: frozenset[Key]) -> tuple[int, float]:
        held, readers = self.families[family], self.readers.get(family, ())
        if held.fixed is not None:
            choices = range(held.fixed, held.fixed + 1)
        else:
            most = [p.room for p in self.writers.get(family, ()) if p.key in narrow]
            most += [self._most(p) for p in readers if p.key in narrow]
            free = bool(readers) and all(p.key in narrow for p in readers)
            highest = max(min([FINEST if free else self.usual, *most]), 0)
            choices = range(min(held.fewest, highest), highest + 1)

        def variance(bits: int) -> float:
            weights = sum(
                self._shared(p, bits)[1]
                if p.key in narrow
                else p.weight_noise * 4.0**-p.wide_weight
                for p in readers
            )
            return held.noise * 4.0**-bits + weights

        return min(((bits, variance(bits)) for bits in choices), key=lambda c: (c[1], c[0]))

    def _most(self, p: Product) -> int:
        """Fraction bits that a narrow product lets an operand have."""
        if p.coarse is not None:
            return FINEST
        return (p.room - p.fewest) // len(p.families)

    def _shared(self, p: Product, bits: int) -> tuple[int, float]:
        """(bits taken from the operand before it is read, variance) of a narrow product."""
        options = [(0, p.weight_noise * 4.0 ** -max(p.room - bits, 0))]
        if p.coarse is not None:
            options += [
                (k, p.weight_noise * 4.0 ** -(p.room - bits + k) + p.coarse * 4.0 ** -(bits - k))
                for k in range(1, bits + 1)
                if p.room - bits + k >= 0
            ]
        enough = [o for o in options if p.room - bits + o[0] >= p.fewest]
        return min(enough or options, key=lambda o: (o[1], o[0]))


def products_of(draft: Draft) -> dict[Key, int]:
    """Ids of the products, by names that every lowering of the same graph shares."""
    count: dict[str, int] = {}
    found: dict[Key, int] = {}
    for id, step in enumerate(draft.steps):
        if step.op in PRODUCTS:
            number = count.setdefault(step.layer, 0)
            count[step.layer] += 1
            found[step.layer, number] = id
    return found


def families_of(draft: Draft) -> list[int]:
    """Number of each value's family: values that must have the same fraction bits."""
    parent = list(range(len(draft.steps)))

    def root(id: int) -> int:
        while parent[id] != id:
            parent[id] = parent[parent[id]]
            id = parent[id]
        return id

    for id, step in enumerate(draft.steps):
        joined = step.inputs[1::2] if step.op == "select" else step.inputs
        if not (OPS[step.op].local or step.op in ("select", "extend")):
            continue
        for j in joined:
            if draft.steps[j].frac_bits == step.frac_bits:
                parent[root(j)] = root(id)
    number = {r: k for k, r in enumerate(dict.fromkeys(map(root, range(len(parent)))))}
    return [number[root(id)] for id in range(len(parent))]


def allocation_of(
    draft: Draft, noise: Noise, widths: list[int], usual: int, fixed: bool = False
) -> Allocation:
    """The problem of a draft whose weights are tuned to 64 bits. `widths`: what readers demand.

    `fixed`: all scales stay as they are.
    """
    family, steps = families_of(draft), draft.steps
    members: dict[int, list[int]] = {}
    for id, f in enumerate(family):
        members.setdefault(f, []).append(id)
    tuned = {w for w, _ in tunable_weights(draft)}
    tuned |= {j for s in steps if s.op in PRODUCTS for j in s.inputs[2:] if steps[j].op == "weight"}
    families = tuple(
        Family(
            sum(noise.of_rounding(j) for j in ids if j not in tuned),
            min(fewest_bits(max(steps[j].interval.magnitude for j in ids)), usual),
            0 if any(steps[j].frac_bits == 0 for j in ids) else (usual if fixed else None),
        )
        for ids in (members[f] for f in range(len(members)))
    )
    return Allocation(usual, families, tuple(_products(draft, noise, widths, family)))


def _products(
    draft: Draft, noise: Noise, widths: list[int], family: list[int]
) -> Iterator[Product]:
    steps, tunable = draft.steps, {w for w, _ in tunable_weights(draft)}
    for key, id in products_of(draft).items():
        step = steps[id]
        own = next((j for j in step.inputs[:2] if j in tunable), None)
        others = [j for j in step.inputs[:2] if j != own]
        demanded = max(widths[id] - step.bound - 1, 0)
        possible = demanded <= MOST_DEMANDED
        coarse = None
        if own is not None and _summed(draft, others[0]):
            coarse = SHIFTED * noise.gain[id] * factor_of(draft, id, others[0], noise.power)
        yield Product(
            key,
            # A weight that is not free has the scale of what its node makes.
            tuple(family[id if steps[j].op == "weight" else j] for j in others),
            family[id],
            HALF_BITS - 1 - (step.bound - step.frac_bits) - (demanded if possible else 1),
            0.0 if own is None else noise.of_rounding(own),
            0 if own is None else steps[own].frac_bits,
            0 if own is None else significant(draft, own),
            coarse,
            prod(step.shape) * inner(step, steps),
            possible,
        )


def _summed(draft: Draft, id: int) -> bool:
    """Whether a value is a sum of many elements: then fewer bits of it carry as much."""
    while draft.steps[id].op in REARRANGES:
        id = draft.steps[id].inputs[0]
    return draft.steps[id].op == "sum"
