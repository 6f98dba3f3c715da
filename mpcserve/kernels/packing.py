"""Values of any width, back to back: how they travel.

All but the last go through the lanes of vectors; what is left is read as the eight bytes that it
begins in, shifted. Bytes of machines with another byte order are not served.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core.cgutils import get_or_insert_function
from numpy.typing import NDArray

from mpcserve.kernels.jit import kernel, shared
from mpcserve.kernels.lanes import REACH, pack_lanes, unpack_lanes
from mpcserve.kernels.places import (
    Place,
    inline,
    load_word,
    part,
    place_of,
    pointer,
    store_word,
)
from mpcserve.ring import HALF_BITS, WORD_BITS, Words, word_type

Bytes = NDArray[np.uint8]
Buffer = bytes | bytearray | memoryview

SPARE = REACH // 2
"""Bytes behind a packed array that `pack_from` may write zeros to."""

_U0 = np.uint64(0)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_SHIFTED = 57
"""Width up to which a value, shifted by 7 bits, fits a word."""


def _pack_from(x: Place, count: int, width: int, out: Place) -> None:
    """x[:count], each below 2^width, to the bytes from `out` on.

    The last byte is filled up with zeros, and up to SPARE bytes behind it.
    """
    done = pack_lanes(x, count, width, out)
    at, fill, held = done * width >> 3, 0, _U0
    for k in range(done, count):
        v, shift = np.uint64(x[k]), np.uint64(fill)
        held |= v << shift
        store_word(out, at, held)
        fill += width
        if fill < 64:
            held >>= np.uint64(fill & 56)
        else:  # the bits that did not fit the word
            held = v >> np.uint64(1) >> (np.uint64(63) - shift)
        at += fill >> 3
        fill &= 7
    store_word(out, at, held)


def _symbol(word: types.Type) -> str:
    return f"mpcserve_pack_{word}"


def _packer(word: types.Type) -> Any:
    kind = types.void(pointer(word), types.int64, types.int64, pointer(types.uint8))
    return shared(_symbol(word), kind)(_pack_from)


_PACKERS = _packer(types.uint32), _packer(types.uint64)


@inline
def pack_from(typingctx, x, count, width, out):  # type: ignore[no-untyped-def]
    """Call `_pack_from`, of which all kernels share one: its loops are many."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(ir.VoidType(), [a.type for a in args])
        packer = get_or_insert_function(  # type: ignore[no-untyped-call]
            builder.module, kind, _symbol(x.dtype)
        )
        builder.call(packer, args)
        return context.get_dummy_value()

    return types.void(x, types.int64, types.int64, out), codegen


@part
def _value_at(data: Place, bit: int, width: int) -> Any:
    """The 64 bits from `bit` on; only the low `width` of them count. Reads up to 9 bytes."""
    shift = np.uint64(bit & 7)
    v = load_word(data, bit >> 3) >> shift
    if width > _SHIFTED:
        v |= np.uint64(data[(bit >> 3) + 8]) << np.uint64(1) << (np.uint64(63) - shift)
    return v


@part
def _last_value(data: Place, size: int, bit: int, width: int) -> Any:
    """The same, byte by byte: none behind the last of `size` is read."""
    v = _U0
    for k in range(bit >> 3, min(size, (bit + width + 7) >> 3)):
        at = 8 * k - bit
        byte = np.uint64(data[k])
        v |= byte << np.uint64(at) if at >= 0 else byte >> np.uint64(-at)
    return v


@kernel(
    "void(Array(uint8, 1, 'C', readonly=True), int64, boolean, uint64[::1])",
    "void(Array(uint8, 1, 'C', readonly=True), int64, boolean, uint32[::1])",
)
def _unpack(packed: Bytes, width: int, more: bool, out: Words) -> None:
    """out ← the packed values, plus what it held if there is `more` (mod 2^width)."""
    T = out.dtype.type
    mask = T(_ALL >> np.uint64(64 - width))
    keep = T(_ALL) if more else T(0)
    data, size, to = place_of(packed, 0), packed.size, place_of(out, 0)
    done = unpack_lanes(data, max(0, size - REACH + 1), width, more, to, out.size)
    safe = max(done, min(out.size, (size - 9) * 8 // width))
    for k in range(done, safe):
        to[k] = T(T(T(to[k] & keep) + T(_value_at(data, k * width, width))) & mask)
    for k in range(safe, out.size):
        to[k] = T(T(T(to[k] & keep) + T(_last_value(data, size, k * width, width))) & mask)


@kernel("void(uint64[::1], int64, uint8[::1])", "void(uint32[::1], int64, uint8[::1])")
def _pack(x: Words, width: int, out: Bytes) -> None:
    pack_from(place_of(x, 0), x.size, width, place_of(out, 0))


def packed_space(count: int, width: int) -> Bytes:
    """Where `count` values can be packed; what is sent of it says `packed_bytes`."""
    return np.empty((count * width + 7) // 8 + SPARE, np.uint8)


def packed_bytes(space: Bytes) -> memoryview:
    """The values packed in a `packed_space`."""
    return memoryview(space.data)[: space.size - SPARE]


def pack(x: Words, width: int) -> memoryview:
    """x (each < 2^width) back to back, little-endian, in ceil(N · width / 8) bytes.

    Always fresh memory: what is on its way to a peer must not change when x does.
    """
    flat = np.ascontiguousarray(x).reshape(-1)
    assert flat.dtype == word_type(width)
    if width in (HALF_BITS, WORD_BITS):
        return memoryview(flat.copy().view(np.uint8).data)
    if not flat.flags.writeable:
        flat = flat.copy()
    space = packed_space(flat.size, width)
    _pack(flat, width, space)
    return packed_bytes(space)


@kernel(
    "void(uint64[::1], uint64[::1], int64, uint8[::1])",
    "void(uint32[::1], uint32[::1], int64, uint8[::1])",
)
def _pack_difference(x: Words, y: Words, width: int, out: Bytes) -> None:
    """`y`, which nobody reads afterwards, holds the difference then."""
    T = x.dtype.type
    mask = T(_ALL >> np.uint64(64 - width))
    for k in range(x.size):
        y[k] = T(T(x[k] - y[k]) & mask)
    pack_from(place_of(y, 0), y.size, width, place_of(out, 0))


def pack_difference(x: Words, y: Words, width: int) -> memoryview:
    """pack(x − y mod 2^width, width), in one pass. Overwrites y. Shapes: x, y [N]."""
    if width in (HALF_BITS, WORD_BITS):
        return memoryview(np.subtract(x, y, out=y).view(np.uint8).data)
    space = packed_space(x.size, width)
    _pack_difference(x, y, width, space)
    return packed_bytes(space)


def unpack(data: Buffer, count: int, width: int) -> Words:
    """Inverse of `pack`; may alias `data` where that is writable. Shapes: [count]."""
    raw, word = _raw(data, count, width), word_type(width)
    if width in (HALF_BITS, WORD_BITS):
        words: Words = raw.view(word)
        flags = words.flags
        return words if flags.aligned and flags.writeable else words.copy()
    out = np.empty(count, word)
    _unpack(raw, width, False, out)
    return out


def joined(mine: Words, data: Buffer, width: int) -> Words:
    """mine + the values packed in `data` (mod 2^width): two masked shares join into Δ.

    Overwrites `mine`, or `data` where it holds whole words and is writable; returns which it was.
    """
    raw = _raw(data, mine.size, width)
    if width not in (HALF_BITS, WORD_BITS):
        _unpack(raw, width, True, mine)
        return mine
    theirs = raw.view(mine.dtype)
    fits = raw.flags.writeable and theirs.flags.aligned
    return np.asarray(np.add(mine, theirs, out=theirs if fits else None))


def sum_of(mine: Buffer, other: Buffer, count: int, width: int) -> Words:
    """The sums (mod 2^width) of two packings of `count` values each. Shapes: [count]."""
    if width in (HALF_BITS, WORD_BITS):
        word = word_type(width)
        return np.asarray(np.add(*(_raw(d, count, width).view(word) for d in (mine, other))))
    return joined(unpack(mine, count, width), other, width)


def _raw(data: Buffer, count: int, width: int) -> Bytes:
    raw = np.frombuffer(data, np.uint8)
    assert raw.size == (count * width + 7) // 8
    return raw
