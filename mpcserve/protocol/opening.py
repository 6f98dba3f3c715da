"""Opening a masked value: both servers exchange masked shares, tile by tile, and add them up.

A tile is packed and sent while the next one computes; tiles are multiples of 64 elements, so every
piece ends on a whole byte at any width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mpcserve.kernels import packing
from mpcserve.protocol.parties import Buffer, Round, Steps, T
from mpcserve.ring import Words

TILE = 1 << 17
"""Elements a tile: 512 KiB of 32-bit words. What follows a tile, from packing to the socket, starts
with cold caches; for smaller ones that costs more than it spares to keep a tile in an L2 cache."""


def tiles(size: int) -> Iterator[slice]:
    """Slices of at most TILE elements that cover `size`."""
    for start in range(0, size, TILE):
        yield slice(start, min(start + TILE, size))


def open_share(out: Words, width: int, fill: Callable[[slice], None]) -> Steps[Words]:
    """Δ = my masked share + the peer's (mod 2^width). `fill(part)` computes out[part].

    Shapes: out [N]. Cost: 1 round, ceil(N · width / 8) bytes each way.
    Leaks: nothing, provided that `fill` adds this side's share of a fresh mask of `width` bits.
    """

    def pieces() -> Iterator[memoryview]:
        for part in tiles(out.size):
            fill(part)
            yield packing.pack(out[part], width)

    return (yield from open_packed(out, width, pieces()))


def open_packed(out: Words, width: int, pieces: Iterator[memoryview]) -> Steps[Words]:
    """The same where out is computed, and packed, by those who make the pieces.

    Words that fill their memory need no packing: pieces may then be parts of `out` itself, which is
    not written to any more.
    """
    received = yield Round(pieces, (out.size * width + 7) // 8)
    return packing.joined(out, received, width)


def told(steps: Steps[T], rounds: int) -> Steps[list[Buffer]]:
    """An instruction whose value is not opened: after its `rounds` this side's share, packed.

    It is what would be sent to open it, under a share of zero instead of a share of a mask.
    """
    step = next(steps)
    for _ in range(rounds):
        step = steps.send((yield step))
    return list(step.pieces)
