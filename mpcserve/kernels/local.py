"""Fused local passes between two rounds: truncate and mask a product, select, extend.

Each reads its operands once and writes one party's masked share, ready to be packed and sent. Words
are uint32 or uint64 (see `ring`); `T(…)` after every step keeps the arithmetic in the word's own
type, where numba would widen it.
"""

from __future__ import annotations

import numpy as np

from mpcserve.kernels.jit import kernel
from mpcserve.ring import Words

_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)


def _signatures(template: str) -> tuple[str, str]:
    """One signature for each word: `W` stands for it."""
    return template.replace("W", "uint64"), template.replace("W", "uint32")


@kernel(*_signatures("void(W[::1], W[::1], W[::1], int64, int64, int64, boolean)"))
def finish_product(
    z: Words, rest: Words, lam: Words, ring: int, truncate: int, width: int, leader: bool
) -> None:
    """z ← truncated share of z + rest (mod 2^ring), plus the output's mask share (mod 2^width).

    alice takes ⌊z_A / 2^t⌋ and bob −⌊−z_B / 2^t⌋. In Z_2^(ring − t) their sum is ⌊z / 2^t⌋, plus
    one with probability (z mod 2^t) / 2^t: unbiased, error < 1 ulp, exact multiples stay exact, and
    no wrap can be lost, since multiples of 2^ring become multiples of 2^(ring − t).
    """
    T = z.dtype.type
    ring_mask = T(_ALL >> np.uint64(64 - ring))
    mask = T(_ALL >> np.uint64(64 - width))
    t = T(truncate)
    zero = T(0)
    if leader:
        for k in range(z.size):
            quotient = T(T(T(z[k] + rest[k]) & ring_mask) >> t)
            z[k] = T(T(quotient + lam[k]) & mask)
    else:
        for k in range(z.size):
            quotient = T(T(T(zero - T(z[k] + rest[k])) & ring_mask) >> t)
            z[k] = T(T(lam[k] - quotient) & mask)


@kernel(*_signatures("void(W[::1], W[::1], int64)"))
def add_shares(mine: Words, theirs: Words, width: int) -> None:
    """mine ← mine + theirs (mod 2^width): both parties' masked shares join into Δ."""
    T = mine.dtype.type
    mask = T(_ALL >> np.uint64(64 - width))
    for k in range(mine.size):
        mine[k] = T(T(mine[k] + theirs[k]) & mask)


@kernel(*_signatures("void(W[::1], W[::1], int64, W[::1], W[::1], W[::1])"))
def mask_facts(a: Words, b: Words, width: int, total: Words, carry: Words, top: Words) -> None:
    """Of λ = λ_A + λ_B (mod 2^width): λ, the carry out of the sum, and λ's highest bit."""
    T = a.dtype.type
    mask = T(_ALL >> np.uint64(64 - width))
    high = T(width - 1)
    for k in range(a.size):
        x = T(a[k] & mask)
        s = T(T(x + b[k]) & mask)
        total[k] = s
        carry[k] = T(s < x)
        top[k] = T(s >> high)


@kernel(*_signatures("void(W[::1], int64, W[::1], W[::1], W[::1], W[::1])"))
def wide_masks(lam: Words, width: int, carry: Words, top: Words, low: Words, high: Words) -> None:
    """This party's shares of the two candidates Λ_1 = λ and Λ_0 = λ − 2^width·λ_msb.

    As integers λ = λ_A + λ_B − 2^width·carry, so shares of carry and λ_msb mod 2^(n − width) are
    all that must be dealt. `high` is Λ_1 (for Δ_msb = 1), `low` is Λ_0.
    The words hold n ≥ width bits.
    """
    T = lam.dtype.type
    mask = T(_ALL >> np.uint64(64 - width))
    scale = T(np.uint64(1) << np.uint64(width)) if width < 64 else T(0)
    for k in range(lam.size):
        one = T(T(lam[k] & mask) - T(carry[k] * scale))
        high[k] = one
        low[k] = T(one - T(top[k] * scale))


@kernel(*_signatures("void(W[::1], W[::1], W[::1], W[::1], int64, uint64, int64, boolean, W[::1])"))
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
    T = out.dtype.type
    mask = T(_ALL >> np.uint64(64 - width))
    out_mask = T(_ALL >> np.uint64(64 - out_width))
    top = T(width - 1)
    o = T(offset)
    keep = T(1) if leader else T(0)
    for k in range(delta.size):
        d = T(T(delta[k] + o) & mask)
        chosen = high[k] if T(d >> top) else low[k]
        public = T(keep * T(d - o))
        out[k] = T(T(T(public - chosen) + lam[k]) & out_mask)


@kernel(
    *_signatures(
        "void(W[::1], uint64[::1], W[:, ::1], int64, uint64, boolean, int64, boolean, W[::1])"
    )
)
def select_share(
    delta: Words,
    bit: Words,
    dealt: Words,
    width: int,
    offset: np.uint64,
    when: bool,
    out_width: int,
    leader: bool,
    out: Words,
) -> None:
    """out ← out + share of b·x (mod 2^out_width), for b = [secret bit = `when`].

    The bit is open as δ = bit ⊕ β, so b = δ' + (1 − 2δ')·β with δ' = δ for when = 1, else ¬δ. With
    x = P − Λ_h as in `extend_share`:  b·x = δ'·(P − Λ_h) + (1 − 2δ')·(β·P − βΛ_h).
    Shapes: bit [ceil(N / 64)]; dealt [5, N]: shares of Λ_0, Λ_1, βΛ_0, βΛ_1, β.
    """
    T = out.dtype.type
    mask = T(_ALL >> np.uint64(64 - width))
    out_mask = T(_ALL >> np.uint64(64 - out_width))
    top = T(width - 1)
    o = T(offset)
    flip = np.uint64(0) if when else np.uint64(1)
    keep = T(1) if leader else T(0)
    one = T(1)
    for k in range(delta.size):
        d = T(T(delta[k] + o) & mask)
        h = np.int64(d >> top)
        p = T(d - o)
        b = T(((bit[k >> 6] >> np.uint64(k & 63)) & np.uint64(1)) ^ flip)
        plain = T(T(keep * p) - dealt[h, k])
        crossed = T(T(dealt[4, k] * p) - dealt[2 + h, k])
        share = T(T(b * plain) + T(T(one - T(b + b)) * crossed))
        out[k] = T(T(out[k] + share) & out_mask)


@kernel(*_signatures("void(uint64[::1], int64, W[:, ::1], W[::1], int64, boolean, W[::1])"))
def tally_share(
    bit: Words, start: int, dealt: Words, values: Words, width: int, leader: bool, out: Words
) -> None:
    """out ← out + share of Σ_k values[k]·b_k (mod 2^width), for elements `start` and on.

    b = δ + (1 − 2δ)·β. Shapes: bit [ceil(K·N / 64)], row after row; dealt [K, N]: shares of β.
    """
    T = out.dtype.type
    mask = T(_ALL >> np.uint64(64 - width))
    keep = T(1) if leader else T(0)
    one = T(1)
    for k in range(values.size):
        at = k * dealt.shape[1] + start
        for e in range(out.size):
            d = T((bit[(at + e) >> 6] >> np.uint64((at + e) & 63)) & np.uint64(1))
            share = T(T(d * keep) + T(T(one - T(d + d)) * dealt[k, start + e]))
            out[e] = T(out[e] + T(values[k] * share))
    for e in range(out.size):
        out[e] = T(out[e] & mask)
