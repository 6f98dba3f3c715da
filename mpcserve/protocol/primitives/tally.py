"""tally: Σ_k v_k·b_k of secret bits b_k and public whole numbers v_k, in one round.

The bits are open as δ_k = b_k ⊕ β_k, so b_k = δ_k + (1 − 2δ_k)·β_k over Z_2^n. Carol deals β_k over
Z_2^n; the sum is local and only it is opened. So a bit becomes a number, and many are counted.

Error: exact. Cost: 1 round, n bits each way per sum; dealt: n bits per bit.
Leaks: nothing: the sum is opened under a fresh mask of n bits. Source: ABY2.0 (bit to arithmetic).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mpcserve.kernels import bits, local
from mpcserve.plan.plan import Instruction
from mpcserve.protocol.opening import open_share
from mpcserve.protocol.parties import DealIO, Mask, PrepareIO, Side, Steps
from mpcserve.ring import Words, word_type, words_of


class Material(NamedTuple):
    """Shares of the β's [K, N] and of the output's mask."""

    dealt: Words
    lam: Words


def deal(io: DealIO, i: Instruction, masks: Sequence[Mask]) -> Mask:
    """Deal every bit's mask as a number."""
    n, count = i.value.width, len(i.attrs["values"])
    beta = np.empty(count * i.value.size, word_type(n))
    bits.unslice_bit(masks[0].a ^ masks[0].b, beta)
    io.deal(beta.reshape(count, -1), n)
    return io.fresh(i)


def prepare(io: PrepareIO, i: Instruction) -> tuple[Words, Material]:
    """This side's shares."""
    n = i.value.width
    dealt = io.dealt((len(i.attrs["values"]), i.value.size), n)
    lam = io.fresh(i)
    return lam, Material(np.ascontiguousarray(dealt), lam.reshape(-1))


def evaluate(side: Side, i: Instruction, material: Material, delta: Words) -> Steps[Words]:
    """1 round of n bits each way."""
    n, values = i.value.width, i.attrs["values"]
    weights = words_of(values, (len(values),), n)
    out = np.empty(i.value.size, word_type(n))

    def fill(part: slice) -> None:
        out[part] = material.lam[part]
        local.tally_share(delta, part.start, material.dealt, weights, n, side == "alice", out[part])

    return (yield from open_share(out, n, fill)).reshape(i.value.shape)
