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
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from numpy.typing import NDArray

from mpcserve.kernels.jit import kernel
from mpcserve.ring import U64, Words

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
ROWS_L2 = 96  # rows that meet one panel: ROWS_L2 · KC words are 192 or 384 KiB of L2 cache
FEW_ROWS = 4  # up to here a panel is read where it lies: copying it would cost more than it saves
PANEL_WORDS = KC * LANES + ROWS * LANES  # a gathered panel and one tile of cut-off columns

_ZERO = U64(0)
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


class _Pointers:
    """IR for loads and stores relative to an array's word."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder

    def word(self, base: ir.Value, index: ir.Value) -> ir.Value:
        return self.builder.load(self.builder.gep(base, [index]), align=8)

    def lanes(self, base: ir.Value, index: ir.Value) -> ir.Value:
        return self.builder.load(self._vector(base, index), align=8)

    def put(self, value: ir.Value, base: ir.Value, index: ir.Value) -> None:
        self.builder.store(value, self._vector(base, index), align=8)

    def _vector(self, base: ir.Value, index: ir.Value) -> ir.Value:
        return self.builder.bitcast(self.builder.gep(base, [index]), _LANES.as_pointer())

    def splat(self, word: ir.Value) -> ir.Value:
        undef = ir.Constant(_LANES, ir.Undefined)
        first = self.builder.insert_element(undef, word, ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        return self.builder.shuffle_vector(first, undef, zeros)


def _rows_loop(builder: ir.IRBuilder, rows: int, data: list[ir.Value], at: dict[str, Any]) -> None:
    """IR: `rows` rows of the left panel against the right one; ends in the current block."""
    left, right, offs, out = data
    ptr = _Pointers(builder)
    one, count = ir.Constant(_WORD, 1), ir.Constant(_WORD, rows)
    before = builder.block
    loop = builder.append_basic_block(f"rows{rows}")
    after = builder.append_basic_block(f"rows{rows}.end")
    builder.cbranch(builder.icmp_signed(">", at["depth"], ir.Constant(_WORD, 0)), loop, after)
    zero = ir.Constant(_LANES, [0] * LANES)

    builder.position_at_end(loop)
    k = builder.phi(_WORD)
    sums = [[builder.phi(_LANES) for _ in range(_Sums.parts)] for _ in range(rows)]
    here = builder.add(at["right"], ptr.word(offs, builder.add(at["offs"], k)))
    vector = _Sums.prepare(builder, ptr.lanes(right, here))
    column = builder.add(at["left"], builder.mul(k, count))
    new = []
    for row in range(rows):
        scalar = ptr.word(left, builder.add(column, ir.Constant(_WORD, row)))
        new.append(_Sums.add(builder, sums[row], ptr.splat(scalar), vector))
    following = builder.add(k, one)
    builder.cbranch(builder.icmp_signed("<", following, at["depth"]), loop, after)
    k.add_incoming(ir.Constant(_WORD, 0), before)
    k.add_incoming(following, loop)

    builder.position_at_end(after)
    for row in range(rows):
        total = []
        for part in range(_Sums.parts):
            sums[row][part].add_incoming(zero, before)
            sums[row][part].add_incoming(new[row][part], loop)
            end = builder.phi(_LANES)
            end.add_incoming(zero, before)
            end.add_incoming(new[row][part], loop)
            total.append(end)
        new[row] = total
    for row in range(rows):
        place = builder.add(at["out"], builder.mul(at["step"], ir.Constant(_WORD, row)))
        value = _Sums.read(builder, new[row])
        old = builder.select(at["more"], ptr.lanes(out, place), zero)
        ptr.put(builder.add(old, value), out, place)


@_inline
def _multiply_panels(  # type: ignore[no-untyped-def]
    typingctx, left, left_at, right, right_at, offs, offs_at, depth, rows, out, out_at, step, more
):
    """out[out_at + i·step + j] = Σ_k left[left_at + k·rows + i] · right[right_at + offs[k] + j].

    j runs over the lanes, offs is read from offs_at on; it is added to out when `more` is not 0.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        data = [
            context.make_array(signature.args[i])(context, builder, value=args[i]).data
            for i in (0, 2, 4, 8)
        ]
        names = {"left": 1, "right": 3, "offs": 5, "depth": 6, "out": 9, "step": 10}
        at = {name: args[i] for name, i in names.items()}
        at["more"] = builder.icmp_signed("!=", args[11], ir.Constant(_WORD, 0))
        done = builder.append_basic_block("done")
        choice = builder.switch(args[7], done)
        for count in range(1, ROWS + 1):
            block = builder.append_basic_block(f"enter{count}")
            choice.add_case(ir.Constant(_WORD, count), block)
            builder.position_at_end(block)
            _rows_loop(builder, count, data, at)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    word = types.int64
    signature = types.void(left, word, right, word, offs, word, word, word, out, word, word, word)
    return signature, codegen


@_inline
def _copy_lanes(typingctx, source, at, out, out_at):  # type: ignore[no-untyped-def]
    """out[out_at : out_at + LANES] = source[at : at + LANES]."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        ptr = _Pointers(builder)
        source, out = (
            context.make_array(signature.args[i])(context, builder, value=args[i]).data
            for i in (0, 2)
        )
        ptr.put(ptr.lanes(source, args[1]), out, args[3])
        return context.get_dummy_value()

    return types.void(source, types.int64, out, types.int64), codegen


_IN = "Array(uint64, 1, 'C', readonly=True)"
_OUT = "uint64[::1]"
_AT = "int64[::1]"


@kernel(f"boolean({_AT}, int64, int64)")
def in_a_row(base: Index, p0: int, width: int) -> bool:
    """Are columns p0 : p0 + LANES neighbours in memory, and all there? (Steps are never < 0.)"""
    return width == LANES and base[p0 + LANES - 1] - base[p0] == LANES - 1


@kernel(f"void({_IN}, int64, {_AT}, int64, {_AT}, int64, int64, int64, {_OUT}, int64)")
def gather_panel(
    source: Words,
    at: int,
    offs: Index,
    k0: int,
    base: Index,
    p0: int,
    depth: int,
    width: int,
    out: Words,
    out_at: int,
) -> None:
    """out[out_at + k·LANES + lane] = source[at + offs[k0 + k] + base[p0 + lane]], 0 past width."""
    if in_a_row(base, p0, width):
        first = at + base[p0]
        for k in range(depth):
            _copy_lanes(source, first + offs[k0 + k], out, out_at + k * LANES)
        return
    for lane in range(width):
        first = at + base[p0 + lane]
        for k in range(depth):
            out[out_at + k * LANES + lane] = source[first + offs[k0 + k]]
    for lane in range(width, LANES):
        for k in range(depth):
            out[out_at + k * LANES + lane] = _ZERO


@kernel(f"void({_IN}, int64, int64, int64, int64, int64, {_OUT}, int64)")
def pack_rows(
    source: Words,
    at: int,
    row_step: int,
    col_step: int,
    rows: int,
    depth: int,
    out: Words,
    out_at: int,
) -> None:
    """Panels of up to ROWS rows, word (i, k) of a panel of r rows at k·r + i; rows·depth words."""
    for i0 in range(0, rows, ROWS):
        count = min(ROWS, rows - i0)
        start = out_at + i0 * depth
        for i in range(count):
            first = at + (i0 + i) * row_step
            for k in range(depth):
                out[start + k * count + i] = source[first + k * col_step]


@kernel(f"void({_IN}, int64, {_AT}, {_AT}, {_OUT}, int64)")
def pack_panels(source: Words, at: int, offs: Index, base: Index, out: Words, out_at: int) -> None:
    """The whole right operand, KC rows after KC rows, panel by panel; the last is filled up."""
    deep, wide = len(offs), len(base)
    for k0 in range(0, deep, KC):
        depth = min(KC, deep - k0)
        for p0 in range(0, wide, LANES):
            gather_panel(source, at, offs, k0, base, p0, depth, min(LANES, wide - p0), out, out_at)
            out_at += depth * LANES


@kernel(
    f"void({_IN}, int64, {_IN}, int64, {_AT}, int64, int64, int64, int64,"
    f"{_OUT}, int64, int64, int64, {_OUT})"
)
def _strip(
    left: Words,
    left_at: int,
    right: Words,
    right_at: int,
    offs: Index,
    offs_at: int,
    depth: int,
    rows: int,
    width: int,
    out: Words,
    out_at: int,
    step: int,
    more: int,
    corner: Words,
) -> None:
    """`rows` rows times one panel of `width` columns, added to out when `more`."""
    for i0 in range(0, rows, ROWS):
        count = min(ROWS, rows - i0)
        panel = left_at + i0 * depth
        place = out_at + i0 * step
        if width == LANES:
            _multiply_panels(
                left, panel, right, right_at, offs, offs_at, depth, count, out, place, step, more
            )
            continue
        _multiply_panels(
            left, panel, right, right_at, offs, offs_at, depth, count, corner, 0, LANES, 0
        )
        for i in range(count):
            for lane in range(width):
                old = out[place + i * step + lane] if more else _ZERO
                out[place + i * step + lane] = old + corner[i * LANES + lane]


@kernel(
    f"void({_IN}, {_AT}, int64, int64, int64, {_IN}, {_AT}, int64, {_AT}, {_AT},"
    f"{_OUT}, {_AT}, int64, int64, int64, int64, int64, int64, {_OUT}, {_OUT})"
)
def multiply(
    left: Words,
    left_at: Index,
    left_packed: int,
    row_step: int,
    col_step: int,
    right: Words,
    right_at: Index,
    right_packed: int,
    offs: Index,
    base: Index,
    out: Words,
    out_at: Index,
    step: int,
    height: int,
    item0: int,
    item1: int,
    row0: int,
    row1: int,
    block: Words,
    panel: Words,
) -> None:
    """Rows row0:row1 of products item0:item1; row i of item t goes to out[out_at[t] + i·step :].

    Shapes: `height` rows per item, len(offs) deep, len(base) wide; row0 is a multiple of ROWS.
    Scratch: `block` for packed rows (none if left_packed), `panel` of PANEL_WORDS.
    """
    deep, wide = len(offs), len(base)
    panels = (wide + LANES - 1) // LANES
    in_place = np.arange(0, KC * LANES, LANES)
    corner = panel[KC * LANES :]
    for item in range(item0, item1):
        for i0 in range(row0, row1, ROWS_L2):
            rows = min(ROWS_L2, row1 - i0)
            for k0 in range(0, deep, KC):
                depth = min(KC, deep - k0)
                if left_packed:
                    lhs, lhs_at = left, left_at[item] + k0 * height + i0 * depth
                else:
                    lhs, lhs_at = block, 0
                    first = left_at[item] + i0 * row_step + k0 * col_step
                    pack_rows(left, first, row_step, col_step, rows, depth, block, 0)
                for p0 in range(0, wide, LANES):
                    width = min(LANES, wide - p0)
                    rhs, rhs_at, table, t0 = panel, 0, in_place, 0
                    if right_packed:
                        rhs, rhs_at = right, right_at[item] + k0 * panels * LANES + p0 * depth
                    elif rows <= FEW_ROWS and in_a_row(base, p0, width):
                        rhs, rhs_at, table, t0 = right, right_at[item] + base[p0], offs, k0
                    else:
                        first = right_at[item]
                        gather_panel(right, first, offs, k0, base, p0, depth, width, panel, 0)
                    place = out_at[item] + i0 * step + p0
                    _strip(
                        lhs,
                        lhs_at,
                        rhs,
                        rhs_at,
                        table,
                        t0,
                        depth,
                        rows,
                        width,
                        out,
                        place,
                        step,
                        k0,
                        corner,
                    )
