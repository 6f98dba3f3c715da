"""Einsum and Det: transposes, sums and as few matrix products as there are pairs of factors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import comb, prod

import numpy as np

from mpcserve.compiler.builder import Builder, Operand, Ref
from mpcserve.compiler.functions import secret
from mpcserve.compiler.problems import Unsupported
from mpcserve.compiler.rearrange import picked, positions_of, shaped, transposed
from mpcserve.compiler.registry import lowers

Labels = tuple[int, ...]
"""One number per axis; axes of an ellipsis have negative ones, counted from the right."""

LARGEST_DET = 8
"""Matrices beyond need products of hundreds of minors, whose bounds no ring would hold."""


@lowers("Einsum", since=12)
def einsum(b: Builder, *xs: Operand, equation: str) -> Ref:
    """Any equation: one product per operand but the first; a diagonal or a sum is local."""
    labels, out = _parsed(equation, [len(x.shape) for x in xs])
    sizes: dict[int, int] = {}
    for x, names in zip(xs, labels, strict=True):
        for name, d in zip(names, x.shape, strict=True):
            sizes[name] = max(d, sizes.get(name, 1))
    factors = [_diagonal(b, x, names, sizes) for x, names in zip(xs, labels, strict=True)]
    while len(factors) > 1:
        (x, first), (y, second), *others = factors
        needed = {*out, *(n for _, names in others for n in names)}
        x, first = _summed(b, x, first, needed | set(second))
        y, second = _summed(b, y, second, needed | set(first))
        factors = [_product(b, (x, first), (y, second), needed, sizes), *others]
    x, names = _summed(b, *factors[0], set(out))
    present = tuple(n for n in out if n in names)
    result = secret(b, transposed(b, x, [names.index(n) for n in present]))
    result = b.reshape(result, [sizes[n] if n in names else 1 for n in out])
    return b.expand(result, [sizes[n] for n in out])


def _parsed(equation: str, ranks: Sequence[int]) -> tuple[list[Labels], Labels]:
    """(labels of each operand, labels of the result)."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        raise Unsupported(f"equation {equation!r} has {len(terms)} terms for {len(ranks)} operands")
    labels = [_named(term, rank) for term, rank in zip(terms, ranks, strict=True)]
    widest = max(sum(n < 0 for n in names) for names in labels)
    if arrow:
        return labels, _named(right, len(right.replace("...", "")) + widest * ("..." in right))
    letters = [n for names in labels for n in names if n >= 0]
    once = sorted(n for n in set(letters) if letters.count(n) == 1)
    return labels, (*range(-widest, 0), *once)


def _named(term: str, rank: int) -> Labels:
    head, dots, tail = term.partition("...")
    free = rank - len(head) - len(tail)
    if free < 0 or (free and not dots):
        raise Unsupported(f"equation term {term!r} does not fit {rank} axes")
    return (*map(ord, head), *range(-free, 0), *map(ord, tail))


def _diagonal(
    b: Builder, x: Operand, names: Labels, sizes: dict[int, int]
) -> tuple[Operand, Labels]:
    """Repeated labels once, and none that only repeats a single element."""
    distinct = tuple(dict.fromkeys(names))
    if len(distinct) < len(names):
        number = {n: k for k, n in enumerate(distinct)}
        axes = [number[n] for n in names]
        where = np.einsum(positions_of(x.shape), axes, list(range(len(distinct))))
        x = picked(b, x, np.asarray(where))
    kept = [k for k, n in enumerate(distinct) if x.shape[k] == sizes[n]]
    return shaped(b, x, [x.shape[k] for k in kept]), tuple(distinct[k] for k in kept)


def _summed(b: Builder, x: Operand, names: Labels, needed: set[int]) -> tuple[Operand, Labels]:
    """Axes that nothing else has are summed."""
    over = tuple(k for k, n in enumerate(names) if n not in needed)
    summed = b.sum(x, over) if isinstance(x, Ref) else x.sum(axis=over)
    return summed, tuple(n for n in names if n in needed)


def _product(
    b: Builder,
    left: tuple[Operand, Labels],
    right: tuple[Operand, Labels],
    needed: set[int],
    sizes: dict[int, int],
) -> tuple[Operand, Labels]:
    """Both factors as batches of matrices, multiplied."""
    (x, first), (y, second) = left, right
    both = [n for n in first if n in second]
    batch, inner = [n for n in both if n in needed], [n for n in both if n not in needed]
    rows = [n for n in first if n not in both]
    columns = [n for n in second if n not in both]
    result = (*batch, *rows, *columns)
    if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
        number = {n: k for k, n in enumerate({*first, *second})}
        axes = [[number[n] for n in names] for names in (first, second, result)]
        return np.einsum(x, axes[0], y, axes[1], axes[2]), result
    order = [[first.index(n) for n in (*batch, *rows, *inner)],
             [second.index(n) for n in (*batch, *inner, *columns)]]  # fmt: skip
    x, y = transposed(b, x, order[0]), transposed(b, y, order[1])
    lead = [sizes[n] for n in batch]
    height, depth, width = (prod(sizes[n] for n in group) for group in (rows, inner, columns))
    x = secret(b, shaped(b, x, (*lead, height, depth)))
    y = secret(b, shaped(b, y, (*lead, depth, width)))
    z = b.matmul(x, y) if inner or (rows and columns) else b.mul(x, y)
    return b.reshape(z, [sizes[n] for n in result]), result


@lowers("Det", since=11)
def det(b: Builder, x: Ref, /) -> Ref:
    """Determinants of n×n matrices by their minors, n ≤ 8.

    Rounds: n − 1, and what wide bounds ask for. Error: an ulp per round, times what follows.
    """
    n = x.shape[-1]
    if n > LARGEST_DET:
        raise Unsupported(f"of {n}×{n} matrices, supported is up to {LARGEST_DET}×{LARGEST_DET}")
    lead = x.shape[:-2]
    axis = len(lead)
    row = b.slice(x, axis, n - 1, n)
    minors = b.reshape(row, (*lead, n))
    known = {columns: k for k, columns in enumerate(combinations(range(n), 1))}
    for size in range(2, n + 1):
        subsets = list(combinations(range(n), size))
        row = b.reshape(b.slice(x, axis, n - size, n - size + 1), (*lead, n))
        which = np.array([c for subset in subsets for c in subset])
        signs = np.array([(-1) ** k for _ in subsets for k in range(size)])
        rest = [known[tuple(c for c in s if c != out)] for s in subsets for out in s]
        entries = b.combine(row, axis, which[None], signs[None])
        factors = b.gather(minors, axis, rest)
        products = b.matmul(
            b.reshape(entries, (*lead, len(subsets), 1, size)),
            b.reshape(factors, (*lead, len(subsets), size, 1)),
        )
        minors = b.reshape(products, (*lead, comb(n, size)))
        known = {columns: k for k, columns in enumerate(subsets)}
    return b.reshape(minors, lead)
