"""TLS records in bulk: OpenSSL's own functions, called from compiled code.

A record holds 16 KiB. Called from Python for each, a call costs half of what the cipher takes; and a
whole batch written to OpenSSL's memory buffer, then read from it, has left the cache in between.
Here one call does all that lie ready, and what goes through the buffers stays small.

Functions, OpenSSL's objects and memory are given as addresses, valid during the call. Its errors are
the calling thread's, to be asked for right after.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

from mpcserve.kernels.jit import kernel
from mpcserve.kernels.places import inline

_STEP = 16 << 10
"""Bytes that go through a buffer at once: a record's."""

_INT = ir.IntType(32)
_PLACE = ir.IntType(8).as_pointer()


@inline
def _io(typingctx, function, handle, at, size):  # type: ignore[no-untyped-def]
    """function(handle, at, size): int (*)(void *, void *, int)."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(_INT, (_PLACE, _PLACE, _INT)).as_pointer()
        handle, at = (builder.inttoptr(a, _PLACE) for a in args[1:3])
        size = builder.trunc(args[3], _INT)
        done = builder.call(builder.inttoptr(args[0], kind), (handle, at, size))
        return builder.sext(done, args[0].type)

    four: Any = (types.int64,) * 4
    return types.int64(*four), codegen


@kernel(f"UniTuple(int64, 3)({', '.join(['int64'] * 9)})")
def read_records(
    ssl_read: int, ssl: int, bio_write: int, bio: int, wire: int, come: int,
    to: int, size: int, least: int,
) -> tuple[int, int, int]:  # fmt: skip
    """Decrypt what OpenSSL holds, then `come` bytes at `wire`: up to `size` bytes, until there are
    at least so many.

    How many there are; how many of `come` were taken; and what the last read returned, 0 or less if
    it failed or there are no more.
    """
    filled, taken, got = 0, 0, 1
    while filled < least:
        got = _io(ssl_read, ssl, to + filled, size - filled)
        if got > 0:
            filled += got
            continue
        put = _io(bio_write, bio, wire + taken, min(_STEP, come - taken)) if taken < come else 0
        if put <= 0:
            break
        taken += put
    return filled, taken, got

