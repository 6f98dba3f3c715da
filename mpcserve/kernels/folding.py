"""The innermost step of a comparison: the low bits of a chunk, folded without a table in memory.

Written in LLVM IR, because a loop over the words of a row writes every table back: for all that
LLVM knows rows may overlap. It goes depth first through the subsets, so that of a chunk of five
bits a handful of vectors is held at once. LLVM splits vectors that the machine does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

from mpcserve.kernels.bits import BLOCK
from mpcserve.kernels.places import inline

LOW = 5
"""Most bits that are folded so."""
LANES = 8
"""Words that are folded at once."""

_INDEX = ir.IntType(64)

_Row = Callable[[int], ir.Value]


class _Words:
    """So many words at a place."""

    def __init__(self, builder: ir.IRBuilder, lanes: int) -> None:
        self._builder, self.kind = builder, ir.VectorType(_INDEX, lanes)

    def load(self, place: ir.Value, n: ir.Value) -> ir.Value:
        """Those from word n on."""
        return self._builder.load(self._at(place, n), align=8)

    def store(self, words: ir.Value, place: ir.Value) -> None:
        """Inverse of `load`, for n = 0."""
        self._builder.store(words, self._at(place, _INDEX(0)), align=8)

    def _at(self, place: ir.Value, n: ir.Value) -> ir.Value:
        return self._builder.bitcast(self._builder.gep(place, [n]), self.kind.as_pointer())


def _folded(
    builder: ir.IRBuilder, clear: Sequence[ir.Value], s: int, row: _Row
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """lt[s], eq[s] and λ_s, after the bits whose complements are `clear`; row(S) is λ_S."""
    *lower, no = clear
    if not lower:
        alone, high = row(2 * s), row(2 * s + 1)
        return builder.and_(no, high), builder.xor(builder.and_(no, alone), high), alone
    lt0, eq0, alone = _folded(builder, lower, 2 * s, row)
    lt1, eq1, with_k = _folded(builder, lower, 2 * s + 1, row)
    lt = builder.xor(builder.and_(no, builder.xor(with_k, lt0)), lt1)
    return lt, builder.xor(builder.and_(no, eq0), eq1), alone


def _fold(lanes: int) -> Callable[..., Any]:
    """Code that sets lt[0] and eq[0], and so many words on, as `compare._compare` says.

    For 1 to LOW bits. Bit k of Δ is delta[k·BLOCK], λ_∅ is empty[0], λ_S is mono[(S − 1)·stride].
    """

    def fold(typingctx, delta, empty, mono, stride, bits, lt, eq):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            delta, empty, mono, stride, bits, lt, eq = args
            words = _Words(builder, lanes)
            ones = ir.Constant(words.kind, [-1] * lanes)

            def row(s: int) -> ir.Value:
                if s == 0:
                    return words.load(empty, _INDEX(0))
                return words.load(mono, builder.mul(stride, _INDEX(s - 1)))

            done = builder.append_basic_block("folded")
            chosen = builder.switch(bits, done)
            for count in range(1, LOW + 1):
                block = builder.append_basic_block(f"fold.{count}")
                chosen.add_case(_INDEX(count), block)
                builder.position_at_end(block)
                planes = [words.load(delta, _INDEX(k * BLOCK)) for k in range(count)]
                less, equal, _ = _folded(builder, [builder.xor(p, ones) for p in planes], 0, row)
                words.store(less, lt)
                words.store(equal, eq)
                builder.branch(done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        size = types.int64
        return types.void(delta, empty, mono, size, size, lt, eq), codegen

    return cast(Callable[..., Any], inline(fold))


fold_lanes, fold_word = _fold(LANES), _fold(1)
