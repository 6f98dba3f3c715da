"""Values of any width between bytes, where they lie back to back, and the lanes of a vector.

A group of as many values as lanes begins and ends at whole bytes. One shuffle, constant for a
width, brings every lane the bytes that its value begins in, and the lanes shift by constants. Back,
the values that meet in a byte are shuffled there apart, and joined. Written in LLVM IR, one loop a
width: LLVM finds the machine's instructions for a constant shuffle, and splits vectors that the
machine does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import gcd
from typing import NamedTuple

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core.cgutils import for_range

from mpcserve.kernels.places import inline
from mpcserve.ring import HALF_BITS, WORD_BITS

REACH = 64
"""Bytes of a vector; no more are read or written at once."""

_BYTE, _SELECTOR, _INDEX = ir.IntType(8), ir.IntType(32), ir.IntType(64)


class _Group(NamedTuple):
    """Values of `width` bits that fill a vector: in lanes, and in words in memory."""

    width: int
    words: ir.VectorType
    lanes: ir.VectorType

    @property
    def size(self) -> int:
        """Bytes that the values take back to back."""
        return int(self.lanes.count) * self.width // 8

    @property
    def reach(self) -> int:
        """Bytes that are read or written for them."""
        return 1 << (self.size - 1).bit_length()

    def unpacked(self, builder: ir.IRBuilder, data: ir.Value) -> ir.Value:
        """The values as words, with bits above the width left over."""
        begins = [i * self.width // 8 for i in range(self.lanes.count)]
        needed = [b + k for b in begins for k in range(REACH // self.lanes.count)]
        # a lane may reach for bytes that its value does not need
        spread = _shuffled(builder, data, [min(byte, self.reach - 1) for byte in needed])
        values = builder.lshr(builder.bitcast(spread, self.lanes), self._shifts())
        return values if self.words == self.lanes else builder.trunc(values, self.words)

    def packed(self, builder: ir.IRBuilder, values: ir.Value) -> ir.Value:
        """Inverse of `unpacked`, with zeros behind the group's bytes."""
        if self.words != self.lanes:
            values = builder.zext(values, self.lanes)
        shifted = builder.shl(values, self._shifts())
        source = builder.bitcast(shifted, ir.VectorType(_BYTE, REACH))
        first, *others = (_shuffled(builder, source, at) for at in self._scattered())
        for other in others:
            first = builder.or_(first, other)
        return first

    def _shifts(self) -> ir.Constant:
        """Bits before each value in the byte that it begins in."""
        return ir.Constant(self.lanes, [i * self.width % 8 for i in range(self.lanes.count)])

    def _scattered(self) -> Iterator[list[int]]:
        """Of the lanes' bytes those to be joined to the packed ones; REACH is none."""
        met = [self._met(byte) for byte in range(self.reach)]
        apart = max(map(len, met))
        for n in range(apart):
            chosen = ([at for i, at in values if i % apart == n] for values in met)
            yield [at[0] if at else REACH for at in chosen]

    def _met(self, byte: int) -> list[tuple[int, int]]:
        """(value, which of the lanes' bytes) for all that have bits in a packed byte."""
        first, last = 8 * byte // self.width, (8 * byte + 7) // self.width
        lane = REACH // self.lanes.count
        values = range(first, min(last + 1, self.lanes.count))
        return [(i, i * lane + byte - i * self.width // 8) for i in values]


def _shuffled(builder: ir.IRBuilder, data: ir.Value, at: list[int]) -> ir.Value:
    """data[at], and zeros where that is behind `data`."""
    select = ir.Constant(ir.VectorType(_SELECTOR, len(at)), at)
    return builder.shuffle_vector(data, ir.Constant(data.type, None), select)


def _groups(word: ir.IntType) -> Iterator[_Group]:
    """For the widths that come in such words, if lanes hold the values shifted."""
    widths = range(1, 33) if word.width == HALF_BITS else range(33, 65)
    for width in widths:
        most = width + 8 - gcd(width, 8)
        for lane in (HALF_BITS, WORD_BITS):
            if max(word.width, most) <= lane:
                kinds = (ir.VectorType(t, 8 * REACH // lane) for t in (word, ir.IntType(lane)))
                yield _Group(width, *kinds)
                break


def _by_width(
    builder: ir.IRBuilder, width: ir.Value, word: ir.IntType, body: Callable[[_Group], ir.Value]
) -> ir.Value:
    """How many values body(group) says it did, for the group of this width; 0 if there is none."""
    start, done = builder.block, builder.append_basic_block("packing.done")
    chosen = builder.switch(width, done)
    counts = [(_INDEX(0), start)]
    for group in _groups(word):
        block = builder.append_basic_block(f"packing.{group.width}")
        chosen.add_case(_INDEX(group.width), block)
        builder.position_at_end(block)
        counts.append((body(group), builder.block))
        builder.branch(done)
    builder.position_at_end(done)
    count = builder.phi(_INDEX)
    for value, block in counts:
        count.add_incoming(value, block)
    return count


def _vector(
    builder: ir.IRBuilder, place: ir.Value, group: ir.Value, step: int, kind: ir.VectorType
) -> ir.Value:
    """Where a group begins: every `step` words, or bytes, one does."""
    at = builder.gep(place, [builder.mul(group, _INDEX(step))])
    return builder.bitcast(at, kind.as_pointer())


@inline
def pack_lanes(typingctx, x, count, width, out):  # type: ignore[no-untyped-def]
    """Pack x[:count], each below 2^width, to bytes, in whole groups; how many values that is.

    Up to REACH / 2 bytes behind them become zeros.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        x, count, width, out = args

        def body(group: _Group) -> ir.Value:
            lanes, data = group.lanes.count, ir.VectorType(_BYTE, group.reach)
            groups = builder.udiv(count, _INDEX(lanes))
            with for_range(builder, groups) as loop:
                values = builder.load(_vector(builder, x, loop.index, lanes, group.words), align=1)
                to = _vector(builder, out, loop.index, group.size, data)
                builder.store(group.packed(builder, values), to, align=1)
            return builder.mul(groups, _INDEX(lanes))

        return _by_width(builder, width, x.type.pointee, body)

    return types.int64(x, types.int64, types.int64, out), codegen


@inline
def unpack_lanes(typingctx, data, begins, width, more, out, count):  # type: ignore[no-untyped-def]
    """Unpack bytes to out[:count] in whole groups, plus what it held if there is `more`.

    How many values that is. A group may begin at data[:begins], wherefrom REACH bytes can be read.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        data, begins, width, more, out, count = args

        def loops(group: _Group, groups: ir.Value, adds: bool) -> None:
            low = ir.Constant(group.words, [(1 << group.width) - 1] * group.lanes.count)
            read = ir.VectorType(_BYTE, group.reach)
            with for_range(builder, groups) as loop:
                from_ = _vector(builder, data, loop.index, group.size, read)
                values = group.unpacked(builder, builder.load(from_, align=1))
                to = _vector(builder, out, loop.index, group.lanes.count, group.words)
                if adds:
                    values = builder.add(values, builder.load(to, align=1))
                builder.store(builder.and_(values, low), to, align=1)

        def body(group: _Group) -> ir.Value:
            size, lanes = _INDEX(group.size), _INDEX(group.lanes.count)
            begun = builder.udiv(builder.add(begins, _INDEX(group.size - 1)), size)
            whole = builder.udiv(count, lanes)
            groups = builder.select(builder.icmp_unsigned("<", begun, whole), begun, whole)
            with builder.if_else(more) as (then, otherwise):
                with then:
                    loops(group, groups, True)
                with otherwise:
                    loops(group, groups, False)
            return builder.mul(groups, lanes)

        return _by_width(builder, width, out.type.pointee, body)

    size = types.int64
    return size(data, size, size, types.boolean, out, size), codegen
