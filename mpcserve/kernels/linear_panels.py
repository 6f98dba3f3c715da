"""The innermost loop of the linear layers, as LLVM IR: rows of one panel against panels of another.

No source loop keeps ROWS vectors of sums in registers. This is the only place that knows how wide a
vector is, and which instructions multiply words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core.registry import cpu_target
from numpy.typing import DTypeLike

from mpcserve.kernels.places import fetch_line, inline

# numba's own description of the CPU, part of the key of its cache: code compiled for one machine is
# never run with the constants of another.
_FEATURES = cpu_target.target_context.codegen().magic_tuple()[2].split(",")

# Does one instruction multiply eight 64-bit lanes (vpmullq)? Otherwise a product mod 2^64 is
# lo·lo + 2^32·(lo·hi + hi·lo): a widening product and a 32-bit one, summed apart, then joined.
NATIVE = "+avx512dq" in _FEATURES

# Does one instruction multiply eight words of 52 bits and add the low halves (vpmadd52luq)? Rings
# of at most so many bits use it in 64-bit words: what lies above the ring is nobody's concern.
FUSED_BITS = 52 if "+avx512ifma" in _FEATURES and NATIVE else 0

# Rows of sums in registers: 12 of 32 vectors of 512 bits, or 6 (6 pairs, of 64-bit words) of 16
# vectors of 256 bits. Narrower machines split the vectors; the result is the same.
ROWS = 12 if NATIVE else 6

# Panels that meet rows at once, where there are two vectors of registers for each row: a word of
# the left is loaded and spread to all lanes once for both.
PANELS = 2 if NATIVE else 1

# A panel of so few columns: rows lie in the lanes instead, which one column would leave empty.
FEW_COLUMNS = ROWS // 2

ROOM = 16  # words that lie readable behind a packed left operand

LINE = 64  # bytes of a cache line

_INT64 = ir.IntType(64)
_INDEX = ir.IntType(32)  # of a lane

Many = tuple[ir.Value, ...]


@dataclass(frozen=True, slots=True)
class _Kind:
    """IR for words that one instruction multiplies, lane by lane.

    A row of running sums is `parts` vectors.
    """

    bits: int
    lanes: int  # columns of a panel
    parts: int = 1

    def vector(self, split: int = 1) -> ir.Type:
        """A vector, read as so many times more and narrower words."""
        return ir.VectorType(ir.IntType(self.bits // split), self.lanes * split)

    def prepare(self, builder: ir.IRBuilder, right: ir.Value) -> Many:
        """What all rows need of the right operand."""
        return (right,)

    def add(self, builder: ir.IRBuilder, sums: Many, left: ir.Value, right: Many) -> Many:
        """sums + left · right."""
        return (builder.add(sums[0], builder.mul(left, right[0])),)

    def read(self, builder: ir.IRBuilder, sums: Many) -> ir.Value:
        """The sum, one word a lane."""
        return sums[0]


class _Halves(_Kind):
    """IR for 64-bit words that are multiplied by halves."""

    __slots__ = ()

    def prepare(self, builder: ir.IRBuilder, right: ir.Value) -> Many:
        """The right operand, and it with the halves swapped."""
        count = 2 * self.lanes
        order = ir.Constant(ir.VectorType(_INDEX, count), [lane ^ 1 for lane in range(count)])
        undef = ir.Constant(self.vector(2), ir.Undefined)
        swapped = builder.shuffle_vector(builder.bitcast(right, self.vector(2)), undef, order)
        return right, swapped

    def add(self, builder: ir.IRBuilder, sums: Many, left: ir.Value, right: Many) -> Many:
        """Σ lo·lo, and in the two halves of a word Σ lo·hi and Σ hi·lo."""
        low = ir.Constant(self.vector(), [0xFFFFFFFF] * self.lanes)
        lows = builder.mul(builder.and_(left, low), builder.and_(right[0], low))
        cross = builder.mul(builder.bitcast(left, self.vector(2)), right[1])
        crosses = builder.add(builder.bitcast(sums[1], self.vector(2)), cross)
        return builder.add(sums[0], lows), builder.bitcast(crosses, self.vector())

    def read(self, builder: ir.IRBuilder, sums: Many) -> ir.Value:
        """Σ lo·lo + 2^32 · (Σ lo·hi + Σ hi·lo)."""
        shift = ir.Constant(self.vector(), [32] * self.lanes)
        cross = builder.add(sums[1], builder.lshr(sums[1], shift))
        return builder.add(sums[0], builder.shl(cross, shift))


class _Fused(_Kind):
    """IR for words of which FUSED_BITS count."""

    __slots__ = ()

    def add(self, builder: ir.IRBuilder, sums: Many, left: ir.Value, right: Many) -> Many:
        """sums + the low FUSED_BITS of left · right."""
        vector = self.vector()
        kind = ir.FunctionType(vector, [vector] * 3)
        name = "llvm.x86.avx512.vpmadd52l.uq.512"
        multiply = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        return (builder.call(multiply, (sums[0], left, right[0])),)


_KIND64 = _Kind(64, 8) if NATIVE else _Halves(64, 4, parts=2)
_KIND32 = _Kind(32, 2 * _KIND64.lanes)
_FUSED = _Fused(64, 8)


def lanes_of(dtype: DTypeLike) -> int:
    """Columns of one panel of uint64 or of uint32."""
    return _KIND64.lanes if np.dtype(dtype).itemsize == 8 else _KIND32.lanes


def kind_at(place: types.CPointer) -> _Kind:
    return _KIND64 if place.dtype == types.uint64 else _KIND32


def load(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type, size: int) -> ir.Value:
    return builder.load(builder.bitcast(address, kind.as_pointer()), align=size)


def store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value, size: int) -> None:
    builder.store(value, builder.bitcast(address, value.type.as_pointer()), align=size)


def _splat(builder: ir.IRBuilder, word: ir.Value, vector: ir.Type) -> ir.Value:
    undef = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undef, word, ir.Constant(_INDEX, 0))
    zeros = ir.Constant(ir.VectorType(_INDEX, vector.count), [0] * vector.count)
    return builder.shuffle_vector(first, undef, zeros)


def _rows_loop(
    b: ir.IRBuilder, kind: _Kind, rows: int, panels: int, at: dict[str, ir.Value]
) -> None:
    """IR: `rows` rows of the left panel against panels of the right; at least one step deep."""
    vector, size = kind.vector(), kind.bits // 8
    zero, one = ir.Constant(vector, [0] * kind.lanes), ir.Constant(_INT64, 1)
    before, loop = b.block, b.append_basic_block(f"rows{rows}")
    b.branch(loop)
    b.position_at_end(loop)
    left, offs, ahead = (b.phi(at[name].type) for name in ("left", "offs", "ahead"))
    places = [(row, panel) for row in range(rows) for panel in range(panels)]
    sums = {p: tuple(b.phi(vector) for _ in range(kind.parts)) for p in places}
    fetch_line(b, ahead)
    here, right = b.gep(at["right"], [b.load(offs)]), []
    for _ in range(panels):
        right.append(kind.prepare(b, load(b, here, vector, size)))
        here = b.gep(here, [at["apart"]])
    new = {}
    for row in range(rows):
        word = _splat(b, b.load(b.gep(left, [ir.Constant(_INT64, row)])), vector)
        for panel in range(panels):
            new[row, panel] = kind.add(b, sums[row, panel], word, right[panel])
    next_left, next_offs = b.gep(left, [ir.Constant(_INT64, rows)]), b.gep(offs, [one])
    starts = [at["left"], at["offs"], at["ahead"], *[zero] * (len(places) * kind.parts)]
    steps = [next_left, next_offs, b.gep(ahead, [at["pace"]]), *chain(*new.values())]
    phis = [left, offs, ahead, *chain(*sums.values())]
    for phi, start, step in zip(phis, starts, steps, strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(step, loop)
    after = b.append_basic_block(f"rows{rows}.end")
    b.cbranch(b.icmp_unsigned("!=", next_offs, at["end"]), loop, after)

    b.position_at_end(after)
    line = at["out"]
    for row in range(rows):
        for panel in range(panels):
            place = b.gep(line, [ir.Constant(_INT64, panel * kind.lanes)])
            old = b.select(at["more"], load(b, place, vector, size), zero)
            store(b, b.add(old, kind.read(b, new[row, panel])), place, size)
        line = b.gep(line, [at["step"]])


def _columns_loop(b: ir.IRBuilder, kind: _Kind, columns: int, at: dict[str, ir.Value]) -> None:
    """IR: rows of the left panel, in lanes, against so many columns; at least one step deep."""
    vector, size = kind.vector(), kind.bits // 8
    zero, one = ir.Constant(vector, [0] * kind.lanes), ir.Constant(_INT64, 1)
    parts = range(-(-ROWS // kind.lanes))
    before, loop = b.block, b.append_basic_block(f"columns{columns}")
    b.branch(loop)
    b.position_at_end(loop)
    left, offs, ahead = (b.phi(at[name].type) for name in ("left", "offs", "ahead"))
    places = [(column, part) for column in range(columns) for part in parts]
    sums = {p: tuple(b.phi(vector) for _ in range(kind.parts)) for p in places}
    fetch_line(b, ahead)
    rows = []
    for part in parts:
        here = b.gep(left, [ir.Constant(_INT64, part * kind.lanes)])
        rows.append(kind.prepare(b, load(b, here, vector, size)))
    new, here = {}, b.gep(at["right"], [b.load(offs)])
    for column in range(columns):
        word = _splat(b, b.load(b.gep(here, [ir.Constant(_INT64, column)])), vector)
        for part in parts:
            new[column, part] = kind.add(b, sums[column, part], word, rows[part])
    next_offs = b.gep(offs, [one])
    starts = [at["left"], at["offs"], at["ahead"], *[zero] * (len(places) * kind.parts)]
    steps = [b.gep(left, [at["rows"]]), next_offs, b.gep(ahead, [at["pace"]])]
    phis = [left, offs, ahead, *chain(*sums.values())]
    for phi, start, step in zip(phis, starts, [*steps, *chain(*new.values())], strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(step, loop)
    after = b.append_basic_block(f"columns{columns}.end")
    b.cbranch(b.icmp_unsigned("!=", next_offs, at["end"]), loop, after)
    b.position_at_end(after)
    for number, p in enumerate(places):
        place = b.gep(at["out"], [ir.Constant(_INT64, number * kind.lanes)])
        store(b, kind.read(b, new[p]), place, size)


def _loops(
    builder: ir.IRBuilder, number: ir.Value, most: int, write: Callable[[int], None]
) -> None:
    """IR: what is written for 1, 2, … `most`, whichever the number is."""
    done = builder.append_basic_block("done")
    choice = builder.switch(number, done)
    for count in range(1, most + 1):
        block = builder.append_basic_block(f"enter{count}")
        choice.add_case(ir.Constant(_INT64, count), block)
        builder.position_at_end(block)
        write(count)
        builder.branch(done)
    builder.position_at_end(done)


def _loops_of_kind(
    builder: ir.IRBuilder,
    place: Any,
    at: dict[str, ir.Value],
    number: str,
    most: int,
    loop: Callable[[_Kind, int], None],
) -> None:
    """IR: the loops for the kind of words at a place, of which `bits` count."""
    kind = kind_at(place)
    at["end"] = builder.gep(at["offs"], [at["depth"]])
    if kind is not _KIND64 or not FUSED_BITS:
        _loops(builder, at[number], most, partial(loop, kind))
        return
    fits = builder.icmp_signed("<=", at["bits"], ir.Constant(_INT64, FUSED_BITS))
    with builder.if_else(fits) as (fused, exact):
        with fused:
            _loops(builder, at[number], most, partial(loop, _FUSED))
        with exact:
            _loops(builder, at[number], most, partial(loop, kind))


def _panels(panels: int) -> Any:
    @inline
    def multiply(  # type: ignore[no-untyped-def]
        typingctx, left, right, apart, offs, depth, rows, out, step, more, bits, ahead, pace
    ):
        """out[i·step + j] = Σ_k left[k·rows + i] · right[offs[k] + j]; added to it when `more` ≠ 0.

        i < rows ≤ ROWS, j < lanes, 1 ≤ depth; mod 2^bits. So for the next panel, `apart` words on.
        Meanwhile depth · pace words from `ahead` on are fetched.
        """
        names = ("left", "right", "apart", "offs", "depth", "rows", "out", "step", "more", "bits")

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            at = dict(zip((*names, "ahead", "pace"), args, strict=True))
            at["more"] = builder.icmp_signed("!=", at["more"], ir.Constant(_INT64, 0))

            def loop(kind: _Kind, rows: int) -> None:
                _rows_loop(builder, kind, rows, panels, at)

            _loops_of_kind(builder, left, at, "rows", ROWS, loop)
            return context.get_dummy_value()

        n = types.int64
        return types.void(left, right, n, offs, n, n, out, n, n, n, ahead, n), codegen

    return multiply


multiply_panel, multiply_panels = _panels(1), _panels(PANELS)


@inline
def multiply_columns(  # type: ignore[no-untyped-def]
    typingctx, left, right, offs, depth, rows, columns, out, bits, ahead, pace
):
    """out[j·row_lanes + i] = Σ_k left[k·rows + i] · right[offs[k] + j]; nothing is added to it.

    i < rows ≤ ROWS, j < columns ≤ FEW_COLUMNS, 1 ≤ depth; mod 2^bits. Up to ROOM words behind the
    left panel are read. Meanwhile depth · pace words from `ahead` on are fetched.
    """
    names = ("left", "right", "offs", "depth", "rows", "columns", "out", "bits", "ahead", "pace")

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        at = dict(zip(names, args, strict=True))

        def loop(kind: _Kind, columns: int) -> None:
            _columns_loop(builder, kind, columns, at)

        _loops_of_kind(builder, left, at, "columns", FEW_COLUMNS, loop)
        return context.get_dummy_value()

    n = types.int64
    return types.void(left, right, offs, n, n, n, out, n, ahead, n), codegen


@inline
def row_lanes_at(typingctx, place):  # type: ignore[no-untyped-def]
    """Lanes of whole vectors that hold ROWS of the words at a place."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        lanes = kind_at(place).lanes
        return ir.Constant(_INT64, -(-ROWS // lanes) * lanes)

    return types.int64(place), codegen


@inline
def lanes_at(typingctx, place):  # type: ignore[no-untyped-def]
    """Columns of one panel of the words at a place."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return ir.Constant(_INT64, kind_at(place).lanes)

    return types.int64(place), codegen


@inline
def copy_lanes(typingctx, source, out):  # type: ignore[no-untyped-def]
    """One vector of words from one place to another."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = kind_at(out)
        lanes = load(builder, args[0], kind.vector(), kind.bits // 8)
        store(builder, lanes, args[1], kind.bits // 8)
        return context.get_dummy_value()

    return types.void(source, out), codegen


@inline
def on_line(typingctx, place):  # type: ignore[no-untyped-def]
    """The next place where a cache line begins: no vector of a panel from there crosses one."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        after = builder.add(builder.ptrtoint(args[0], _INT64), ir.Constant(_INT64, LINE - 1))
        return builder.inttoptr(builder.and_(after, ir.Constant(_INT64, -LINE)), args[0].type)

    return place(place), codegen


@inline
def zero_at(typingctx, place):  # type: ignore[no-untyped-def]
    """Zero as a word of the kind at a place."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return ir.Constant(ir.IntType(kind_at(place).bits), 0)

    return place.dtype(place), codegen


@inline
def added(typingctx, total, left, right):  # type: ignore[no-untyped-def]
    """total + left · right as a word; numba would go on in 64 bits."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.add(args[0], builder.mul(args[1], args[2]))

    return total(total, total, total), codegen
