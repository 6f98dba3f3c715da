"""Softmax and its logarithm over one axis, and attention: softmax times values.

Where the range of x is narrow, no maximum is needed: e^(x − centre) is right relatively, however
small; from a power of e^2 on it is made by squaring a smaller one. Else the maximum is subtracted
first. What a public mask hides is neither compared nor computed.
"""

from __future__ import annotations

from math import ceil, floor, log, log2
from math import exp as e_to
from typing import NamedTuple

import numpy as np

from mpcserve.compiler.builder import Builder, Ref
from mpcserve.compiler.ends import ONE_CHUNK
from mpcserve.compiler.functions import aligned, with_frac_bits
from mpcserve.compiler.masking import Layout, Mask, Rows, layout_of, no_mask
from mpcserve.compiler.roots import divide, logarithm, reciprocal
from mpcserve.compiler.smooth import SMALL_TOP, exp

NARROW = 16.5
"""Ranges up to here need no maximum."""

DIRECT = 6.0
"""Up to here e^x is made at once, with e^2 at the top; beyond, the range is centred and squared."""

FINE_BITS = 22
"""Fraction bits of e^(x − centre), which may be as small as e^−8."""

FEWEST_STEPS, MOST_STEPS = 1, 4
"""Fraction bits among which maxima are found."""

INVERSE_BITS = 4
"""Fraction bits, beyond the usual, of 1 / Σ: 1/128 then errs by 6e-5 of itself."""

SPARE_BITS = 4
"""Fraction bits that the smallest e^(x − centre) may have fewer than usual, relative to itself."""

WIDEST_SUM = 56
"""Bits of Σ e^x·v, before truncation, up to which the sum is divided and not each e^x."""


class _Powers(NamedTuple):
    """(e^t of what takes part, Σ e^t per row with parts, t), t = x − centre or x − maximum."""

    parts: Ref
    total: Ref
    shifted: Ref
    by_maximum: bool


def softmax(b: Builder, x: Ref, axis: int, mask: Mask | None = None) -> Ref:
    """e^x / Σ e^x. Error: 1e-4. Rounds: 7 to 10 for a narrow range; else 8 and the maximum's."""
    moved, layout, rows = _laid_out(b, x, axis, mask)
    p = _powers(b, moved, rows)
    y = b.within(divide(b, p.parts, p.total, 1.0, rows.spread), -(2.0**-12), 1.0 + 2.0**-12)
    y = rows.placed(b, y, rows.fill / rows.kept.shape[1])
    return _turned(b, layout.back(b, y), axis)


def log_softmax(b: Builder, x: Ref, axis: int) -> Ref:
    """x − log Σ e^x. Error: 2e-4. Rounds: 7 to 9 for a narrow range; else 7 and the maximum's."""
    moved, layout, rows = _laid_out(b, x, axis, None)
    p = _powers(b, moved, rows)
    logs = with_frac_bits(b, logarithm(b, p.total), p.shifted.frac_bits)
    y = b.sub(p.shifted, rows.spread(b, logs))
    held = b.interval(x)
    y = b.within(y, -(held.most - held.least) - log(x.shape[axis]) - 0.01, 0.01)
    return _turned(b, layout.back(b, y), axis)


def log_sum_exp(b: Builder, x: Ref, axis: int) -> Ref:
    """log Σ e^x, the axis kept with length 1. Error: 2e-4. Rounds: as `log_softmax`."""
    x = with_frac_bits(b, x, b.frac_bits)
    moved, layout, rows = _laid_out(b, x, axis, None)
    p = _powers(b, moved, rows)
    offset = b.sub(b.slice(moved, 1, 0, 1), b.slice(p.shifted, 1, 0, 1))
    held = b.interval(x)
    y = b.add(logarithm(b, p.total), offset)
    y = b.within(y, held.least - 0.01, held.most + log(x.shape[axis]) + 0.01)
    return _turned(b, layout.back(b, y), axis)


def attend(b: Builder, scores: Ref, values: Ref, mask: Mask | None = None) -> Ref:
    """softmax(scores) @ values over the last axis; the sum is divided, not each of its terms.

    Error: 1e-4 of the largest value. Rounds: as `softmax`, the product included.
    Shapes: … × S × L, … × L × D → … × S × D.
    """
    moved, layout, rows = _laid_out(b, scores, len(scores.shape) - 1, mask)
    p = _powers(b, moved, rows)
    held, count = b.interval(values), scores.shape[-1]
    widest = log2(max(b.interval(p.parts).most * count * held.magnitude, 1.0))
    if widest + p.parts.frac_bits + values.frac_bits > WIDEST_SUM:
        return b.matmul(softmax(b, scores, len(scores.shape) - 1, mask), values)
    y = b.matmul(layout.back(b, rows.placed(b, p.parts, rows.fill)), values)
    total = layout.back(b, _every_total(b, p.total, rows))
    least, most = min(held.least, 0.0), max(held.most, 0.0)
    if p.by_maximum:
        inverse = reciprocal(b, total, b.frac_bits + INVERSE_BITS)
        y = b.mul(y, inverse)
    else:
        y = divide(b, y, total, held.magnitude)
    slack = 2.0**-10 * max(held.magnitude, 2.0**-4)
    return b.within(y, least - slack, most + slack)


def _laid_out(b: Builder, x: Ref, axis: int, mask: Mask | None) -> tuple[Ref, Layout, Rows]:
    """x as A × rows·n, with what the mask adds to it."""
    mask = mask or no_mask()
    x = with_frac_bits(b, _turned(b, x, axis), b.frac_bits)
    layout, rows = layout_of(x.shape, mask)
    if np.any(mask.bias):
        x = b.add(*aligned(b, x, b.expand(b.weight(mask.bias), x.shape)))
    return layout.flat(b, x), layout, rows


def _turned(b: Builder, x: Ref, axis: int) -> Ref:
    """The axis swapped with the last one."""
    order = list(range(len(x.shape)))
    order[axis], order[-1] = order[-1], order[axis]
    return b.transpose(x, order)


def _powers(b: Builder, x: Ref, rows: Rows) -> _Powers:
    x = rows.gathered(b, x)
    held = b.interval(x)
    spread = held.most - held.least
    narrow = spread <= NARROW
    if narrow:
        top = SMALL_TOP if spread <= DIRECT else spread / 2
        t = b.offset(x, top - held.most)
        fine = b.frac_bits - SPARE_BITS + ceil((spread - top) / log(2.0))
        powers = exp(b, t, max(min(fine, FINE_BITS), b.frac_bits), direct=SMALL_TOP)
    else:
        t = _below_maximum(b, x, rows, spread)
        powers = exp(b, t)
    off = None if narrow else b.interval(t).most
    return _Powers(powers, _total(b, powers, rows, off), t, not narrow)


def _below_maximum(b: Builder, x: Ref, rows: Rows, spread: float) -> Ref:
    """x less about the largest of its row: softmax ignores what is taken from a whole row.

    So maxima are found among a few high bits of x, which errs by a step and a half.
    """
    bits = min(max(floor(log2(ONE_CHUNK / spread)), FEWEST_STEPS), MOST_STEPS)
    coarse = b.shift(x, x.frac_bits - bits)
    # Extended once per row: else every level of the tournament would carry the bits of x.
    highest = with_frac_bits(b, b.extend(rows.maximum(b, coarse)), x.frac_bits)
    off = 1.5 * 2.0**-bits
    return b.within(b.sub(x, rows.spread(b, highest)), -spread - off, off)


def _total(b: Builder, powers: Ref, rows: Rows, off: float | None) -> Ref:
    """Σ e^t of each row with parts; `off`: by how much the largest t may be below 0.

    Shapes: A × rows with parts.
    """
    count, length = rows.kept.shape
    dense = rows.placed(b, powers, np.zeros(rows.kept.shape))
    total = b.sum(b.reshape(dense, (powers.shape[0], count, length)), [2])
    total = b.gather(total, 1, np.flatnonzero(rows.kept.any(axis=1)).tolist())
    held, fewest, most = b.interval(powers), min(rows.counts), max(rows.counts)
    slack = most * 2.0 ** (2 - b.frac_bits)
    if off is not None:
        return b.within(total, e_to(-off) - slack, most * (e_to(off) + 2.0**-10) + slack)
    return b.within(total, fewest * held.least, most * held.most)


def _every_total(b: Builder, total: Ref, rows: Rows) -> Ref:
    """The same for every row: the length of a uniform one, 1 where nothing takes part."""
    full = np.where(rows.fill[:, :1] > 0, float(rows.kept.shape[1]), 1.0)
    parts = np.asarray(rows.kept.any(axis=1, keepdims=True))
    return Rows(parts, full).placed(b, total, full)
