"""select and extend: read x mod 2^m, write b·x or x mod 2^n. The wide result rides along for free.

With x' = x + o ≥ 0 (o = 0 if x is known not to be negative, else 2^(m−2)) and x' < 2^(m−1), as an
integer x' = Δ' − Λ where Δ' = Δ + o mod 2^m and Λ = λ if Δ'_msb = 1, else λ − 2^m·λ_msb: a set top
bit of Δ' means that no wrap was lost; a clear one means that x' wrapped exactly when λ_msb is set.
As integers λ = λ_A + λ_B − 2^m·carry, so carol deals only carry and λ_msb, n − m bits each, and for
select β (n), β·λ (n) and β·λ_msb (n − m). Of several pairs each has an m of its own.

Error: exact. Cost: 1 round, n bits each way; dealt: extend 2(n − m), select 2n + 3(n − m) bits.
Leaks: nothing: the output is opened under a fresh mask of n bits.
Source: ABY2.0, ASTRA (masked evaluation); MSB-dependent wrap as in SIRNN.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpcserve.kernels import bits, local, packing
from mpcserve.kernels.tasks import Run, one_by_one
from mpcserve.plan.plan import Instruction
from mpcserve.protocol.opening import open_packed, open_share, tiles
from mpcserve.protocol.parties import DealIO, Mask, PrepareIO, Side, Steps
from mpcserve.ring import HALF_BITS, WORD_BITS, Words, as_words, word_type


class ExtendMaterial(NamedTuple):
    """Λ_0, Λ_1 and the output's mask, one server's shares."""

    low: Words
    high: Words
    lam: Words


class Pair(NamedTuple):
    """One server's shares of what b·x adds for δ' = 0 and 1, of β, and of what a wrap adds."""

    zero: Words
    one: Words
    beta: Words
    top_zero: Words
    top_one: Words


SelectMaterial = tuple[Pair, ...]
"""The first pair's holds the output's mask."""


def _offset(i: Instruction, width: int) -> np.uint64:
    if i.op == "select" and i.attrs["nonnegative"]:
        return np.uint64(0)
    return np.uint64(1 << (width - 2))


def _flat(x: Words, width: int) -> Words:
    """x in words of `width` bits, as one contiguous row."""
    return np.ascontiguousarray(as_words(x, width)).reshape(-1)


def _mask_facts(mask: Mask, width: int) -> tuple[Words, Words, Words]:
    a, b = _flat(mask.a, width), _flat(mask.b, width)
    total, carry, top = np.empty_like(a), np.empty_like(a), np.empty_like(a)
    # carries of wider masks are not carries mod 2^width: both are reduced inside
    local.mask_facts(a, b, width, total, carry, top)
    return total, carry, top


def deal_extend(io: DealIO, i: Instruction, masks: Sequence[Mask]) -> Mask:
    """Deal carry and λ_msb."""
    _, carry, top = _mask_facts(masks[0], i.attrs["width"])
    high = i.value.width - i.attrs["width"]
    io.deal(carry, high)
    io.deal(top, high)
    return io.fresh(i)


def prepare_extend(
    io: PrepareIO, i: Instruction, halves: Sequence[Words]
) -> tuple[Words, ExtendMaterial]:
    """Shares of the two candidates for Λ."""
    m, n, shape = i.attrs["width"], i.value.width, (i.value.size,)
    low, high = np.empty(shape, word_type(n)), np.empty(shape, word_type(n))
    carry, top = (as_words(io.dealt(shape, n - m), n) for _ in range(2))
    local.wide_masks(_flat(halves[0], n), m, carry, top, low, high)
    lam = io.fresh(i)
    return lam, ExtendMaterial(low, high, lam.reshape(-1))


def evaluate_extend(
    side: Side, i: Instruction, material: ExtendMaterial, delta: Words
) -> Steps[Words]:
    """1 round of n bits each way."""
    n = i.value.width
    out, flat = np.empty(i.value.size, word_type(n)), _flat(delta, n)

    def fill(part: slice) -> None:
        local.extend_share(
            flat[part],
            material.low[part],
            material.high[part],
            material.lam[part],
            i.attrs["width"],
            _offset(i, i.attrs["width"]),
            n,
            side == "alice",
            out[part],
        )

    return (yield from open_share(out, n, fill)).reshape(i.value.shape)


def deal_select(io: DealIO, i: Instruction, masks: Sequence[Mask]) -> Mask:
    """For each pair deal β with β·λ and, if the result is wider, carry with λ_msb and β·λ_msb."""
    n, beta = i.value.width, np.empty(i.value.size, word_type(i.value.width))
    for bit, x, m in zip(masks[::2], masks[1::2], i.attrs["widths"], strict=True):
        bits.unslice_bit(bit.a ^ bit.b, beta)
        deal_pair(io, beta, x, m, n)
    return io.fresh(i)


def deal_pair(io: DealIO, beta: Words, x: Mask, m: int, n: int) -> None:
    """Of one pair; `beta`: the bit's mask as numbers."""
    size = beta.size
    own, above = (np.empty(count, word_type(n)) for count in (2 * size, 3 * size * (n > m)))
    own[:size] = beta
    local.select_facts(_flat(x.a, m), _flat(x.b, m), m, own, above)
    io.deal(own, n)
    if n > m:
        io.deal(above, n - m)


def prepare_select(
    io: PrepareIO, i: Instruction, halves: Sequence[Words]
) -> tuple[Words, SelectMaterial]:
    """This side's shares."""
    n, size, widths = i.value.width, i.value.size, i.attrs["widths"]
    dealt = [dealt_pair(io, size, m, n) for m in widths]
    lam = io.fresh(i)
    masks = [lam.reshape(-1), *[np.zeros(size, lam.dtype) for _ in widths[1:]]]
    given = zip(halves[1::2], dealt, masks, widths, strict=True)
    return lam, tuple(ready(half, parts, mask, m, n) for half, parts, mask, m in given)


def ready(half: Words, parts: tuple[Words, ...], mask: Words, m: int, n: int) -> Pair:
    """One pair, from this side's shares of λ, of what was dealt, and of the output's mask."""
    beta, cross, carry, top, beta_top = parts
    zero, one = np.empty(beta.size, word_type(n)), cross  # which is not read any more
    tops = np.empty((2, beta.size), local.tops_type(m, n))
    local.ready_pair(
        np.ascontiguousarray(half).reshape(-1),
        m,
        n,
        carry,
        top,
        beta_top,
        cross,
        mask,
        zero,
        one,
        tops[0],
        tops[1],
    )
    return Pair(zero, one, beta, tops[0], tops[1])


def dealt_pair(io: PrepareIO, size: int, m: int, n: int) -> tuple[Words, ...]:
    """β, β·λ, carry, λ_msb, β·λ_msb; where no wrap can be lost β stands for the last three."""
    beta, cross = io.dealt((2, size), n)
    if n <= m:
        return beta, cross, beta, beta, beta
    return beta, cross, *as_words(io.dealt((3, size), n - m), n)


def add_selected(
    x: Words,
    bit: Words,
    pair: Pair,
    part: slice,
    m: int,
    n: int,
    leader: bool,
    out: Words,
    space: NDArray[np.uint8],
) -> None:
    """Add this side's share of [the bit is clear]·x, for x ≥ 0 there, to out[part], and pack it."""
    room = np.empty(local.SELECT_ROOM, out.dtype)
    local.select_share(
        x, bit, *pair, part.start, part.stop, m, np.uint64(0), False, True, n, leader, room, out,
        space,
    )  # fmt: skip


def evaluate_select(
    side: Side,
    i: Instruction,
    material: SelectMaterial,
    deltas: Sequence[Words],
    run: Run = one_by_one,
) -> Steps[Words]:
    """1 round of n bits each way, however many pairs."""
    n = i.value.width
    out = np.empty(i.value.size, word_type(n))
    flats = [np.ascontiguousarray(x).reshape(-1) for x in deltas[1::2]]
    whole = n in (HALF_BITS, WORD_BITS)

    def piece(part: slice) -> memoryview:
        unused = np.empty(0, np.uint8)
        space = unused if whole else packing.packed_space(part.stop - part.start, n)
        room, last = np.empty(local.SELECT_ROOM, out.dtype), len(flats) - 1
        for number, (x, bit, pair, width) in enumerate(
            zip(flats, deltas[::2], material, i.attrs["widths"], strict=True)
        ):
            local.select_share(
                x,
                bit,
                *pair,
                part.start,
                part.stop,
                width,
                _offset(i, width),
                bool(i.attrs["when"]),
                number > 0,
                n,
                side == "alice",
                room,
                out,
                space if number == last else unused,
            )
        return memoryview(bits.bytes_of(out[part]).data) if whole else packing.packed_bytes(space)

    pieces = run(partial(piece, part) for part in tiles(out.size))
    return (yield from open_packed(out, n, pieces)).reshape(i.value.shape)
