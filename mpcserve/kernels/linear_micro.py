"""The compiled half of the linear layers: out[i, p] = Σ_k left[i, k] · right[k, p] mod 2^64 or 32.

One driver serves matmul and conv, on words of 64 bits and on words of 32; all operands of a product
are of one kind. The left operand is read by strides or comes packed in panels of ROWS rows. The
right one is addressed as source[at + offs[k] + base[p]]: a strided or a transposed matrix, or the
image columns of a convolution without ever writing them out; or it comes packed in panels of as
many columns as a vector has lanes. The driver gathers one panel KC deep (it stays in the L1 cache)
and meets it with ROWS_L2 rows of the left operand (they stay in the L2 cache).

The innermost loop is LLVM IR, because no source loop keeps ROWS vectors of sums in registers. It is
the only place that knows a vector width. Every address, branch and loop count is a function of
shapes alone.
Source: Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core.registry import cpu_target
from numpy.typing import DTypeLike, NDArray

from mpcserve.kernels.jit import F, kernel
from mpcserve.kernels.places import Place, inline, on, part, place_of
from mpcserve.ring import Words

Index = NDArray[np.int64]

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

KC = 256  # depth of a panel: KC vectors of 512 bits are 16 KiB, half an L1 cache
STRIP = 8  # panels gathered at once, so that memory is read in longer runs
ROWS_L2 = 96  # rows that meet one panel: ROWS_L2 · KC words are 96 or 192 KiB of L2 cache
LINE = 64  # bytes of a cache line
FEW_ROWS, FEW_DEEP = 4, 64  # up to here columns are read where they lie: copying would cost more

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
    return _KIND64.lanes if np.dtype(dtype) == np.uint64 else _KIND32.lanes


def aligned(words: int, dtype: np.dtype[Any]) -> Words:
    """Uninitialised, from the beginning of a cache line: no vector of a panel crosses one."""
    raw: Words = np.empty(words + LINE // dtype.itemsize, dtype)
    skip = -raw.ctypes.data % LINE // dtype.itemsize
    return raw[skip : skip + words]


def scratch_words(dtype: DTypeLike, rows: int, deep: int, right_packed: bool) -> int:
    """What `multiply` needs: a tile for cut-off columns, a strip of the right, `rows` to pack."""
    strip = 0 if right_packed else STRIP * lanes_of(dtype)
    line = LINE // np.dtype(dtype).itemsize
    return line + ROWS * lanes_of(dtype) + (strip + min(ROWS_L2, rows)) * min(KC, deep)


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
    left, offs = b.phi(at["left"].type), b.phi(at["offs"].type)
    places = [(row, panel) for row in range(rows) for panel in range(panels)]
    sums = {p: tuple(b.phi(vector) for _ in range(kind.parts)) for p in places}
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
    starts = [at["left"], at["offs"], *[zero] * (len(places) * kind.parts)]
    steps = [next_left, next_offs, *chain(*new.values())]
    phis = [left, offs, *chain(*sums.values())]
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


def _rows_loops(builder: ir.IRBuilder, kind: _Kind, panels: int, at: dict[str, ir.Value]) -> None:
    """IR: as many rows as there are."""
    done = builder.append_basic_block("done")
    choice = builder.switch(at["rows"], done)
    for count in range(1, ROWS + 1):
        block = builder.append_basic_block(f"enter{count}")
        choice.add_case(ir.Constant(_INT64, count), block)
        builder.position_at_end(block)
        _rows_loop(builder, kind, count, panels, at)
        builder.branch(done)
    builder.position_at_end(done)


def _panels(panels: int) -> Any:
    @inline
    def multiply(typingctx, left, right, apart, offs, depth, rows, out, step, more, bits):  # type: ignore[no-untyped-def]
        """out[i·step + j] = Σ_k left[k·rows + i] · right[offs[k] + j]; added to it when `more` ≠ 0.

        i < rows ≤ ROWS, j < lanes, 1 ≤ depth; mod 2^bits. So for the next panel, `apart` words on.
        """
        whole = types.int64

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            names = ("left", "right", "apart", "offs", "depth", "rows", "out", "step", "more")
            at = dict(zip(names, args, strict=False))
            at["end"] = builder.gep(at["offs"], [at["depth"]])
            at["more"] = builder.icmp_signed("!=", at["more"], ir.Constant(_INT64, 0))
            kind = kind_at(left)
            if kind is _KIND64 and FUSED_BITS:
                fits = builder.icmp_signed("<=", args[-1], ir.Constant(_INT64, FUSED_BITS))
                with builder.if_else(fits) as (fused, exact):
                    with fused:
                        _rows_loops(builder, _FUSED, panels, at)
                    with exact:
                        _rows_loops(builder, kind, panels, at)
            else:
                _rows_loops(builder, kind, panels, at)
            return context.get_dummy_value()

        sizes = (whole, whole, out, whole, whole, whole)
        return types.void(left, right, whole, offs, *sizes), codegen

    return multiply


_multiply_panel, _multiply_panels = _panels(1), _panels(PANELS)


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


@part
def _neighbours(base: Place, width: int, lanes: int) -> bool:
    """Are `width` columns whole vectors of neighbours in memory? base must not decrease."""
    return width % lanes == 0 and base[width - 1] - base[0] == width - 1


@part
def _gather_neighbours(source: Place, offs: Place, columns: int, depth: int, out: Place) -> None:
    """Panels of neighbours: out[(j·depth + k)·lanes + …] = source[offs[k] + j·lanes + …]."""
    lanes = lanes_at(out)
    for k in range(depth):
        row, to = on(source, offs[k]), on(out, k * lanes)
        for j in range(0, columns, lanes):
            copy_lanes(on(row, j), on(to, j * depth))


@part
def _gather_panel(
    source: Place, offs: Place, base: Place, width: int, depth: int, out: Place
) -> None:
    """One panel of scattered columns: out[k·lanes + lane] = source[offs[k] + base[lane]]."""
    lanes = lanes_at(out)
    for k in range(depth):
        row, to = on(source, offs[k]), on(out, k * lanes)
        if width == lanes:
            for lane in range(lanes):
                to[lane] = row[base[lane]]
        else:
            for lane in range(width):
                to[lane] = row[base[lane]]


@part
def _gather(source: Place, offs: Place, base: Place, columns: int, depth: int, out: Place) -> None:
    """Panels of all columns; lanes past the last column are left as they are."""
    lanes = lanes_at(out)
    if _neighbours(base, columns, lanes):
        _gather_neighbours(on(source, base[0]), offs, columns, depth, out)
        return
    for p0 in range(0, columns, lanes):
        to, width, first = on(out, p0 * depth), min(lanes, columns - p0), on(base, p0)
        if _neighbours(first, width, lanes):
            _gather_neighbours(on(source, first[0]), offs, lanes, depth, to)
        else:
            _gather_panel(source, offs, first, width, depth, to)


@part
def _pack_rows(
    source: Place, row_step: int, col_step: int, rows: int, depth: int, out: Place
) -> None:
    """Panels of up to ROWS rows, word (i, k) of a panel of r rows at k·r + i; rows·depth words."""
    for i0 in range(0, rows, ROWS):
        first, count = on(source, i0 * row_step), min(ROWS, rows - i0)
        to = on(out, i0 * depth)
        for k in range(depth):
            column = on(first, k * col_step)
            if count == ROWS:
                for i in range(ROWS):
                    to[i] = column[i * row_step]
            else:
                for i in range(count):
                    to[i] = column[i * row_step]
            to = on(to, count)


@part
def meet(
    left: Place,
    right: Place,
    offs: Place,
    depth: int,
    rows: int,
    columns: int,
    out: Place,
    step: int,
    more: int,
    corner: Place,
    bits: int,
) -> None:
    """Packed rows times the panels of a strip of `columns`, added to out when `more`.

    Right mod 2^bits.
    """
    lanes = lanes_at(out)
    apart, several = depth * lanes, columns // (PANELS * lanes) * PANELS * lanes
    for p0 in range(0, several, PANELS * lanes):
        for i0 in range(0, rows, ROWS):
            count, these = min(ROWS, rows - i0), on(left, i0 * depth)
            place, panels = on(out, i0 * step + p0), on(right, p0 * depth)
            _multiply_panels(these, panels, apart, offs, depth, count, place, step, more, bits)
    for p0 in range(several, columns, lanes):
        width, panel = min(lanes, columns - p0), on(right, p0 * depth)
        cut = width < lanes
        for i0 in range(0, rows, ROWS):
            count, these = min(ROWS, rows - i0), on(left, i0 * depth)
            place = on(out, i0 * step + p0)
            to, by, add = (corner, lanes, 0) if cut else (place, step, more)
            _multiply_panel(these, panel, apart, offs, depth, count, to, by, add, bits)
            if cut:
                for i in range(count):
                    for lane in range(width):
                        word = corner[i * lanes + lane]
                        place[lane] = place[lane] + word if more else word
                    place = on(place, step)


AT = "Array(int64, 1, 'C', readonly=True)"
IN = "Array({0}, 1, 'C', readonly=True)"
OUT = "{0}[::1]"


def both(*arguments: str) -> Callable[[F], F]:
    """Compile for words of 64 bits and for words of 32; {0} is the type of a word."""
    return kernel(*(f"void({', '.join(arguments)})".format(f"uint{bits}") for bits in (64, 32)))


@both(
    *(IN, AT, IN, AT, AT, AT, OUT, AT, OUT, AT),
    *("UniTuple(int64, 3)", "UniTuple(int64, 6)", "UniTuple(int64, 4)"),
)
def multiply(
    left: Words,
    left_at: Index,
    right: Words,
    right_at: Index,
    offs: Index,
    base: Index,
    out: Words,
    out_at: Index,
    scratch: Words,
    in_strip: Index,
    left_form: tuple[int, int, int],
    sizes: tuple[int, int, int, int, int, int],
    tile: tuple[int, int, int, int],
) -> None:
    """Rows row0:row1 of products item0:item1; row i of item t goes to out[out_at[t] + i·step :].

    left_form: packed or not, and if not the steps of rows and columns. sizes: is the right packed
    (then offs and base are not read), depth, columns, rows of an item, step, bits of a word that
    count. tile: item0, item1, row0 (a multiple of ROWS), row1. scratch: as scratch_words says.
    in_strip: k·lanes.
    """
    left_packed, row_step, col_step = left_form
    right_packed, deep, wide, height, step, bits = sizes
    item0, item1, row0, row1 = tile
    corner = on_line(place_of(scratch, 0))
    lanes = lanes_at(corner)
    strip = on(corner, ROWS * lanes)
    block = strip if right_packed else on(strip, STRIP * lanes * min(KC, deep))
    panels = (wide + lanes - 1) // lanes * lanes
    for item in range(item0, item1):
        source = place_of(right, right_at[item])
        for i0 in range(row0, row1, ROWS_L2):
            rows = min(ROWS_L2, row1 - i0)
            few = rows <= FEW_ROWS and deep <= FEW_DEEP and not right_packed
            width = lanes if few else STRIP * lanes
            for k0 in range(0, deep, KC):
                depth = min(KC, deep - k0)
                lhs = place_of(left, left_at[item])
                if left_packed:
                    lhs = on(lhs, k0 * height + i0 * depth)
                else:
                    lhs = on(lhs, i0 * row_step + k0 * col_step)
                    _pack_rows(lhs, row_step, col_step, rows, depth, block)
                    lhs = block
                for p0 in range(0, wide, width):
                    columns = min(width, wide - p0)
                    place = place_of(out, out_at[item] + i0 * step + p0)
                    rhs, table = on(source, k0 * panels + p0 * depth), place_of(in_strip, 0)
                    if not right_packed:
                        start, taps = place_of(base, p0), place_of(offs, k0)
                        if few and _neighbours(start, columns, lanes):
                            rhs, table = on(source, start[0]), taps
                        else:
                            rhs = strip
                            _gather(source, taps, start, columns, depth, rhs)
                    meet(lhs, rhs, table, depth, rows, columns, place, step, k0, corner, bits)


@both(*(IN, AT, "int64", IN, AT, OUT, AT, "int64", "UniTuple(int64, 4)"))
def multiply_column(
    left: Words,
    left_at: Index,
    row_step: int,
    right: Words,
    right_at: Index,
    out: Words,
    out_at: Index,
    deep: int,
    tile: tuple[int, int, int, int],
) -> None:
    """The same where the right operand is one column; its words and those of a row are neighbours.

    Copying rows into panels would cost more than the products.
    """
    item0, item1, row0, row1 = tile
    for item in range(item0, item1):
        column, to = place_of(right, right_at[item]), place_of(out, out_at[item])
        for i in range(row0, row1):
            row = place_of(left, left_at[item] + i * row_step)
            total = zero_at(to)
            for k in range(deep):
                total = added(total, row[k], column[k])
            to[i] = total
