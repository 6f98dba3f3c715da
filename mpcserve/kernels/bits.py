"""Bit work, 64 elements to a word: slicing into planes, chunk comparison.

A plane holds one bit of every element: bit e of word e // 64. Loops run over blocks of words that
stay in the first-level cache; LLVM vectorises the innermost loop.
"""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray

from mpcserve.kernels.jit import kernel
from mpcserve.ring import Words

_U0 = np.uint64(0)
_U1 = np.uint64(1)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_BLOCK = 32
"""Words a block: tables of 2^5 rows × 32 words × 8 bytes = 8 KiB, two of them fit L1."""


@kernel(
    "void(uint64[::1], int64, int64, uint64[:, ::1])",
    "void(uint32[::1], int64, int64, uint64[:, ::1])",
)
def slice_bits(x: Words, low: int, count: int, planes: Words) -> None:
    """planes[i] = bit low + i of every x. Shapes: x [N], planes [count, ceil(N / 64)].

    A 64 × 64 bit-matrix transpose by halving (Hacker's Delight, section 7-3).
    """
    n = x.size
    block = np.empty(64, np.uint64)
    for w in range(planes.shape[1]):
        start = w * 64
        stop = min(64, n - start)
        for k in range(stop):
            block[k] = np.uint64(x[start + k]) >> np.uint64(low)
        for k in range(stop, 64):
            block[k] = _U0
        width = 32
        mask = np.uint64(0x00000000FFFFFFFF)
        while width:
            shift = np.uint64(width)
            for k in range(0, 64, 2 * width):
                for j in range(k, k + width):
                    swap = ((block[j] >> shift) ^ block[j + width]) & mask
                    block[j] ^= swap << shift
                    block[j + width] ^= swap
            width >>= 1
            mask ^= mask << np.uint64(width)
        for i in range(count):
            planes[i, w] = block[i]


@kernel("void(uint64[::1], uint64[::1])", "void(uint64[::1], uint32[::1])")
def unslice_bit(plane: Words, out: Words) -> None:
    """out[e] = bit e of the plane, as a word. Shapes: plane [ceil(N / 64)], out [N]."""
    for e in range(out.size):
        out[e] = (plane[e >> 6] >> np.uint64(e & 63)) & _U1


def plane_of(flags: NDArray[np.uint8]) -> Words:
    """Zeros and ones of any shape → a plane. Shapes: [ceil(N / 64)]."""
    out = np.zeros((flags.size + 63) // 64, np.uint64)
    packed = np.packbits(flags.reshape(-1), bitorder="little")
    out.view(np.uint8)[: packed.size] = packed
    return out


def flags_of(plane: Words, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Inverse of `plane_of`."""
    count = prod(shape)
    flags = np.unpackbits(plane.view(np.uint8), count=count, bitorder="little")
    return flags.reshape(shape)


def part_of(plane: Words, start: int, count: int) -> Words:
    """The plane of `count` elements from `start` on: no bit of any other is left in it."""
    word, shift = divmod(start, 64)
    size = (count + 63) // 64
    around = np.zeros(size + 1, np.uint64)
    held = plane[word : word + size + 1]
    around[: held.size] = held
    out: Words = around[:size] >> np.uint64(shift)
    if shift:
        out |= around[1:] << np.uint64(64 - shift)
    if count % 64:
        out[-1] &= (_U1 << np.uint64(count % 64)) - _U1
    return out


def pack_planes(planes: Words, size: int) -> memoryview:
    """Bit planes on the wire: ceil(size / 8) bytes each. Shapes: planes [P, ceil(size / 64)]."""
    raw = np.ascontiguousarray(planes).view(np.uint8).reshape(planes.shape[0], -1)
    return memoryview(raw[:, : (size + 7) // 8].copy().reshape(-1).data)


def unpack_planes(data: bytes | bytearray | memoryview, count: int, size: int) -> Words:
    """Inverse of `pack_planes`. Shapes: [count, ceil(size / 64)]."""
    plane = (size + 7) // 8
    words = (size + 63) // 64
    raw = np.frombuffer(data, np.uint8).reshape(count, plane)
    if plane == words * 8 and raw.ctypes.data % 8 == 0 and raw.flags.writeable:
        return raw.view(np.uint64)
    padded = np.zeros((count, words * 8), np.uint8)
    padded[:, :plane] = raw
    return padded.view(np.uint64)


@kernel("void(uint64[:, ::1], uint64[:, ::1])")
def monomials(bits: Words, out: Words) -> None:
    """out[S − 1] = product of bits[i] over i in S, for every non-empty subset S (a bitmask).

    Shapes: bits [c, W], out [2^c − 1, W].
    """
    for start in range(0, bits.shape[1], _BLOCK):
        stop = min(start + _BLOCK, bits.shape[1])
        for i in range(bits.shape[0]):
            first = 1 << i
            for w in range(start, stop):
                out[first - 1, w] = bits[i, w]
            for s in range(1, first):
                for w in range(start, stop):
                    out[first + s - 1, w] = out[s - 1, w] & bits[i, w]


@kernel("void(uint64[:, :], uint64[:, ::1], boolean, uint64[::1], uint64[::1])")
def compare_chunk(delta: Words, mono: Words, leader: bool, lt: Words, eq: Words) -> None:
    """Shares of [Δ < λ] and [Δ = λ] for one chunk of c bits, from shares of λ's monomials.

    Both are multilinear in λ's bits with coefficients that are functions of Δ's. Bits are folded
    in from the low end; after bit k the tables hold, for every subset S of the higher bits,
        eq[S] = [Δ = λ on bits ≤ k] · λ_S,   lt[S] = [Δ < λ on bits ≤ k] · λ_S
    by eq'[S] = ¬Δ_k·eq[S] ⊕ eq[S∪k],   lt'[S] = ¬Δ_k·(λ_{S∪k} ⊕ lt[S]) ⊕ lt[S∪k].
    Shapes: delta [c, W], mono [2^c − 1, W], lt, eq [W]. The leader (alice) adds the constant 1.
    """
    c = delta.shape[0]
    one = _ALL if leader else _U0
    eqs = np.empty((1 << (c - 1), _BLOCK), np.uint64)
    lts = np.empty((1 << (c - 1), _BLOCK), np.uint64)
    for start in range(0, delta.shape[1], _BLOCK):
        size = min(_BLOCK, delta.shape[1] - start)
        for s in range(1 << (c - 1)):
            for w in range(size):
                no = ~delta[0, start + w]
                high = mono[2 * s, start + w]
                low = mono[2 * s - 1, start + w] if s else one
                eqs[s, w] = (no & low) ^ high
                lts[s, w] = no & high
        for k in range(1, c):
            for s in range(1 << (c - 1 - k)):
                with_k = (s << (k + 1)) + (1 << k) - 1
                for w in range(size):
                    no = ~delta[k, start + w]
                    low = eqs[2 * s, w]
                    eqs[s, w] = (no & low) ^ eqs[2 * s + 1, w]
                    below = mono[with_k, start + w] ^ lts[2 * s, w]
                    lts[s, w] = (no & below) ^ lts[2 * s + 1, w]
        for w in range(size):
            lt[start + w] = lts[0, w]
            eq[start + w] = eqs[0, w]


@kernel("void(uint64[:, ::1], int64, int64, int64, int64, uint64[:, ::1])")
def _fold(opened: Words, first: int, count: int, start: int, size: int, work: Words) -> None:
    """work[0] ← Π_i (opened[first + i] ⊕ b_i), from work[S] = b_S for all subsets S of masks."""
    for i in range(count):
        for s in range(1 << (count - 1 - i)):
            for w in range(size):
                low = opened[first + i, start + w] & work[2 * s, w]
                work[s, w] = low ^ work[2 * s + 1, w]


@kernel("void(uint64[:, ::1], uint64[:, ::1], int64, boolean, uint64[::1], uint64[::1])")
def merge_chunks(
    opened: Words, table: Words, count: int, with_eq: bool, lt: Words, eq: Words
) -> None:
    """lt ⊕= the borrow of the chunks below the top one; eq = all chunks equal (if `with_eq`).

    With l_j, e_j the chunks' outcomes, low to high:
        lt = l_top ⊕ e_top·(l_{J−2} ⊕ e_{J−2}·( … e_1·l_0)),   eq = e_top · … · e_0
    Every l_j and e_j was opened under a mask, l_j = L_j ⊕ a_j, e_j = E_j ⊕ b_j, so both are
    multilinear in the masks with public coefficients. `lt` holds the top chunk's share on entry.

    Shapes: opened [P, W]: L_0 … L_{J−2}, then E of the chunks that have one, low to high.
    table [R, W]: shares of b_S for S = 0 … 2^nb − 1 (row 0: the constant 1), then for each j of
    a_j·b_S for the subsets S of the chunks above j.
    """
    first = 0 if with_eq else 1
    n_eq = count - first
    size_b = 1 << n_eq
    work = np.empty((size_b, _BLOCK), np.uint64)
    for start in range(0, lt.size, _BLOCK):
        size = min(_BLOCK, lt.size - start)
        row = size_b
        for j in range(count - 1):
            above = count - 1 - j
            step = j + 1 - first
            for s in range(1 << above):
                if j == 0:
                    for w in range(size):
                        work[s, w] = _U0
                for w in range(size):
                    work[s, w] ^= (opened[j, start + w] & table[s << step, start + w]) ^ table[
                        row + s, start + w
                    ]
            row += 1 << above
            e = count - 1 + j + 1 - first
            for s in range(1 << (above - 1)):
                for w in range(size):
                    work[s, w] = (opened[e, start + w] & work[2 * s, w]) ^ work[2 * s + 1, w]
        for w in range(size):
            lt[start + w] ^= work[0, w]
        if with_eq:
            for s in range(size_b):
                for w in range(size):
                    work[s, w] = table[s, start + w]
            _fold(opened, count - 1, count, start, size, work)
            for w in range(size):
                eq[start + w] = work[0, w]


@kernel("void(uint64[:, ::1], uint64[:, ::1], uint64[::1])")
def join_bits(opened: Words, table: Words, out: Words) -> None:
    """out = share of Π_i (opened[i] ⊕ b_i) from shares of the masks' monomials.

    Shapes: opened [c, W]; table [2^c, W]: b_S, row 0 the constant 1 (0 on bob); out [W].
    """
    count = opened.shape[0]
    work = np.empty((1 << count, _BLOCK), np.uint64)
    for start in range(0, out.size, _BLOCK):
        size = min(_BLOCK, out.size - start)
        for s in range(1 << count):
            for w in range(size):
                work[s, w] = table[s, start + w]
        _fold(opened, 0, count, start, size, work)
        for w in range(size):
            out[start + w] = work[0, w]
