"""Places in memory, for compiled code: a pointer to a word, and words at any byte.

Only for arguments of a kernel: an array that a kernel makes may be freed after its last use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numba
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from mpcserve.kernels.jit import F

Place = Any
"""In compiled code a pointer: place[n] is the n-th word from there."""

# numba writes the IR in place of the call; its own annotations miss that it passes `typingctx`.
inline: Callable[[Callable[..., Any]], Any] = intrinsic
pointer: Any = types.CPointer

LINE = 64
"""Bytes of a cache line; where they are more, some are fetched twice."""


def part(function: F) -> F:
    """Compiled, with the types that it meets, into the kernels that call it."""
    return cast(F, numba.njit(nogil=True, boundscheck=False)(function))


@inline
def place_of(typingctx, array, n):  # type: ignore[no-untyped-def]
    """Where word n of a contiguous array lies, in the order of its memory."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        data = context.make_array(array)(context, builder, value=args[0]).data
        return builder.gep(data, [args[1]])

    return pointer(array.dtype)(array, types.int64), codegen


@inline
def on(typingctx, place, n):  # type: ignore[no-untyped-def]
    """The place n words further on."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.gep(args[0], [args[1]])

    return place(place, types.int64), codegen


@inline
def load_word(typingctx, place, n):  # type: ignore[no-untyped-def]
    """The 8 bytes from byte n on, little-endian, wherever they lie."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        at = builder.bitcast(builder.gep(args[0], [args[1]]), ir.IntType(64).as_pointer())
        return builder.load(at, align=1)

    return types.uint64(place, types.int64), codegen


@inline
def store_word(typingctx, place, n, word):  # type: ignore[no-untyped-def]
    """Inverse of `load_word`."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        at = builder.bitcast(builder.gep(args[0], [args[1]]), ir.IntType(64).as_pointer())
        builder.store(args[2], at, align=1)
        return context.get_dummy_value()

    return types.void(place, types.int64, types.uint64), codegen


def fetch_line(builder: ir.IRBuilder, address: ir.Value) -> None:
    """IR: have a cache line read; the address may be no memory at all."""
    place, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), (place, flag, flag, flag))
    prefetch = builder.module.declare_intrinsic("llvm.prefetch", (place,), kind)
    to_read, near, data = flag(0), flag(3), flag(1)
    builder.call(prefetch, (builder.bitcast(address, place), to_read, near, data))


@inline
def _fetch_line(typingctx, place):  # type: ignore[no-untyped-def]
    """Have the place's cache line read."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        fetch_line(builder, args[0])
        return context.get_dummy_value()

    return types.void(place), codegen


@part
def fetch(place: Place, count: int, size: int) -> None:
    """Have `count` words of `size` bytes read ahead; it does nothing but warm the cache."""
    for n in range(0, count, LINE // size):
        _fetch_line(on(place, n))


@inline
def spread(typingctx, word, place):  # type: ignore[no-untyped-def]
    """place[i] ← all ones if bit i of the word is set, else 0, for i < 64."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        size = args[1].type.pointee.width
        eight = ir.VectorType(ir.IntType(size), 8)
        to = builder.bitcast(args[1], eight.as_pointer())
        for byte in range(8):
            bits = builder.trunc(
                builder.lshr(args[0], ir.Constant(ir.IntType(64), 8 * byte)), ir.IntType(8)
            )
            lanes = builder.sext(builder.bitcast(bits, ir.VectorType(ir.IntType(1), 8)), eight)
            at = builder.gep(to, [ir.Constant(ir.IntType(64), byte)])
            builder.store(lanes, at, align=size // 8)
        return context.get_dummy_value()

    return types.void(types.uint64, place), codegen
