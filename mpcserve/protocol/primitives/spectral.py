"""spectral: a sum of sines and cosines of x in one round: any smooth function on a finite range.

y = Σ_k a_k·sin(kωx) + b_k·cos(kωx) with ω one turn per 2^width ulp of x. The period is the ring:
reducing x mod 2^width is free, and its wrap is the function's own period, so no wrap bit is needed.
sin and cos of kω(Δ − λ) expand into public waves of Δ times waves of λ, which carol deals; the sum
is local.

Error: < 1 ulp from the truncation, and K·2^−q of the coefficients' and waves' rounding.
Domain: all x; outside the range a function was fitted on, its periodic continuation.
Cost: 1 round, `width` of the output each way; dealt: 2K values of `ring` bits.
Leaks: nothing: the output is opened under a fresh mask.
Source: SecFormer, SHAFT (Fourier series on masked values).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mpcserve.kernels import local, packing, waves
from mpcserve.plan.plan import Instruction
from mpcserve.protocol.opening import open_packed, tiles
from mpcserve.protocol.parties import DealIO, Mask, PrepareIO, Side, Steps
from mpcserve.ring import Words, reduce, word_type


class Material(NamedTuple):
    """Shares of λ's waves [2K, N] and of the output's mask."""

    dealt: Words
    lam: Words


def _angles(x: Words, width: int) -> Words:
    return np.ascontiguousarray(reduce(x, width).astype(np.uint64)).reshape(-1)


def deal(io: DealIO, i: Instruction, masks: Sequence[Mask]) -> Mask:
    """Deal the waves of λ."""
    at, width = i.attrs, i.attrs["width"]
    made = np.empty((2 * len(at["sine"]), i.value.size), np.uint64)
    table = waves.tables(width)
    waves.wave_masks(_angles(masks[0].total(width), width), width, *table, at["bits"], made)
    io.deal(made, at["ring"])
    return io.mask(i.value.shape, i.value.width)


def prepare(io: PrepareIO, i: Instruction, halves: Sequence[Words]) -> tuple[Words, Material]:
    """This side's shares."""
    dealt = io.dealt((2 * len(i.attrs["sine"]), i.value.size), i.attrs["ring"])
    lam = io.mask(i.value.shape, i.value.width)
    return lam, Material(dealt, lam.reshape(-1))


def evaluate(side: Side, i: Instruction, material: Material, delta: Words) -> Steps[Words]:
    """1 round."""
    at, n = i.attrs, i.value.width
    angles, table = _angles(delta, at["width"]), waves.tables(at["width"])
    sine, cosine = (np.array(at[name], np.int64) for name in ("sine", "cosine"))
    out, nothing = np.empty(i.value.size, word_type(n)), np.zeros(i.value.size, np.uint64)

    def pieces() -> Iterator[memoryview]:
        for part in tiles(out.size):
            z, space = np.empty_like(angles[part]), packing.packed_space(part.stop - part.start, n)
            dealt = np.ascontiguousarray(material.dealt[:, part].astype(np.uint64))
            waves.wave_share(angles[part], at["width"], *table, sine, cosine, dealt, z)
            local.finish_product(
                z,
                part.start,
                nothing,
                material.lam,
                at["ring"],
                at["truncate"],
                n,
                side == "alice",
                out,
                space,
            )
            yield packing.packed_bytes(space)

    return (yield from open_packed(out, n, pieces())).reshape(i.value.shape)
