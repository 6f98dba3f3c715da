"""TLS records between a socket and memory: OpenSSL's own functions, called from compiled code.

A record holds 16 KiB. Called from Python for each, a call costs half of what the cipher takes; here
one call does all of a piece of a round, and finds its own way past the headers of frames.

Functions, OpenSSL's objects and memory are given as addresses, valid during the call. What goes
wrong is for the caller to find out: OpenSSL's errors are the calling thread's, a socket's meet its
next user.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

from mpcserve.kernels.jit import kernel
from mpcserve.kernels.places import inline, load_word, part, pointer

HEADER_BYTES = 24
"""Of a frame: 4 that begin every frame of DATA, 4 of its length (big-endian), 16 of the stream."""

_STEP = 16 << 10
"""Wire bytes that OpenSSL is given at once: its copy of them stays in the cache."""

_INT, _LONG = ir.IntType(32), ir.IntType(64)
_PLACE = ir.IntType(8).as_pointer()


@inline
def _io(typingctx, function, handle, at, size):  # type: ignore[no-untyped-def]
    """function(handle, at, size): int (*)(void *, void *, int)."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(_INT, (_PLACE, _PLACE, _INT)).as_pointer()
        handle, at = (builder.inttoptr(a, _PLACE) for a in args[1:3])
        size = builder.trunc(args[3], _INT)
        done = builder.call(builder.inttoptr(args[0], kind), (handle, at, size))
        return builder.sext(done, _LONG)

    four: Any = (types.int64,) * 4
    return types.int64(*four), codegen


@inline
def _kind_of(typingctx, function, handle, result):  # type: ignore[no-untyped-def]
    """function(handle, result): int (*)(void *, int)."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(_INT, (_PLACE, _INT)).as_pointer()
        handle, result = builder.inttoptr(args[1], _PLACE), builder.trunc(args[2], _INT)
        return builder.sext(builder.call(builder.inttoptr(args[0], kind), (handle, result)), _LONG)

    three: Any = (types.int64,) * 3
    return types.int64(*three), codegen


def _socket_call(name: str) -> Any:
    @inline
    def call(typingctx, file, at, size):  # type: ignore[no-untyped-def]
        """The C library's function of this name, without flags: how many bytes, or −1."""

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            kind = ir.FunctionType(_LONG, (_INT, _PLACE, _LONG, _INT))
            function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
            file, at = builder.trunc(args[0], _INT), builder.inttoptr(args[1], _PLACE)
            return builder.call(function, (file, at, args[2], _INT(0)))

        three: Any = (types.int64,) * 3
        return types.int64(*three), codegen

    return call


_send, _recv = _socket_call("send"), _socket_call("recv")


@inline
def _place_at(typingctx, address):  # type: ignore[no-untyped-def]
    """The bytes at an address."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], _PLACE)

    return pointer(types.uint8)(types.int64), codegen


def _ints(count: int) -> str:
    return ", ".join(["int64"] * count)


@kernel(f"UniTuple(int64, 3)({_ints(11)})")
def write_records(
    ssl_write: int, ssl: int, bio_read: int, bio: int, file: int,
    header: int, header_size: int, payload: int, size: int, wire: int, room: int,
) -> tuple[int, int, int]:  # fmt: skip
    """Encrypt a header and its payload and hand them to a socket that does not wait.

    How many wire bytes OpenSSL made, which lie at `wire`; how many of them the socket took; and
    what the last write returned, 0 or less if it failed.
    """
    last = _io(ssl_write, ssl, header, header_size)
    if last > 0 and size:
        last = _io(ssl_write, ssl, payload, size)
    made = max(0, _io(bio_read, bio, wire, room)) if last > 0 else 0
    return made, max(0, _send(file, wire, made)) if made else 0, last


@part
def _length(header: int, start: int, most: int) -> int:
    """Of the frame with this header; 0 if it is not like `start`, or too long."""
    here, like = _place_at(header), _place_at(start)
    first, half = load_word(here, 0), np.uint64(0xFFFFFFFF)
    if (first & half) != (load_word(like, 0) & half):
        return 0
    for at in (8, 16):
        if load_word(here, at) != load_word(like, at):
            return 0
    length = 0
    for at in range(4, 8):
        length = length << 8 | int(here[at])
    return length if length <= most else 0


@kernel(f"UniTuple(int64, 6)({_ints(16)})")
def read_data(
    ssl_read: int, ssl: int, bio_write: int, bio: int, ssl_error: int, want: int,
    file: int, wire: int, wire_room: int,
    header: int, start: int, most: int, place: int, room: int, left: int, have: int,
) -> tuple[int, int, int, int, int, int]:  # fmt: skip
    """Take what a socket that does not wait has, and decrypt frames of DATA to where they belong.

    Of the frame under way `left` bytes of payload are to come, or `have` bytes of its header are
    there. A frame whose header is like `start`, but for a length of up to `most`, goes on at
    `place`, for which there is `room`.

    OpenSSL is given more when its error is that it wants to read, and not touched after another.

    How many wire bytes came, 0 at the end, −1 if none; how many of payload; `left` and `have`; how
    many headers; and what the last read of OpenSSL returned: 0 or less if there is no more, or it
    failed. What else came OpenSSL holds.
    """
    come = _recv(file, wire, wire_room)
    taken, filled, headers, last = 0, 0, 0, 1
    while come > 0 and have < HEADER_BYTES and not (left and filled == room):
        if left:
            last = _io(ssl_read, ssl, place + filled, min(left, room - filled))
        else:
            last = _io(ssl_read, ssl, header + have, HEADER_BYTES - have)
        if last > 0 and left:
            filled += last
            left -= last
        elif last > 0:
            have += last
            if have == HEADER_BYTES:
                left = _length(header, start, most)
                if left:
                    have = 0
                    headers += 1
        elif taken < come and _kind_of(ssl_error, ssl, last) == want:
            put = _io(bio_write, bio, wire + taken, min(_STEP, come - taken))
            if put <= 0:
                break
            taken += put
        else:
            break
    if taken < come:
        _io(bio_write, bio, wire + taken, come - taken)
    return come, filled, left, have, headers, last
