"""Products of one or two rows: nothing is packed, as it would be read but once.

Depthwise convolutions and products by a single row. Neighbours in the output are neighbours in the
right operand, in runs: `high` runs of `wide` columns, one every `step` words. Runs that lie close
together, as the rows of a small image, are computed as one, and the words between them dropped.
"""

from __future__ import annotations

import numpy as np

from mpcserve.kernels.linear_micro import AT, IN, OUT, Index, both
from mpcserve.kernels.linear_panels import added
from mpcserve.kernels.places import Place, on, part, place_of
from mpcserve.ring import Words

ROWS_MAX = 2
"""More rows are worth gathering panels for."""

RUN_WORDS = 2048
"""Words of sums at a time: 16 KiB, half a first-level cache."""

Runs = tuple[int, int, int]
"""high, wide, step."""


@part
def _sum(
    source: Place, offs: Place, factors: Place, factor_step: int, deep: int, out: Place, count: int
) -> None:
    """out[x] = Σ_k factors[k·factor_step] · source[offs[k] + x]."""
    first, by = on(source, offs[0]), factors[0]
    for x in range(count):
        out[x] = added(first[x] ^ first[x], by, first[x])
    for k in range(1, deep - 2, 3):
        a, b, c = on(source, offs[k]), on(source, offs[k + 1]), on(source, offs[k + 2])
        by_a, by_b = factors[k * factor_step], factors[(k + 1) * factor_step]
        by_c = factors[(k + 2) * factor_step]
        for x in range(count):
            out[x] = added(added(added(out[x], by_a, a[x]), by_b, b[x]), by_c, c[x])
    for k in range(1 + (deep - 1) // 3 * 3, deep):
        a, by = on(source, offs[k]), factors[k * factor_step]
        for x in range(count):
            out[x] = added(out[x], by, a[x])


@both(
    *(IN, AT, IN, AT, AT, OUT, AT, OUT),
    *("UniTuple(int64, 2)", "UniTuple(int64, 3)", "UniTuple(int64, 3)", "UniTuple(int64, 4)"),
)
def multiply_runs(
    left: Words,
    left_at: Index,
    right: Words,
    right_at: Index,
    offs: Index,
    out: Words,
    out_at: Index,
    scratch: Words,
    left_steps: tuple[int, int],
    sizes: tuple[int, int, int],
    runs: tuple[int, int, int],
    tile: tuple[int, int, int, int],
) -> None:
    """As `linear_micro.multiply`. left_steps: of rows and columns. sizes: depth, step of `out`,
    where in the right operand the first run begins. scratch: RUN_WORDS, or `wide` if that is more.
    """
    row_step, col_step = left_steps
    deep, out_step, base = sizes
    high, wide, step = runs
    item0, item1, row0, row1 = tile
    taps, sums = place_of(offs, 0), place_of(scratch, 0)
    dense = step == wide
    several = max(1, RUN_WORDS // step) if step < 2 * wide else 1
    total, unit = (high * wide, RUN_WORDS) if dense else (high, several)
    for item in range(item0, item1):
        source = place_of(right, right_at[item] + base)
        for i in range(row0, row1):
            factors = place_of(left, left_at[item] + i * row_step)
            to = place_of(out, out_at[item] + i * out_step)
            for first in range(0, total, unit):
                count = min(unit, total - first)
                begin, words, place = first * step, (count - 1) * step + wide, sums
                if dense:
                    begin, words, place = first, count, on(to, first)
                _sum(on(source, begin), taps, factors, col_step, deep, place, words)
                for y in range(0 if dense else count):
                    run, row = on(sums, y * step), on(to, (first + y) * wide)
                    for x in range(wide):
                        row[x] = run[x]


def scratch_for(runs: Runs, dtype: np.dtype[np.unsignedinteger]) -> Words:
    """What `multiply_runs` needs."""
    return np.empty(max(RUN_WORDS, runs[1]), dtype)
