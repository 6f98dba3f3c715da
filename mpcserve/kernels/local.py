"""Fused local passes between two rounds: truncate and mask a product, select, extend.

Each reads its operands once and writes one party's masked share, ready to be packed and sent.
"""

from __future__ import annotations

import numpy as np

from mpcserve.kernels.jit import kernel
from mpcserve.ring import Words

_U0 = np.uint64(0)
_U1 = np.uint64(1)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)


@kernel("void(uint64[::1], uint64[::1], uint64[::1], int64, int64, int64, boolean)")
def finish_product(
    z: Words, rest: Words, lam: Words, ring: int, truncate: int, width: int, leader: bool
) -> None:
    """z ← truncated share of z + rest (mod 2^ring), plus the output's mask share (mod 2^width).

    alice takes ⌊z_A / 2^t⌋ and bob −⌊−z_B / 2^t⌋. In Z_2^(ring − t) their sum is ⌊z / 2^t⌋, plus
    one with probability (z mod 2^t) / 2^t: unbiased, error < 1 ulp, exact multiples stay exact, and
    no wrap can be lost, since multiples of 2^ring become multiples of 2^(ring − t).
    """
    ring_mask = _ALL >> np.uint64(64 - ring)
    mask = _ALL >> np.uint64(64 - width)
    t = np.uint64(truncate)
    if leader:
        for k in range(z.size):
            z[k] = ((((z[k] + rest[k]) & ring_mask) >> t) + lam[k]) & mask
    else:
        for k in range(z.size):
            z[k] = (lam[k] - (((_U0 - z[k] - rest[k]) & ring_mask) >> t)) & mask


@kernel("void(uint64[::1], uint64[::1], int64)")
def add_shares(mine: Words, theirs: Words, width: int) -> None:
    """mine ← mine + theirs (mod 2^width): both parties' masked shares join into Δ."""
    mask = _ALL >> np.uint64(64 - width)
    for k in range(mine.size):
        mine[k] = (mine[k] + theirs[k]) & mask


@kernel("void(uint64[::1], uint64[::1], int64, uint64[::1], uint64[::1], uint64[::1])")
def mask_facts(a: Words, b: Words, width: int, total: Words, carry: Words, top: Words) -> None:
    """Of λ = λ_A + λ_B (mod 2^width): λ, the carry out of the sum, and λ's highest bit."""
    mask = _ALL >> np.uint64(64 - width)
    high = np.uint64(width - 1)
    for k in range(a.size):
        x = a[k] & mask
        s = (x + b[k]) & mask
        total[k] = s
        carry[k] = _U1 if s < x else _U0
        top[k] = s >> high


@kernel("void(uint64[::1], int64, uint64[::1], uint64[::1], uint64[::1], uint64[::1])")
def wide_masks(lam: Words, width: int, carry: Words, top: Words, low: Words, high: Words) -> None:
    """This party's shares over Z_2^64 of the two candidates Λ_1 = λ and Λ_0 = λ − 2^width·λ_msb.

    As integers λ = λ_A + λ_B − 2^width·carry, so shares of carry and λ_msb mod 2^(n − width) are
    all that must be dealt. `high` is Λ_1 (for Δ_msb = 1), `low` is Λ_0.
    """
    mask = _ALL >> np.uint64(64 - width)
    shift = np.uint64(width)
    for k in range(lam.size):
        one = (lam[k] & mask) - (carry[k] << shift)
        high[k] = one
        low[k] = one - (top[k] << shift)


@kernel(
    "void(uint64[::1], uint64[::1], uint64[::1], uint64[::1], int64, uint64, int64, boolean,"
    " uint64[::1])"
)
def extend_share(
    delta: Words,
    low: Words,
    high: Words,
    lam: Words,
    width: int,
    offset: np.uint64,
    out_width: int,
    leader: bool,
    out: Words,
) -> None:
    """out ← share of x + mask share (mod 2^out_width).

    x = Δ' − Λ_h − offset with Δ' = Δ + offset (mod 2^width) and h its highest bit.
    """
    mask = _ALL >> np.uint64(64 - width)
    out_mask = _ALL >> np.uint64(64 - out_width)
    top = np.uint64(width - 1)
    for k in range(delta.size):
        d = (delta[k] + offset) & mask
        share = _U0 - (high[k] if d >> top else low[k])
        if leader:
            share += d - offset
        out[k] = (share + lam[k]) & out_mask


@kernel(
    "void(uint64[::1], uint64[::1], uint64[:, ::1], uint64[::1], int64, uint64, boolean, int64,"
    " boolean, uint64[::1])"
)
def select_share(
    delta: Words,
    bit: Words,
    dealt: Words,
    lam: Words,
    width: int,
    offset: np.uint64,
    when: bool,
    out_width: int,
    leader: bool,
    out: Words,
) -> None:
    """out ← share of b·x + mask share (mod 2^out_width), for b = [secret bit = `when`].

    The bit is open as δ = bit ⊕ β, so b = δ' + (1 − 2δ')·β with δ' = δ for when = 1, else ¬δ. With
    x = P − Λ_h as in `extend_share`:  b·x = δ'·(P − Λ_h) + (1 − 2δ')·(β·P − βΛ_h).
    Shapes: bit [ceil(N / 64)]; dealt [5, N]: shares of Λ_0, Λ_1, βΛ_0, βΛ_1, β.
    """
    mask = _ALL >> np.uint64(64 - width)
    out_mask = _ALL >> np.uint64(64 - out_width)
    top = np.uint64(width - 1)
    flip = _U0 if when else _U1
    for k in range(delta.size):
        d = (delta[k] + offset) & mask
        h = np.int64(d >> top)
        p = d - offset
        b = ((bit[k >> 6] >> np.uint64(k & 63)) & _U1) ^ flip
        plain = _U0 - dealt[h, k]
        if leader:
            plain += p
        crossed = dealt[4, k] * p - dealt[2 + h, k]
        # b is public here: choose by arithmetic so that both outcomes cost the same
        share = b * plain + (_U1 - b - b) * crossed
        out[k] = (share + lam[k]) & out_mask
