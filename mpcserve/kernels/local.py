"""Fused local passes between two rounds: truncate and mask a product, select, extend.

Each reads its operands once, block by block, and writes one party's masked share, packed for the
peer where it is sent next. Words are uint32 or uint64 (see `ring`); `T(…)` after every step keeps
the arithmetic in the word's own type, where numba would widen it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mpcserve.kernels.jit import kernel
from mpcserve.kernels.packing import Bytes, pack_from
from mpcserve.kernels.places import Place, on, part, place_of, spread
from mpcserve.ring import Words, word_type

_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_BLOCK = 512
"""Elements a block: all that a pass reads and writes of them stays in the first-level cache."""
SELECT_ROOM = 2 * _BLOCK
"""Words that `select_share` needs for itself."""


def _signatures(template: str) -> tuple[str, str]:
    """One signature for each word: `W` stands for it."""
    return template.replace("W", "uint64"), template.replace("W", "uint32")


def _pairs(template: str) -> tuple[str, ...]:
    """The same for two words, V not wider than W."""
    narrow = template.replace("V", "uint32")
    return (*_signatures(narrow), template.replace("W", "uint64").replace("V", "uint64"))


_FACTS = tuple(
    f"void({w}[::1], {w}[::1], int64, {v}[::1], {v}[::1])"
    for w in ("uint32", "uint64")
    for v in ("uint32", "uint64")
)


@part
def _pack_done(out: Words, packed: int, done: int, first: int, width: int, space: Bytes) -> int:
    """Pack out[packed:done], or what of it ends on a whole byte; how far that is."""
    stop = done if done == out.size else done >> 3 << 3
    byte = (packed - first) * width >> 3
    pack_from(on(place_of(out, 0), packed), stop - packed, width, on(place_of(space, 0), byte))
    return stop


@kernel(
    *_pairs("void(W[::1], int64, W[::1], V[::1], int64, int64, int64, boolean, V[::1], uint8[::1])")
)
def finish_product(
    z: Words,
    start: int,
    rest: Words,
    lam: Words,
    ring: int,
    truncate: int,
    width: int,
    leader: bool,
    out: Words,
    space: Bytes,
) -> None:
    """out[start:] ← truncated share of z + rest[start:] (mod 2^ring) + mask share (mod 2^width).

    alice takes ⌊z_A / 2^t⌋ and bob −⌊−z_B / 2^t⌋. In Z_2^(ring − t) their sum is ⌊z / 2^t⌋, plus
    one with probability (z mod 2^t) / 2^t: unbiased, error < 1 ulp, exact multiples stay exact, and
    no wrap can be lost, since multiples of 2^ring become multiples of 2^(ring − t).
    Elements are packed by eights: those before `start` too that were left, and the last ones only
    with the end of `out`.
    """
    T, V = z.dtype.type, out.dtype.type
    ring_mask = T(_ALL >> np.uint64(64 - ring))
    mask = V(_ALL >> np.uint64(64 - width))
    t = T(truncate)
    # x ^ −1 − (−1) is −x: bob's signs turn, alice's stay
    flip, back = (T(0), V(0)) if leader else (T(_ALL), V(_ALL))
    first = packed = start >> 3 << 3
    for begin in range(0, z.size, _BLOCK):
        size, at = min(_BLOCK, z.size - begin), start + begin
        here, other = place_of(z, begin), place_of(rest, at)
        fresh, to = place_of(lam, at), place_of(out, at)
        for k in range(size):
            share = T(T(T(here[k] + other[k]) ^ flip) - flip)
            quotient = V(T(T(share & ring_mask) >> t))
            to[k] = V(V(fresh[k] + V(V(quotient ^ back) - back)) & mask)
        packed = _pack_done(out, packed, at + size, first, width, space)


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


@kernel(*_FACTS)
def select_facts(a: Words, b: Words, width: int, own: Words, above: Words) -> None:
    """What carol deals of λ = λ_A + λ_B (mod 2^width) to be selected by a bit.

    own: β, as numbers, to which β·λ is added; above, unless it is empty: carry, λ_msb and β·λ_msb
    (see `mask_facts`). Shapes: own [2·N], above [3·N] or [0].
    """
    T, V, size = a.dtype.type, own.dtype.type, a.size
    mask = T(_ALL >> np.uint64(64 - width))
    high = T(width - 1)
    for k in range(size):
        own[size + k] = V(own[k] * V(T(T(a[k] + b[k]) & mask)))
    if above.size:
        for k in range(size):
            x = T(a[k] & mask)
            s = T(T(x + b[k]) & mask)
            above[k] = V(s < x)
            above[size + k] = V(T(s >> high))
            above[2 * size + k] = V(own[k] * V(T(s >> high)))


@kernel(*_signatures("void(W[::1], W[::1], boolean, int64, W[::1])"))
def add_words(a: Words, b: Words, minus: bool, width: int, out: Words) -> None:
    """out ← a + b, or a − b, mod 2^width."""
    T = a.dtype.type
    mask, flip = T(_ALL >> np.uint64(64 - width)), T(_ALL) if minus else T(0)
    for k in range(a.size):
        out[k] = T(T(a[k] + T(T(b[k] ^ flip) - flip)) & mask)


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
        is_set = T(T(0) - T(d >> top))
        chosen = T(low[k] ^ T(T(low[k] ^ high[k]) & is_set))
        public = T(keep * T(d - o))
        out[k] = T(T(T(public - chosen) + lam[k]) & out_mask)


_TOPS = tuple(
    (w, v, h)
    for w in ("uint32", "uint64")
    for v, h in (("uint32", "uint16"), ("uint32", "uint32"), ("uint64", "uint64"))
)


def _triples(template: str) -> tuple[str, ...]:
    """For words of x (W), of the result (V), and of what is dealt above x's width (H)."""
    return tuple(template.replace("W", w).replace("V", v).replace("H", h) for w, v, h in _TOPS)


def tops_type(width: int, out_width: int) -> type[np.unsignedinteger[Any]]:
    """The words of λ_msb and β·λ_msb: halves where those do, as a selection waits for memory."""
    return np.uint16 if out_width - width <= 16 and out_width <= 32 else word_type(out_width)


@kernel(*_triples(f"void(W[::1], int64, int64, {', '.join(['V[::1]'] * 7)}, H[::1], H[::1])"))
def ready_pair(
    half: Words, width: int, out_width: int, carry: Words, top: Words, beta_top: Words,
    cross: Words, lam: Words, zero: Words, one: Words, top_zero: Words, top_one: Words,
) -> None:  # fmt: skip
    """What `select_share` adds where δ' is clear and where it is set: all but Δ and β tell of it.

    half, cross: shares of λ and β·λ; carry, top and beta_top, of the carry, λ_msb and β·λ_msb,
    count only if out_width > width; lam: the output's mask share. As integers Λ_1 is λ, and so
    half − carry·2^width a share of it.
    """
    T, V, H = half.dtype.type, zero.dtype.type, top_zero.dtype.type
    mask = T(_ALL >> np.uint64(64 - min(width, out_width)))
    shift, wide = (V(width), V(_ALL)) if out_width > width else (V(0), V(0))
    for k in range(half.size):
        high = V(V(T(half[k] & mask)) - V(V(carry[k] & wide) << shift))
        c, m, t = cross[k], lam[k], beta_top[k]
        zero[k], one[k] = V(m - c), V(V(m - high) + c)
        top_zero[k], top_one[k] = H(t), H(V(top[k] - t))


@part
def _select(
    delta: Place, taken: Place, zero: Place, one: Place, beta: Place, top_zero: Place,
    top_one: Place, size: int, width: int, offset: np.uint64, leader: bool, out_width: int,
    old: Place, out: Place, D: Any, V: Any,
) -> None:  # fmt: skip
    """out[:size] ← old + share of b·x; see `select_share`. `taken`: all ones where δ' is set."""
    mask, last, o = D(_ALL >> np.uint64(64 - width)), D(width - 1), D(offset)
    shift, wide = (V(width), V(_ALL)) if out_width > width else (V(0), V(0))
    out_mask, unit = V(_ALL >> np.uint64(64 - out_width)), V(1)
    keep = V(_ALL) if leader else V(0)
    for k in range(size):
        d = D(D(delta[k] + o) & mask)
        low = V(V(V(D(d >> last)) - unit) & wide)  # all ones where Δ'_msb = 0
        p, s = V(V(d) - V(o)), taken[k]
        t = V(V(beta[k] * p) ^ s)  # −βP − 1 where s is set, else βP
        known = V(zero[k] ^ V(V(zero[k] ^ one[k]) & s))
        top = V(V(top_zero[k]) ^ V(V(V(top_zero[k]) ^ V(top_one[k])) & s))
        share = V(V(V(t - s) + V(p & V(keep & s))) + V(V(top & low) << shift))
        out[k] = V(V(old[k] + V(known + share)) & out_mask)


_SELECT = (
    "void(W[::1], uint64[::1], V[::1], V[::1], V[::1], H[::1], H[::1], int64, int64,"
    " int64, uint64, boolean, boolean, int64, boolean, V[::1], V[::1], uint8[::1])"
)


@kernel(*_triples(_SELECT))
def select_share(
    delta: Words,
    bit: Words,
    zero: Words,
    one: Words,
    beta: Words,
    top_zero: Words,
    top_one: Words,
    start: int,
    stop: int,
    width: int,
    offset: np.uint64,
    when: bool,
    more: bool,
    out_width: int,
    leader: bool,
    room: Words,
    out: Words,
    space: Bytes,
) -> None:
    """out[start:stop] ← share of b·x (mod 2^out_width), for b = [secret bit = `when`].

    The bit is open as δ = bit ⊕ β, so b = δ' + (1 − 2δ')·β with δ' = δ for when = 1, else ¬δ. With
    x = P − Λ_h as in `extend_share`:  b·x = δ'·(P − Λ_h) + (1 − 2δ')·(β·P − βΛ_h), where
    Λ_1 = λ − carry·2^width and Λ_0 = Λ_1 − λ_msb·2^width. What needs neither P nor h is `zero`
    where δ' is clear and `one` where it is set; what needs h is top_zero or top_one, which count
    only if out_width > width. Of several pairs all but the first are added (`more`). Packed if
    `space` is given.

    Shapes: bit [ceil(N / 64)], room [SELECT_ROOM], all others [N]; start is a multiple of 64. beta:
    a share of β.
    """
    flip = _ALL if not when else np.uint64(0)
    packed = start
    taken, held = place_of(room, 0), place_of(room, _BLOCK)
    for k in range(_BLOCK):
        held[k] = out.dtype.type(0)
    for at in range(start, stop, _BLOCK):
        size, to = min(_BLOCK, stop - at), place_of(out, at)
        if more:  # LLVM makes no lanes of a loop that writes where it reads
            for k in range(size):
                held[k] = to[k]
        for w in range((size + 63) >> 6):
            spread(bit[(at >> 6) + w] ^ flip, on(taken, w << 6))
        _select(place_of(delta, at), taken, place_of(zero, at), place_of(one, at),
                place_of(beta, at), place_of(top_zero, at), place_of(top_one, at),
                size, width, offset, leader, out_width, held, to,
                delta.dtype.type, out.dtype.type)  # fmt: skip
        if space.size:
            packed = _pack_done(out, packed, at + size, start, out_width, space)


@part
def _bits_from(plane: Words, start: int) -> Any:
    """The 64 bits from `start` on, 0 behind the last word."""
    word, shift = start >> 6, np.uint64(start & 63)
    after = plane[word + 1] if word + 1 < plane.size else np.uint64(0)
    return plane[word] >> shift | after << np.uint64(1) << (np.uint64(63) - shift)


@part
def _tally(
    taken: Words, dealt: Place, value: Any, keep: Any, size: int, out: Place, T: Any
) -> None:
    """out[:size] += value · share of b; `taken`: all ones where δ is set."""
    for e in range(size):
        s = taken[e]
        out[e] = T(out[e] + T(value * T(T(s & keep) + T(T(dealt[e] ^ s) - s))))


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
    taken = np.empty(_BLOCK, out.dtype)
    for begin in range(0, out.size, _BLOCK):
        size = min(_BLOCK, out.size - begin)
        for k in range(values.size):
            at = k * dealt.shape[1] + start + begin
            for e in range(0, size, 64):
                spread(_bits_from(bit, at + e), place_of(taken, e))
            _tally(taken, place_of(dealt, at), values[k], keep, size, place_of(out, begin), T)
        here = place_of(out, begin)
        for e in range(size):
            here[e] = T(here[e] & mask)
