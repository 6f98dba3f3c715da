"""spectral: a sum of sines and cosines of x in one round: any smooth function on a finite range.

y = Σ_k a_k·sin(kωx) + b_k·cos(kωx) with ω one turn per 2^width ulp of x. The period is the ring:
reducing x mod 2^width is free, and its wrap is the function's own period, so no wrap bit is needed.
sin and cos of kω(Δ − λ) expand into public waves of Δ times waves of λ, which carol deals; the sum
is local.

Error: < 1 ulp from the truncation, and K·2^−q of the coefficients' and waves' rounding. Waves with
small coefficients may be coarser: these are dealt in fewer bits.
Domain: all x; outside the range a function was fitted on, its periodic continuation.
Cost: 1 round, `width` of the output each way; dealt: 2K values of up to `ring` bits, whatever the
number of sums that share them.
Leaks: nothing: the output is opened under a fresh mask.
Source: SecFormer, SHAFT (Fourier series on masked values).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mpcserve.kernels import local, packing, waves
from mpcserve.plan.ops import wave_rings
from mpcserve.plan.plan import Instruction
from mpcserve.protocol.opening import open_packed, tiles
from mpcserve.protocol.parties import DealIO, Mask, PrepareIO, Side, Steps
from mpcserve.ring import Words, reduce, word_type

STEP = 1 << 12
"""Elements whose waves are gathered at once."""


class Material(NamedTuple):
    """Shares of λ's waves, [2, N] of each harmonic, and of the output's mask."""

    dealt: tuple[Words, ...]
    lam: Words


def _angles(x: Words, width: int) -> Words:
    return np.ascontiguousarray(reduce(x, width).astype(np.uint64)).reshape(-1)


def deal(io: DealIO, i: Instruction, masks: Sequence[Mask]) -> Mask:
    """Deal the waves of λ."""
    at, width = i.attrs, i.attrs["width"]
    bits, table = np.array(at["waves"], np.int64), waves.tables(width)
    made = np.empty((2 * bits.size, i.value.size // at["sums"]), np.uint64)
    angles, room = _angles(masks[0].total(width), width), waves.scratch()
    waves.wave_masks(angles, width, *table, bits, room, made)
    for k, ring in enumerate(wave_rings(at)):
        io.deal(made[2 * k : 2 * k + 2], ring)
    return io.fresh(i)


def prepare(io: PrepareIO, i: Instruction, halves: Sequence[Words]) -> tuple[Words, Material]:
    """This side's shares."""
    pair = (2, i.value.size // i.attrs["sums"])
    dealt = tuple(io.dealt(pair, ring) for ring in wave_rings(i.attrs))
    lam = io.fresh(i)
    return lam, Material(dealt, lam.reshape(-1))


def evaluate(side: Side, i: Instruction, material: Material, delta: Words) -> Steps[Words]:
    """1 round."""
    at, n = i.attrs, i.value.width
    angles, table = _angles(delta, at["width"]), waves.tables(at["width"])
    sine, cosine = (
        np.array(at[name], np.int64).reshape(at["sums"], -1) for name in ("sine", "cosine")
    )
    waves_bits = np.array(at["waves"])
    lift = (waves_bits.max() - waves_bits).astype(np.uint64)
    out, nothing = np.empty(i.value.size, word_type(n)), np.zeros(i.value.size, np.uint64)
    room, block = waves.scratch(at["sums"]), np.empty((2 * lift.size, STEP), np.uint64)

    def fill(part: slice, z: Words) -> None:
        """z ← this side's shares of the sums, in blocks whose waves fit the second-level cache."""
        for start in range(part.start, part.stop, STEP):
            some = slice(start, min(start + STEP, part.stop))
            size = some.stop - start
            dealt = block if size == STEP else np.empty((2 * lift.size, size), np.uint64)
            for k, pair in enumerate(material.dealt):
                dealt[2 * k : 2 * k + 2] = pair[:, some]
            to = z[start - part.start : some.stop - part.start]
            waves.wave_share(angles[some], at["width"], *table, sine, cosine, lift, dealt, room, to)

    def pieces() -> Iterator[memoryview]:
        for part in tiles(angles.size):
            z = np.empty((part.stop - part.start, at["sums"]), np.uint64)
            space = packing.packed_space(z.size, n)
            fill(part, z)
            local.finish_product(
                z.reshape(-1),
                part.start * at["sums"],
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
