"""The compiled half of the linear layers: out[i, p] = Σ_k left[i, k] · right[k, p] mod 2^64.

One driver serves matmul and conv. The left operand is read by strides or comes packed in panels of
ROWS rows. The right one is addressed as source[at + offs[k] + base[p]]: a strided or a transposed
matrix, or the image columns of a convolution without ever writing them out; or it comes packed in
panels of LANES columns. The driver gathers one panel of KC × LANES words (it stays in the L1 cache)
and meets it with ROWS_L2 rows of the left operand (they stay in the L2 cache).

The innermost loop is LLVM IR, because no source loop keeps ROWS vectors of sums in registers. It is
the only place that knows a vector width. Every address, branch and loop count is a function of
shapes alone.
Source: Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from numpy.typing import NDArray

from mpcserve.kernels.jit import kernel
from mpcserve.ring import Words

Index = NDArray[np.int64]

# numba's own description of the CPU, part of the key of its cache: code compiled for one machine is
# never run with the constants of another.
_FEATURES = cpu_target.target_context.codegen().magic_tuple()[2].split(",")

# Does one instruction multiply eight 64-bit lanes (vpmullq)? Otherwise a product mod 2^64 is
# lo·lo + 2^32·(lo·hi + hi·lo): a widening product and a 32-bit one, summed apart, then joined.
NATIVE = "+avx512dq" in _FEATURES

# Columns of one vector, and rows of sums held in registers: 12 of 32 vectors of 512 bits, or
# 2 · 6 of 16 vectors of 256 bits. Narrower machines split the vectors; the result is the same.
LANES, ROWS = (8, 12) if NATIVE else (4, 6)

KC = 256 if NATIVE else 512  # depth of a panel: KC · LANES words are 16 KiB, half an L1 cache
STRIP = 8 * LANES  # columns gathered at once, so that memory is read in longer runs
ROWS_L2 = 96  # rows that meet one panel: ROWS_L2 · KC words are 192 or 384 KiB of L2 cache
FEW_ROWS, FEW_DEEP = 4, 64  # up to here columns are read where they lie: copying would cost more
STRIP_WORDS = KC * STRIP + ROWS * LANES  # a gathered strip, and a tile for cut-off columns

_WORD = ir.IntType(64)
_HALVES = ir.VectorType(ir.IntType(32), 2 * LANES)
_LANES = ir.VectorType(_WORD, LANES)


# numba writes the IR in place of the call; its own annotations miss that it passes `typingctx`.
_inline: Callable[[Callable[..., Any]], Any] = intrinsic


class _Sums:
    """IR for one row of running sums: how a product is added, and how the sum is read."""

    parts = 1 if NATIVE else 2

    @staticmethod
    def prepare(builder: ir.IRBuilder, right: ir.Value) -> tuple[ir.Value, ...]:
        """What all rows need of the right operand: itself, and it with the halves swapped."""
        if NATIVE:
            return (right,)
        halves = builder.bitcast(right, _HALVES)
        order = [lane ^ 1 for lane in range(2 * LANES)]
        swap = ir.Constant(ir.VectorType(ir.IntType(32), 2 * LANES), order)
        return right, builder.shuffle_vector(halves, ir.Constant(_HALVES, ir.Undefined), swap)

    @staticmethod
    def add(
        builder: ir.IRBuilder, sums: list[ir.Value], left: ir.Value, right: tuple[ir.Value, ...]
    ) -> list[ir.Value]:
        """sums + left · right."""
        if NATIVE:
            return [builder.add(sums[0], builder.mul(left, right[0]))]
        low = ir.Constant(_LANES, [0xFFFFFFFF] * LANES)
        lows = builder.mul(builder.and_(left, low), builder.and_(right[0], low))
        cross = builder.mul(builder.bitcast(left, _HALVES), right[1])
        crosses = builder.add(builder.bitcast(sums[1], _HALVES), cross)
        return [builder.add(sums[0], lows), builder.bitcast(crosses, _LANES)]

    @staticmethod
    def read(builder: ir.IRBuilder, sums: list[ir.Value]) -> ir.Value:
        """The sum mod 2^64."""
        if NATIVE:
            return sums[0]
        shift = ir.Constant(_LANES, [32] * LANES)
        cross = builder.add(sums[1], builder.lshr(sums[1], shift))
        return builder.add(sums[0], builder.shl(cross, shift))


def _load(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=8)


def _store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=8)


def _bytes(builder: ir.IRBuilder, place: ir.Value) -> ir.Value:
    return builder.shl(place, ir.Constant(_WORD, 3))


def _splat(builder: ir.IRBuilder, word: ir.Value) -> ir.Value:
    undef = ir.Constant(_LANES, ir.Undefined)
    first = builder.insert_element(undef, word, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(first, undef, zeros)


def _rows_loop(b: ir.IRBuilder, rows: int, at: dict[str, ir.Value]) -> None:
    """IR: `rows` rows of the left panel against the right one; at least one step deep."""
    zero, word = ir.Constant(_LANES, [0] * LANES), ir.Constant(_WORD, 8)
    before, loop = b.block, b.append_basic_block(f"rows{rows}")
    b.branch(loop)
    b.position_at_end(loop)
    left, offs = b.phi(_WORD), b.phi(_WORD)
    sums = [[b.phi(_LANES) for _ in range(_Sums.parts)] for _ in range(rows)]
    here = b.add(at["right"], _bytes(b, _load(b, offs, _WORD)))
    vector = _Sums.prepare(b, _load(b, here, _LANES))
    new = []
    for row in range(rows):
        scalar = _load(b, b.add(left, ir.Constant(_WORD, row * 8)), _WORD)
        new.append(_Sums.add(b, sums[row], _splat(b, scalar), vector))
    next_left, next_offs = b.add(left, ir.Constant(_WORD, rows * 8)), b.add(offs, word)
    starts = [at["left"], at["offs"], *[zero] * (rows * _Sums.parts)]
    steps = [next_left, next_offs, *chain(*new)]
    for phi, start, step in zip([left, offs, *chain(*sums)], starts, steps, strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(step, loop)
    after = b.append_basic_block(f"rows{rows}.end")
    b.cbranch(b.icmp_signed("<", next_offs, at["end"]), loop, after)

    b.position_at_end(after)
    place = at["out"]
    for row in range(rows):
        old = b.select(at["more"], _load(b, place, _LANES), zero)
        _store(b, b.add(old, _Sums.read(b, new[row])), place)
        place = b.add(place, at["step"])


@_inline
def _multiply_panels(typingctx, left, right, offs, depth, rows, out, step, more):  # type: ignore[no-untyped-def]
    """out[i·step + j] = Σ_k left[k·rows + i] · right[offs[k] + j], added to out when `more` ≠ 0.

    i < rows ≤ ROWS, j < LANES, 1 ≤ depth; left, right, offs and out are places.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        names = ("left", "right", "offs", "depth", "rows", "out", "step", "more")
        at = dict(zip(names, args, strict=True))
        at["end"] = builder.add(at["offs"], at["depth"])
        for name in ("left", "right", "offs", "end", "out", "step"):
            at[name] = _bytes(builder, at[name])
        at["more"] = builder.icmp_signed("!=", at["more"], ir.Constant(_WORD, 0))
        done = builder.append_basic_block("done")
        choice = builder.switch(at["rows"], done)
        for count in range(1, ROWS + 1):
            block = builder.append_basic_block(f"enter{count}")
            choice.add_case(ir.Constant(_WORD, count), block)
            builder.position_at_end(block)
            _rows_loop(builder, count, at)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), codegen


@_inline
def _word(typingctx, place):  # type: ignore[no-untyped-def]
    """The word at a place, as int64."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _load(builder, _bytes(builder, args[0]), _WORD)

    return types.int64(types.int64), codegen


@_inline
def _put(typingctx, word, place):  # type: ignore[no-untyped-def]
    """Write a word to a place."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _store(builder, args[0], _bytes(builder, args[1]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@_inline
def _copy_lanes(typingctx, source, out):  # type: ignore[no-untyped-def]
    """LANES words from one place to another."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        lanes = _load(builder, _bytes(builder, args[0]), _LANES)
        _store(builder, lanes, _bytes(builder, args[1]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@_inline
def _place(typingctx, array):  # type: ignore[no-untyped-def]
    """Where an array begins. Only for arguments: a local array may be freed after its last use."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, value=args[0]).data
        return builder.lshr(builder.ptrtoint(data, _WORD), ir.Constant(_WORD, 3))

    return types.int64(array), codegen


_IN = "Array(uint64, 1, 'C', readonly=True)"
_OUT = "uint64[::1]"
_AT = "int64[::1]"


@kernel(f"boolean({_AT}, int64, int64)")
def _neighbours(base: Index, p0: int, p1: int) -> bool:
    """Are the columns p0:p1 whole vectors of neighbours in memory? base must not decrease."""
    return (p1 - p0) % LANES == 0 and base[p1 - 1] - base[p0] == p1 - p0 - 1


@kernel("void(int64, int64, int64, int64, int64)")
def _gather_neighbours(source: int, offs: int, columns: int, depth: int, out: int) -> None:
    """Panels of neighbours: out[(j·depth + k)·LANES + …] = source[offs[k] + j·LANES + …]."""
    for k in range(depth):
        row, to = source + _word(offs + k), out + k * LANES
        for j in range(0, columns, LANES):
            _copy_lanes(row + j, to + j * depth)


@kernel("void(int64, int64, int64, int64, int64, int64)")
def _gather_panel(source: int, offs: int, base: int, width: int, depth: int, out: int) -> None:
    """One panel of scattered columns: out[k·LANES + lane] = source[offs[k] + base[lane]]."""
    for k in range(depth):
        row, to = source + _word(offs + k), out + k * LANES
        if width == LANES:
            for lane in range(LANES):
                _put(_word(row + _word(base + lane)), to + lane)
        else:
            for lane in range(width):
                _put(_word(row + _word(base + lane)), to + lane)


@kernel(f"void(int64, int64, {_AT}, int64, int64, int64, int64)")
def _gather(source: int, offs: int, base: Index, p0: int, p1: int, depth: int, out: int) -> None:
    """The panels of columns p0:p1; lanes past the last column are left as they are."""
    if _neighbours(base, p0, p1):
        _gather_neighbours(source + base[p0], offs, p1 - p0, depth, out)
        return
    for q0 in range(p0, p1, LANES):
        to, width = out + (q0 - p0) * depth, min(LANES, p1 - q0)
        if _neighbours(base, q0, q0 + width):
            _gather_neighbours(source + base[q0], offs, LANES, depth, to)
        else:
            _gather_panel(source, offs, _place(base) + q0, width, depth, to)


@kernel("void(int64, int64, int64, int64, int64, int64)")
def _pack_rows(source: int, row_step: int, col_step: int, rows: int, depth: int, out: int) -> None:
    """Panels of up to ROWS rows, word (i, k) of a panel of r rows at k·r + i; rows·depth words."""
    for i0 in range(0, rows, ROWS):
        first, count = source + i0 * row_step, min(ROWS, rows - i0)
        to = out + i0 * depth
        for k in range(depth):
            column = first + k * col_step
            if count == ROWS:
                for i in range(ROWS):
                    _put(_word(column + i * row_step), to + i)
            else:
                for i in range(count):
                    _put(_word(column + i * row_step), to + i)
            to += count


@kernel(f"void({_IN}, int64, int64, int64, {_OUT}, int64)")
def pack_left(source: Words, at: int, rows: int, deep: int, out: Words, out_at: int) -> None:
    """A whole left operand of contiguous rows, KC columns after KC columns."""
    for k0 in range(0, deep, KC):
        depth = min(KC, deep - k0)
        start, to = at + k0, out_at + k0 * rows
        _pack_rows(_place(source) + start, deep, 1, rows, depth, _place(out) + to)


@kernel(f"void({_IN}, int64, {_AT}, {_AT}, {_OUT}, int64)")
def pack_right(source: Words, at: int, offs: Index, base: Index, out: Words, out_at: int) -> None:
    """A whole right operand, KC rows after KC rows, panel by panel; the last is not filled up."""
    deep, wide = len(offs), len(base)
    to = _place(out) + out_at
    for k0 in range(0, deep, KC):
        depth = min(KC, deep - k0)
        for p0 in range(0, wide, STRIP):
            p1 = min(wide, p0 + STRIP)
            first, table = _place(source) + at, _place(offs) + k0
            _gather(first, table, base, p0, p1, depth, to)
            to += (p1 - p0 + LANES - 1) // LANES * LANES * depth


@kernel(f"void({', '.join(['int64'] * 10)})")
def _meet(
    left: int,
    right: int,
    offs: int,
    depth: int,
    rows: int,
    columns: int,
    out: int,
    step: int,
    more: int,
    corner: int,
) -> None:
    """Packed rows times the panels of a strip of `columns`, added to out when `more`."""
    for p0 in range(0, columns, LANES):
        width, panel = min(LANES, columns - p0), right + p0 * depth
        for i0 in range(0, rows, ROWS):
            count, these = min(ROWS, rows - i0), left + i0 * depth
            place = out + i0 * step + p0
            if width == LANES:
                _multiply_panels(these, panel, offs, depth, count, place, step, more)
                continue
            _multiply_panels(these, panel, offs, depth, count, corner, LANES, 0)
            for i in range(count):
                for lane in range(width):
                    old = _word(place + lane) if more else 0
                    _put(old + _word(corner + i * LANES + lane), place + lane)
                place += step


@kernel(
    f"void({_IN}, {_AT}, UniTuple(int64, 3), {_IN}, {_AT}, int64, {_AT}, {_AT},"
    f"{_OUT}, {_AT}, int64, int64, UniTuple(int64, 4), {_OUT}, {_OUT}, {_AT})"
)
def multiply(
    left: Words,
    left_at: Index,
    left_form: tuple[int, int, int],
    right: Words,
    right_at: Index,
    right_packed: int,
    offs: Index,
    base: Index,
    out: Words,
    out_at: Index,
    step: int,
    height: int,
    tile: tuple[int, int, int, int],
    block: Words,
    strip: Words,
    in_strip: Index,
) -> None:
    """Rows row0:row1 of products item0:item1; row i of item t goes to out[out_at[t] + i·step :].

    left_form: packed or not, and if not the steps of rows and columns.
    Shapes: `height` rows per item, len(offs) deep, len(base) wide; row0 is a multiple of ROWS.
    Scratch: `block` for packed rows (none if left is), `strip` of STRIP_WORDS. in_strip: k·LANES.
    """
    left_packed, row_step, col_step = left_form
    item0, item1, row0, row1 = tile
    deep, wide = len(offs), len(base)
    panels = (wide + LANES - 1) // LANES * LANES
    corner = _place(strip) + KC * STRIP
    for item in range(item0, item1):
        source = _place(right) + right_at[item]
        for i0 in range(row0, row1, ROWS_L2):
            rows = min(ROWS_L2, row1 - i0)
            few = rows <= FEW_ROWS and deep <= FEW_DEEP
            for k0 in range(0, deep, KC):
                depth = min(KC, deep - k0)
                lhs = _place(left) + left_at[item]
                if left_packed:
                    lhs += k0 * height + i0 * depth
                else:
                    lhs += i0 * row_step + k0 * col_step
                    _pack_rows(lhs, row_step, col_step, rows, depth, _place(block))
                    lhs = _place(block)
                for p0 in range(0, wide, LANES if few else STRIP):
                    p1 = min(wide, p0 + (LANES if few else STRIP))
                    place = _place(out) + out_at[item] + i0 * step + p0
                    rhs, table = source + k0 * panels + p0 * depth, _place(in_strip)
                    if not right_packed and few and _neighbours(base, p0, p1):
                        rhs, table = source + base[p0], _place(offs) + k0
                    elif not right_packed:
                        rhs = _place(strip)
                        _gather(source, _place(offs) + k0, base, p0, p1, depth, rhs)
                    _meet(lhs, rhs, table, depth, rows, p1 - p0, place, step, k0, corner)
