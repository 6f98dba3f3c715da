"""Bit work, 64 elements to a word: slicing into planes, planes and blocks on the wire, products.

A plane holds one bit of every element: bit e of word e // 64. Loops run over blocks of words that
stay in the first-level cache; LLVM vectorises the innermost loop. Many planes that are read
together lie in blocks: all rows of the first BLOCK words, then all rows of the next.
"""

from __future__ import annotations

from math import prod

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numpy.typing import NDArray

from mpcserve.kernels.jit import kernel
from mpcserve.kernels.places import Place, inline, on, part, place_of, spread
from mpcserve.ring import Words

_U0 = np.uint64(0)
_U1 = np.uint64(1)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
BLOCK = 32
"""Words a block: tables of 2^5 rows × 32 words × 8 bytes = 8 KiB, two of them fit L1."""

Bytes = NDArray[np.uint8]

_HALF0 = np.uint32(0)
_WORD = 64
"""Elements whose bits fill a word."""


@inline
def _slice_byte(typingctx, x, kind, low, out, step):  # type: ignore[no-untyped-def]
    """Word out[i·step], i < 8, is bit low + i of the 64 words, of a kind, that lie from x on."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        source, _, shift, to, step = args
        size = ir.IntType(kind.bitwidth)
        many, bytes_ = ir.VectorType(size, _WORD), ir.VectorType(ir.IntType(8), _WORD)
        words = builder.load(builder.bitcast(source, many.as_pointer()), align=size.width // 8)
        amount = builder.trunc(shift, size) if size.width < _WORD else shift
        first = builder.insert_element(ir.Constant(many, ir.Undefined), amount, _LANE0)
        every = ir.Constant(ir.VectorType(ir.IntType(32), _WORD), [0] * _WORD)
        amounts = builder.shuffle_vector(first, ir.Constant(many, ir.Undefined), every)
        rest = builder.trunc(builder.lshr(words, amounts), bytes_)
        for bit in reversed(range(8)):  # the sign of a byte is its highest bit
            signs = builder.icmp_signed("<", rest, ir.Constant(bytes_, [0] * _WORD))
            place = builder.gep(to, [builder.mul(step, ir.Constant(ir.IntType(64), bit))])
            builder.store(builder.bitcast(signs, ir.IntType(64)), place)
            rest = builder.add(rest, rest)
        return context.get_dummy_value()

    return types.void(x, kind, types.int64, out, types.int64), codegen


_LANE0 = ir.Constant(ir.IntType(32), 0)


@part
def slice_word(
    x: Bytes, size: int, start: int, low: int, octets: int, out: Place, step: int
) -> None:
    """Word out[i·step] is bit low + i of the 64 elements from `start` on, 0 behind the last.

    x: words of `size` bytes, of either kind, so that callers are compiled once.
    """
    count = x.size // size - start
    source = place_of(x, start * size)
    if count < _WORD:
        for i in range(8 * octets):
            byte, bit, plane = (low + i) >> 3, np.uint64((low + i) & 7), _U0
            for k in range(count if byte < size else 0):
                plane |= (np.uint64(source[k * size + byte]) >> bit & _U1) << np.uint64(k)
            out[i * step] = plane
    elif size == 8:
        for octet in range(octets):
            _slice_byte(source, _U0, low + 8 * octet, on(out, 8 * octet * step), step)
    else:
        for octet in range(octets):
            _slice_byte(source, _HALF0, low + 8 * octet, on(out, 8 * octet * step), step)


@kernel("void(uint8[::1], int64, int64, int64, uint64[:, ::1])")
def _slice_bits(x: Bytes, size: int, low: int, count: int, planes: Words) -> None:
    octets = (count + 7) >> 3
    block = np.empty(_WORD, np.uint64)
    for w in range(planes.shape[1]):
        slice_word(x, size, w * _WORD, low, octets, place_of(block, 0), 1)
        for i in range(count):
            planes[i, w] = block[i]


def slice_bits(x: Words, low: int, count: int, planes: Words) -> None:
    """planes[i] = bit low + i of every x. Shapes: x [N], planes [count, ceil(N / 64)]."""
    _slice_bits(bytes_of(x), x.itemsize, low, count, planes)


def bytes_of(x: Words) -> Bytes:
    """The memory of contiguous words."""
    return x.view(np.uint8) if x.flags.writeable else x.copy().view(np.uint8)


@kernel("void(uint64[::1], uint64[::1])", "void(uint64[::1], uint32[::1])")
def unslice_bit(plane: Words, out: Words) -> None:
    """out[e] = bit e of the plane, as a word. Shapes: plane [ceil(N / 64)], out [N]."""
    T = out.dtype.type
    whole = out.size >> 6
    for w in range(whole):
        spread(plane[w], place_of(out, w << 6))
    for e in range(whole << 6):
        out[e] = T(out[e] & T(1))
    for e in range(whole << 6, out.size):
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


def _as_words(raw: Bytes) -> Words | None:
    """The same memory, if words may be read and written there."""
    words = raw.view(np.uint64)
    return words if words.flags.aligned and words.flags.writeable else None


def unpack_planes(data: bytes | bytearray | memoryview, count: int, size: int) -> Words:
    """Inverse of `pack_planes`. Shapes: [count, ceil(size / 64)]."""
    plane = (size + 7) // 8
    words = (size + 63) // 64
    raw = np.frombuffer(data, np.uint8).reshape(count, plane)
    if plane == words * 8 and (rows := _as_words(raw)) is not None:
        return rows
    padded = np.zeros((count, words * 8), np.uint8)
    padded[:, :plane] = raw
    return padded.view(np.uint64)


def blocked(planes: Words) -> Words:
    """Rows one after another, block by block. Shapes: [R, W] → [R·W]."""
    blocks = range(0, planes.shape[1], BLOCK)
    return np.concatenate([planes[:, w : w + BLOCK].reshape(-1) for w in blocks])


def pack_blocks(rows: Words, size: int) -> memoryview:
    """Rows in blocks on the wire, ceil(size / 8) bytes each; may be the memory of `rows`."""
    raw = rows.view(np.uint8)
    if size % _WORD == 0:
        return memoryview(raw.data)
    words = (size + _WORD - 1) // _WORD
    count, last = rows.size // words, (words - 1) % BLOCK + 1
    whole = count * (words - last) * 8
    left = (size + 7) // 8 - (words - last) * 8
    cut = raw[whole:].reshape(count, last * 8)[:, :left]
    return memoryview(np.concatenate([raw[:whole], cut.reshape(-1)]).data)


def unpack_blocks(data: bytes | bytearray | memoryview, count: int, size: int) -> Words:
    """Inverse of `pack_blocks`; may alias `data` where that is writable. Shapes: [count · W]."""
    raw = np.frombuffer(data, np.uint8)
    assert raw.size == count * ((size + 7) // 8)
    if size % _WORD == 0 and (rows := _as_words(raw)) is not None:
        return rows
    words = (size + _WORD - 1) // _WORD
    last = (words - 1) % BLOCK + 1
    whole = count * (words - last) * 8
    left = (size + 7) // 8 - (words - last) * 8
    out = np.zeros(count * words * 8, np.uint8)
    out[:whole] = raw[:whole]
    out[whole:].reshape(count, last * 8)[:, :left] = raw[whole:].reshape(count, left)
    return out.view(np.uint64)


@kernel("void(uint64[:, ::1], uint64[:, ::1])")
def monomials(bits: Words, out: Words) -> None:
    """out[S − 1] = product of bits[i] over i in S, for every non-empty subset S (a bitmask).

    Shapes: bits [c, W], out [2^c − 1, W].
    """
    for start in range(0, bits.shape[1], BLOCK):
        stop = min(start + BLOCK, bits.shape[1])
        for i in range(bits.shape[0]):
            first = 1 << i
            for w in range(start, stop):
                out[first - 1, w] = bits[i, w]
            for s in range(1, first):
                for w in range(start, stop):
                    out[first + s - 1, w] = out[s - 1, w] & bits[i, w]


@kernel("void(uint64[:, ::1], int64, int64, int64, int64, uint64[:, ::1])")
def _fold(opened: Words, first: int, count: int, start: int, size: int, work: Words) -> None:
    """work[0] ← Π_i (opened[first + i] ⊕ b_i), from work[S] = b_S for all subsets S of masks."""
    for i in range(count):
        for s in range(1 << (count - 1 - i)):
            for w in range(size):
                low = opened[first + i, start + w] & work[2 * s, w]
                work[s, w] = low ^ work[2 * s + 1, w]


@kernel("void(uint64[:, ::1], uint64[:, ::1], uint64[::1])")
def join_bits(opened: Words, table: Words, out: Words) -> None:
    """out = share of Π_i (opened[i] ⊕ b_i) from shares of the masks' monomials.

    Shapes: opened [c, W]; table [2^c, W]: b_S, row 0 the constant 1 (0 on bob); out [W].
    """
    count = opened.shape[0]
    work = np.empty((1 << count, BLOCK), np.uint64)
    for start in range(0, out.size, BLOCK):
        size = min(BLOCK, out.size - start)
        for s in range(1 << count):
            for w in range(size):
                work[s, w] = table[s, start + w]
        _fold(opened, 0, count, start, size, work)
        for w in range(size):
            out[start + w] = work[0, w]
