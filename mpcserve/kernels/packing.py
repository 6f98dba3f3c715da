"""Values of any width, back to back: how they travel.

A value is read and written as the eight bytes that it begins in, shifted; no value waits for the
one before it. Bytes of machines with another byte order are not served.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpcserve.kernels.jit import kernel
from mpcserve.kernels.places import Place, load_word, part, place_of, store_word
from mpcserve.ring import HALF_BITS, WORD_BITS, Words, word_type

Bytes = NDArray[np.uint8]
Buffer = bytes | bytearray | memoryview

SPARE = 8
"""Bytes behind a packed array that `pack_from` may write zeros to."""

_U0 = np.uint64(0)
_U7 = np.uint64(7)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_PAIRS, _SHIFTED = 28, 57
"""Widths up to which two values, and up to which one, shifted by 7 bits, fit a word."""


@part
def pack_from(x: Place, count: int, width: int, out: Place) -> None:
    """x[:count], each below 2^width, to the bytes from `out` on.

    The last byte is filled up with zeros, and up to SPARE bytes behind it.
    """
    w = np.uint64(width)
    before = _U0
    bit = 0
    if width == 64:
        for k in range(count):
            store_word(out, 8 * k, np.uint64(x[k]))
    elif width == 32:
        for k in range(0, count - 1, 2):
            both = np.uint64(x[k]) | np.uint64(x[k + 1]) << w
            store_word(out, 4 * k, both)
        if count & 1:
            store_word(out, 4 * (count - 1), np.uint64(x[count - 1]))
    elif width < 4:  # a byte holds bits of more than the last two values
        for k in range(count):
            fill = np.uint64(bit & 7)
            before |= np.uint64(x[k]) << fill
            store_word(out, bit >> 3, before)
            before >>= (fill + w) >> np.uint64(3) << np.uint64(3)
            bit += width
    elif width <= _PAIRS:
        for k in range(0, count - 1, 2):
            both = np.uint64(x[k]) | np.uint64(x[k + 1]) << w
            fill = np.uint64(bit & 7)
            store_word(out, (bit >> 3), both << fill | before >> (w + w - fill))
            before = both
            bit += width + width
        if count & 1:
            fill = np.uint64(bit & 7)
            last = np.uint64(x[count - 1])
            store_word(out, (bit >> 3), last << fill | before >> (w + w - fill))
    else:
        for k in range(count):
            v = np.uint64(x[k])
            fill = np.uint64(bit & 7)
            store_word(out, (bit >> 3), v << fill | before >> (w - fill))
            if width > _SHIFTED:
                out[(bit >> 3) + 8] = np.uint8(v >> np.uint64(1) >> (np.uint64(63) - fill))
            before = v
            bit += width


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
    to = place_of(out, 0)
    data, size = place_of(packed, 0), packed.size
    safe = max(0, min(out.size, (size - 9) * 8 // width))
    bit = 0
    if more:
        for k in range(safe):
            to[k] = T(T(to[k] + T(_value_at(data, bit, width))) & mask)
            bit += width
    else:
        for k in range(safe):
            to[k] = T(T(_value_at(data, bit, width)) & mask)
            bit += width
    for k in range(safe, out.size):
        old = out[k] if more else T(0)
        out[k] = T(T(old + T(_last_value(data, size, bit, width))) & mask)
        bit += width


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


def unpack(data: Buffer, count: int, width: int) -> Words:
    """Inverse of `pack`; may alias `data` where that is writable. Shapes: [count]."""
    raw, word = _raw(data, count, width), word_type(width)
    if width in (HALF_BITS, WORD_BITS):
        aligned = raw.ctypes.data % word().itemsize == 0 and raw.flags.writeable
        return (raw if aligned else raw.copy()).view(word)
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
