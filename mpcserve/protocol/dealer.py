"""Carol: walks the plan on masks alone and sends bob the corrections of all that must be dealt.

She never sees a masked value, so what she knows (every λ) says nothing about an input or a weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from mpcserve.plan.ops import OPS, PRODUCTS
from mpcserve.plan.plan import Instruction, Plan
from mpcserve.protocol.parties import DealIO, Mask
from mpcserve.protocol.primitives import join, product, select, sign, spectral, tally
from mpcserve.protocol.primitives.local_ops import apply_local
from mpcserve.randomness import Stream, bundle_key, derive, weights_key

_NOTHING = Mask(np.empty(0, np.uint64), np.empty(0, np.uint64))
"""Stands for a product's fixed operand, which is not read again."""


class Dealer:
    """One deployment on carol: `alice_key`, `bob_key` are its 32-byte pair keys."""

    def __init__(self, plan: Plan, alice_key: bytes, bob_key: bytes) -> None:
        self.plan = plan
        self._keys = (alice_key, bob_key)
        self._static: dict[int, Mask] = {}
        for i in plan.instructions:
            if i.id in plan.static:
                self._static[i.id] = self._static_mask(i)
        self._fixed: dict[int, tuple[int, product.Operand]] = {}
        for i in plan.instructions:
            if (index := plan.fixed.get(i.id)) is not None:
                lam = self._static[i.inputs[index]].total(i.attrs["ring"])
                self._fixed[i.id] = (index, product.ready(i, index, lam))
        for id in self._static.keys() - plan.static_reads:
            del self._static[id]

    def __repr__(self) -> str:
        return f"Dealer({self.plan.name!r})"

    def _static_mask(self, i: Instruction) -> Mask:
        if i.op == "weight":
            keys = [derive(weights_key(k, self.plan.digest), i.id) for k in self._keys]
            return Mask(*(Stream(k).masks(i.value.shape, i.value.width) for k in keys))
        operands = [self._static[j] for j in i.inputs]
        return _local_mask(self.plan, i, operands)

    def deal(self, bundle_id: bytes) -> Iterator[memoryview]:
        """Bob's corrections of one bundle, in plan order; their lengths sum to the bill's."""
        alice, bob = (bundle_key(k, self.plan.digest, bundle_id) for k in self._keys)
        masks = dict(self._static)
        uses = Counter(j for i in self.plan.instructions for j in i.inputs)
        for i in self.plan.instructions:
            if i.id in self.plan.static:
                continue
            operands = [masks.get(j, _NOTHING) for j in i.inputs]
            if OPS[i.op].local:
                masks[i.id] = _local_mask(self.plan, i, operands)
            else:
                io = DealIO(alice, bob, i.id)
                masks[i.id] = self._deal(io, i, operands)
                yield from io.corrections
            for j in i.inputs:
                uses[j] -= 1
                if not uses[j] and j not in self._static:
                    masks.pop(j, None)

    def _deal(self, io: DealIO, i: Instruction, operands: list[Mask]) -> Mask:
        if i.op == "input":
            return io.mask(i.value.shape, i.value.width)
        if i.op in PRODUCTS:
            return product.deal(io, i, operands, self._fixed.get(i.id))
        if i.op == "sign":
            return sign.deal(io, i, operands)
        if i.op == "all":
            return join.deal(io, i, operands)
        if i.op == "spectral":
            return spectral.deal(io, i, operands)
        if i.op == "tally":
            return tally.deal(io, i, operands)
        if i.op == "select":
            return select.deal_select(io, i, operands)
        assert i.op == "extend"
        return select.deal_extend(io, i, operands)


def _local_mask(plan: Plan, i: Instruction, operands: list[Mask]) -> Mask:
    a = apply_local(plan, i, [m.a for m in operands], False)
    return Mask(a, apply_local(plan, i, [m.b for m in operands], False))
