"""Public masks: which elements of a row take part in its maximum, its powers and its sum.

A mask is structure: what it hides is never computed. Elements that take part are gathered into one
long row, worked on there, and put back; all of that is local.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpcserve.compiler.builder import Builder, Ref
from mpcserve.compiler.functions import maximum_of, reduce_max
from mpcserve.compiler.problems import Unsupported

HIDDEN = -1000.0
"""A score this far below the largest mask of its row contributes e^−1000: nothing."""

ABSORBING = -1e8
"""In float32, a score added to this vanishes: a row of nothing else is uniform."""


@dataclass(frozen=True)
class Rows:
    """Rows of `kept.shape[1]` elements, of which some take part.

    `fill`: what stands for e^score where none is computed: 1 for all of a row that is uniform.
    """

    kept: NDArray[np.bool_]
    fill: NDArray[np.float64]

    @property
    def counts(self) -> list[int]:
        """Elements that take part, per row that has any."""
        found = self.kept.sum(axis=1)
        return [int(n) for n in found[found > 0]]

    def gathered(self, b: Builder, x: Ref) -> Ref:
        """What takes part, row after row. Shapes: A × rows·n → A × K."""
        return b.gather(x, 1, np.flatnonzero(self.kept).tolist())

    def spread(self, b: Builder, x: Ref) -> Ref:
        """A value per row with parts, for each part. Shapes: A × rows → A × K."""
        if len(self.counts) == 1:
            return b.expand(x, (x.shape[0], self.counts[0]))
        return b.gather(x, 1, np.repeat(np.arange(len(self.counts)), self.counts).tolist())

    def placed(self, b: Builder, x: Ref, fill: NDArray[np.float64]) -> Ref:
        """The inverse of `gathered`, with public numbers elsewhere. Shapes: A × K → A × rows·n."""
        levels, which = np.unique(fill[~self.kept], return_inverse=True)
        for level in levels:
            x = b.pad(x, (0, 0), (0, 1), float(level))
        where = np.empty(self.kept.size, np.int64)
        kept = self.kept.ravel()
        count = int(kept.sum())
        where[kept] = np.arange(count)
        where[~kept] = count + which
        return b.gather(x, 1, where.tolist())

    def maximum(self, b: Builder, x: Ref) -> Ref:
        """Of each row's parts. Shapes: A × K → A × rows with parts.

        Cost: as of `reduce_max`, comparisons of what takes part alone.
        """
        parts = self.counts
        if len(set(parts)) == 1:
            dense = b.reshape(x, (x.shape[0], len(parts), parts[0]))
            return b.reshape(reduce_max(b, dense, 2), (x.shape[0], len(parts)))
        ends = np.cumsum(parts)
        held = [np.arange(e - n, e) for e, n in zip(ends, parts, strict=True)]
        while max(map(len, held)) > 1:
            x, held = _round(b, x, held)
        return b.gather(x, 1, [int(row[0]) for row in held])


def _round(b: Builder, x: Ref, held: list[NDArray[np.int64]]) -> tuple[Ref, list[Any]]:
    """One level of every row's tournament: groups of the strategy's size, the rest goes on."""
    parts, start = [x], x.shape[1]
    rows: list[list[int]] = [[] for _ in held]
    for size in range(2, b.group + 1):
        own = [k for k, row in enumerate(held) if min(b.group, len(row)) == size]
        slots: list[list[int]] = [[] for _ in range(size)]
        for k in own:
            part = len(held[k]) // size
            for s in range(size):
                slots[s] += held[k][s * part : (s + 1) * part].tolist()
            rows[k] = [*range(start, start + part), *held[k][size * part :].tolist()]
            start += part
        if own:
            parts.append(maximum_of(b, [b.gather(x, 1, slot) for slot in slots]))
    for k, row in enumerate(held):
        rows[k] = rows[k] or row.tolist()
    order = [i for row in rows for i in row]
    ends = np.cumsum([len(row) for row in rows])
    again = [np.arange(e - len(r), e) for e, r in zip(ends, rows, strict=True)]
    return b.gather(b.concat(parts, 1), 1, order), again


@dataclass(frozen=True)
class Mask:
    """A mask over a tensor: booleans that broadcast to it, and what is added to what is left."""

    kept: NDArray[np.bool_]
    uniform: NDArray[np.bool_]
    bias: NDArray[np.float64]

    def hiding(self, hidden: NDArray[np.bool_]) -> Mask:
        """The same, with more hidden."""
        kept = self.kept & ~hidden
        return Mask(kept, self.uniform & kept.any(axis=-1, keepdims=True), self.bias)


def no_mask() -> Mask:
    """Of a tensor all of whose elements take part."""
    return mask_of(np.zeros((1,)))


def mask_of(added: NDArray[np.floating]) -> Mask:
    """A constant that is added to scores before their softmax over the last axis.

    Softmax ignores what is added to a whole row, so each row's largest number is taken from it.
    What is far below that is hidden. A row of nothing but huge negative numbers is uniform; one of
    nothing but −∞ has no part at all.
    """
    values = np.asarray(added, np.float64)
    highest = values.max(axis=-1, keepdims=True)
    none = np.isneginf(highest)
    with np.errstate(invalid="ignore"):
        relative = np.where(none, -np.inf, values - highest)
    kept = relative > HIDDEN
    uniform = ~none & (highest <= ABSORBING)
    return Mask(kept, uniform, np.where(kept, relative, 0.0))


@dataclass(frozen=True)
class Layout:
    """A tensor whose rows lie along its last axis, as A × rows·n: axes along which the mask varies
    come last, so that all others share its structure."""

    order: tuple[int, ...]
    shape: tuple[int, ...]
    shared: int

    def flat(self, b: Builder, x: Ref) -> Ref:
        """A × rows·n."""
        return b.reshape(b.transpose(x, self.order), (self.shared, prod(self.shape) // self.shared))

    def back(self, b: Builder, y: Ref) -> Ref:
        """A × rows·m → the axes of x, m in place of the last."""
        last = prod(y.shape) // prod(self.shape[:-1])
        return b.transpose(b.reshape(y, (*self.shape[:-1], last)), np.argsort(self.order).tolist())


def layout_of(shape: tuple[int, ...], mask: Mask) -> tuple[Layout, Rows]:
    """How a tensor of `shape` is laid out for its mask. Raises: Unsupported if it hides all."""
    rank = len(shape)
    kept, uniform = (_ranked(m, rank) for m in (mask.kept, mask.uniform))
    still = [a for a in range(rank - 1) if kept.shape[a] == 1]
    order = [*still, *(a for a in range(rank - 1) if a not in still), rank - 1]
    inner = tuple(shape[a] for a in order[len(still) :])
    kept, uniform = (
        m.transpose(order).reshape([m.shape[a] for a in order[len(still) :]])
        for m in (kept, uniform)
    )
    rows = prod(inner[:-1])
    fill = np.broadcast_to(uniform, (*inner[:-1], 1)).reshape(rows)
    found = Rows(
        np.broadcast_to(kept, inner).reshape(rows, inner[-1]) & ~fill[:, None],
        np.broadcast_to(fill[:, None].astype(np.float64), (rows, inner[-1])),
    )
    if not found.kept.any():
        raise Unsupported("its mask hides everything", "remove the node")
    new = tuple(shape[a] for a in order)
    return Layout(tuple(order), new, prod(new[: len(still)])), found


def _ranked(m: NDArray[np.bool_], rank: int) -> NDArray[np.bool_]:
    return m.reshape((1,) * (rank - m.ndim) + m.shape)
