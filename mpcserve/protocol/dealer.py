"""Carol: walks the plan on masks alone and sends bob the corrections of all that must be dealt.

She never sees a masked value, so what she knows (every λ) says nothing about an input or a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mpcserve.plan.ops import OPS, PRODUCTS
from mpcserve.plan.plan import Instruction, Plan
from mpcserve.plan.stack import stack
from mpcserve.protocol.parties import NO_MASK, DealIO, Mask, input_mask
from mpcserve.protocol.primitives import join, product, rectify, select, sign, spectral, tally
from mpcserve.protocol.primitives.local_ops import ready_local
from mpcserve.randomness import Stream, bundle_key, derive, weights_key

_Deal = Callable[[DealIO, Sequence[Mask]], Mask]
_Fixed = tuple[int, product.Operand]


@dataclass(frozen=True, slots=True)
class _Step:
    """One instruction; `over`: operands that nobody reads afterwards."""

    id: int
    operands: tuple[int, ...]
    over: tuple[int, ...]
    deal: _Deal


@dataclass(frozen=True, slots=True, repr=False)
class _Walk:
    """A plan, its fixed masks by id, and its steps."""

    plan: Plan
    masks: list[Mask]
    steps: tuple[_Step, ...]


class Dealer:
    """One deployment on carol: `alice_key`, `bob_key` are its 32-byte pair keys."""

    def __init__(self, plan: Plan, alice_key: bytes, bob_key: bytes) -> None:
        self.plan = plan
        self._keys = (alice_key, bob_key)
        masks: dict[int, Mask] = {}
        for i in plan.instructions:
            if i.op == "weight":
                keys = [derive(weights_key(k, plan.digest), i.id) for k in self._keys]
                masks[i.id] = Mask(*(Stream(k).masks(i.value.shape, i.value.width) for k in keys))
        _complete(plan, masks)
        for id in masks.keys() - plan.static_reads - plan.last_fixed.keys():
            del masks[id]
        self._fixed: dict[int, _Fixed] = {}
        made: dict[Hashable, product.Operand] = {}
        for id, index in plan.fixed.items():
            i, key, w = plan[id], product.layout_of(plan, plan[id], index), plan[id].inputs[index]
            if key not in made:
                made[key] = product.ready(plan, i, index, masks[w].total(i.attrs["ring"]))
            self._fixed[id] = (index, made[key])
            if plan.last_fixed[w] == id and w not in plan.static_reads:
                del masks[w]  # a large model's would lie in memory twice
        self._masks = masks
        self._walks = {1: _walk(plan, masks, self._fixed)}

    def __repr__(self) -> str:
        return f"Dealer({self.plan.name!r})"

    def _of(self, slots: int) -> _Walk:
        walk = self._walks.get(slots)
        if walk is None:
            stacked = stack(self.plan, slots)
            masks = {stacked.of[id]: mask for id, mask in self._masks.items()}
            _complete(stacked.plan, masks)
            fixed = {stacked.done_by[id]: weight for id, weight in self._fixed.items()}
            walk = self._walks[slots] = _walk(stacked.plan, masks, fixed)
        return walk

    def deal(self, bundle_id: bytes, slots: int = 1) -> Iterator[memoryview]:
        """Bob's corrections of one bundle, in plan order; their lengths sum to the bill's."""
        keys = [bundle_key(k, self.plan.digest, bundle_id) for k in self._keys]
        walk = self._of(slots)
        alice_key, bob_key = keys
        masks, io = walk.masks.copy(), DealIO(alice_key, bob_key, walk.plan.unopened)
        for spec, stacked in zip(self.plan.inputs, walk.plan.inputs, strict=True):
            masks[stacked.id] = Mask(*(input_mask(self.plan, k, spec.id, slots) for k in keys))
        for step in walk.steps:
            masks[step.id] = step.deal(io, [masks[j] for j in step.operands])
            if io.corrections:
                yield from io.owed()
            for j in step.over:
                masks[j] = NO_MASK


def _walk(plan: Plan, masks: Mapping[int, Mask], fixed: Mapping[int, _Fixed]) -> _Walk:
    kept, steps = set(plan.static), []
    for i in reversed(plan.computed):
        over = tuple(set(i.inputs) - kept)
        kept |= set(over)
        steps.append(_Step(i.id, i.inputs, over, _deal(plan, i, fixed.get(i.id))))
    known = [masks.get(i.id, NO_MASK) for i in plan.instructions]
    return _Walk(plan, known, tuple(reversed(steps)))


def _complete(plan: Plan, masks: dict[int, Mask]) -> None:
    """Add what local ops make of the masks that are fixed at deployment."""
    for i in plan.instructions:
        missing = i.id in plan.static and i.id not in masks and i.op != "weight"
        if missing and all(j in masks for j in i.inputs):
            masks[i.id] = _local(plan, i)([masks[j] for j in i.inputs])


def _local(plan: Plan, i: Instruction) -> Callable[[Sequence[Mask]], Mask]:
    op = ready_local(i, plan.operands(i), False)
    return lambda masks: Mask(op([m.a for m in masks]), op([m.b for m in masks]))


def _deal(plan: Plan, i: Instruction, fixed: _Fixed | None) -> _Deal:
    if OPS[i.op].local:
        local = _local(plan, i)
        return lambda io, masks: local(masks)
    if i.op in PRODUCTS:
        return lambda io, masks: product.deal(io, i, masks, fixed)
    if i.op == "sign":
        return lambda io, masks: sign.deal(io, i, masks)
    if i.op == "rectify":
        return lambda io, masks: rectify.deal(io, i, masks)
    if i.op == "all":
        return lambda io, masks: join.deal(io, i, masks)
    if i.op == "spectral":
        return lambda io, masks: spectral.deal(io, i, masks)
    if i.op == "tally":
        return lambda io, masks: tally.deal(io, i, masks)
    if i.op == "select":
        return lambda io, masks: select.deal_select(io, i, masks)
    assert i.op == "extend"
    return lambda io, masks: select.deal_extend(io, i, masks)
