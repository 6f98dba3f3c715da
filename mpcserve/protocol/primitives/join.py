"""all: the bit [every operand bit equals its `when`], in one round whatever their number.

An operand is open as Δ_j = bit_j ⊕ β_j, so the literal is δ_j ⊕ β_j with δ_j = Δ_j or ¬Δ_j, and the
product of all literals is multilinear in the β's. Carol deals shares of their products of two and
more; the single β's are shared already. The result is opened under a fresh bit.

Error: exact. Cost: 1 round, 1 bit each way; dealt: 2^c − 1 − c bits for c operands.
Leaks: nothing: the opened bit is masked by a fresh one. Source: FLUTE, ABY2.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mpcserve.kernels import bits
from mpcserve.plan.plan import Instruction
from mpcserve.protocol.parties import DealIO, Mask, PrepareIO, Round, Side, Steps
from mpcserve.ring import Words

_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)


class Material(NamedTuple):
    """Shares of b_S for every subset S of the operands' masks, and of the output's mask."""

    table: Words
    beta: Words


def _products(count: int) -> list[int]:
    """Subsets of two and more, as bit masks in ascending order: what is dealt."""
    return [s for s in range(1 << count) if s & (s - 1)]


def deal(io: DealIO, i: Instruction, masks: Sequence[Mask]) -> Mask:
    """Deal the products of the operands' masks."""
    betas = np.stack([m.a ^ m.b for m in masks])
    table = np.empty((1 << len(masks), betas.shape[1]), np.uint64)
    bits.monomials(betas, table[1:])
    io.deal_bits(table[_products(len(masks))], i.value.size)
    return io.fresh(i)


def prepare(io: PrepareIO, i: Instruction, halves: Sequence[Words]) -> tuple[Words, Material]:
    """This side's shares of all monomials."""
    dealt = _products(len(halves))
    table = np.empty((1 << len(halves), halves[0].size), np.uint64)
    table[0] = _ALL if io.leader else np.uint64(0)
    for j, half in enumerate(halves):
        table[1 << j] = half
    table[dealt] = io.dealt_bits(len(dealt), i.value.size)
    beta = io.fresh(i)
    return beta, Material(table, beta)


def evaluate(
    side: Side, i: Instruction, material: Material, deltas: Sequence[Words]
) -> Steps[Words]:
    """1 round of 1 bit each way."""
    size = i.value.size
    flips = [np.uint64(0) if w else _ALL for w in i.attrs["when"]]
    literals = np.stack([d ^ f for d, f in zip(deltas, flips, strict=True)])
    out = np.empty_like(material.beta)
    bits.join_bits(literals, material.table, out)
    out ^= material.beta
    received = yield Round((bits.pack_planes(out[None], size),), (size + 7) // 8)
    out ^= bits.unpack_planes(received, 1, size)[0]
    return out
