"""Ensembles of trees, whose features, thresholds, shape and scores all stay secret.

Every test of every tree is a column of one product with a secret one-hot matrix, from which a
secret threshold is subtracted; all comparisons are one batch. What then finds the leaf is either

    complete   each tree padded to a complete one of a declared depth: a leaf is the AND of the bits
               on its path, at public places
    by leaves  each tree padded to a declared number of leaves: the tests that a path wants are the
               entries of a secret matrix, and a leaf is reached where all of them hold

The plan shows the number of trees, features and targets, and the padding: a depth, or numbers of
comparisons and leaves, and the bits that count the tests of a path. It shows nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mpcserve.compiler.builder import Array, Builder, Ref
from mpcserve.compiler.forest import Forest, Test, forest_of_nodes, forest_of_roots
from mpcserve.compiler.functions import aligned, maximum, minimum
from mpcserve.compiler.padding import Padding, padding_of
from mpcserve.compiler.problems import Unsupported
from mpcserve.compiler.registry import lowers

ML = "ai.onnx.ml"
AGGREGATES = ("AVERAGE", "SUM", "MIN", "MAX")
"""In the order of their numbers in TreeEnsemble."""

MOST_PATHS = 1 << 27
"""Entries of the matrices of paths: a gigabyte on each server."""

Reals = NDArray[np.float64]


@lowers("TreeEnsembleRegressor", since=1, domain=ML)
def tree_ensemble_regressor(
    b: Builder,
    x: Ref,
    /,
    *,
    aggregate_function: str = "SUM",
    base_values: Sequence[float] = (),
    base_values_as_tensor: Array | None = None,
    n_targets: int = 1,
    nodes_falsenodeids: Sequence[int] = (),
    nodes_featureids: Sequence[int] = (),
    nodes_hitrates: Sequence[float] = (),
    nodes_hitrates_as_tensor: Array | None = None,
    nodes_missing_value_tracks_true: Sequence[int] = (),
    nodes_modes: Sequence[str] = (),
    nodes_nodeids: Sequence[int] = (),
    nodes_treeids: Sequence[int] = (),
    nodes_truenodeids: Sequence[int] = (),
    nodes_values: Sequence[float] = (),
    nodes_values_as_tensor: Array | None = None,
    post_transform: str = "NONE",
    target_ids: Sequence[int] = (),
    target_nodeids: Sequence[int] = (),
    target_treeids: Sequence[int] = (),
    target_weights: Sequence[float] = (),
    target_weights_as_tensor: Array | None = None,
) -> Ref:
    """Scores of trees, all of them secret: 6 to 9 rounds for any depth."""
    attrs = {k: v for k, v in locals().items() if k not in ("b", "x")}
    base = base_values if base_values_as_tensor is None else base_values_as_tensor
    return ensemble(b, x, forest_of_nodes(attrs), aggregate_function, np.ravel(base))


@lowers("TreeEnsemble", since=5, domain=ML)
def tree_ensemble(
    b: Builder,
    x: Ref,
    /,
    *,
    aggregate_function: int = 1,
    leaf_targetids: Sequence[int],
    leaf_weights: Array,
    membership_values: Array | None = None,
    n_targets: int | None = None,
    nodes_falseleafs: Sequence[int],
    nodes_falsenodeids: Sequence[int],
    nodes_featureids: Sequence[int],
    nodes_hitrates: Array | None = None,
    nodes_missing_value_tracks_true: Sequence[int] | None = None,
    nodes_modes: Array,
    nodes_splits: Array,
    nodes_trueleafs: Sequence[int],
    nodes_truenodeids: Sequence[int],
    post_transform: int = 0,
    tree_roots: Sequence[int],
) -> Ref:
    """Scores of trees, all of them secret: 6 to 9 rounds for any depth."""
    attrs = {k: v for k, v in locals().items() if k not in ("b", "x")}
    return ensemble(b, x, forest_of_roots(attrs), AGGREGATES[aggregate_function], np.zeros(0))


def ensemble(b: Builder, x: Ref, forest: Forest, aggregate: str, base: Reals) -> Ref:
    """rows × targets: the scores of the leaves that each row reaches, joined over the trees."""
    if forest.depth == 0:
        raise Unsupported("has no node that tests anything", "replace it by its constant")
    if aggregate not in AGGREGATES:
        raise Unsupported(f"has the aggregate function {aggregate!r}")
    padding = padding_of(forest, b.trees)
    hits = _complete(b, x, forest, padding) if padding.complete else _leaves(b, x, forest, padding)
    y = _scores(b, hits, _tables(forest, padding), aggregate)
    return b.add(*aligned(b, y, base[None, :])) if base.any() else y


def _compared(b: Builder, x: Ref, tests: Sequence[Sequence[tuple[int, float, bool]]]) -> Ref:
    """rows × trees × comparisons: the bits [x_feature > threshold]; ≥ where it is to be reached.

    `tests`: (feature, threshold, reached), of equal number for every tree.
    """
    held, ulp = b.interval(x), 2.0**-x.frac_bits
    low, high = held.least - 2 * ulp, held.most + 2 * ulp
    flat = [c for tree in tests for c in tree]
    chosen = np.zeros((x.shape[1], len(flat)))
    thresholds = np.zeros((1, len(flat)))
    for k, (feature, threshold, reached) in enumerate(flat):
        if not 0 <= feature < x.shape[1]:
            raise Unsupported(f"tests feature {feature} of {x.shape[1]}")
        chosen[feature, k] = 1.0
        thresholds[0, k] = np.clip(_on_grid(threshold, reached, x.frac_bits), low, high)
    matrix = b.weight(chosen, 0, span=(0.0, 1.0))
    cuts = b.weight(thresholds, x.frac_bits, span=(low, high))
    # −x, not x, is multiplied: so nothing tunes the fraction bits that the thresholds rest on.
    gaps = b.matmul(b.scale(x, -1), matrix, cuts, to=x.frac_bits)
    gaps = b.within(gaps, low - high, high - low)
    return b.reshape(b.sign(gaps), (x.shape[0], len(tests), len(tests[0])))


def _on_grid(threshold: float, reached: bool, frac_bits: int) -> float:
    """t on the grid of x, so that x > t, or x ≥ t where it is `reached`, is x > the result.

    Rounded as x is, it equals whatever equalled it; whole numbers are not rounded.
    """
    scaled = np.ldexp(threshold, frac_bits)
    if frac_bits:
        return float(np.ldexp(np.rint(scaled) - reached, -frac_bits))
    return float(np.ceil(scaled) - 1 if reached else np.floor(scaled))


def _plain(test: Test) -> tuple[int, float, bool]:
    (only,) = test.comparisons
    return test.feature, only.threshold, only.reached


ANY = (0, 0.0, False)
"""A comparison that pads a tree: its outcome makes no difference, as its bit is not used."""


def _complete(b: Builder, x: Ref, forest: Forest, padding: Padding) -> Ref:
    """rows × trees × leaves: the bits of the leaves that are reached, of complete trees."""
    depth = padding.depth
    nodes = (1 << depth) - 1
    tests = []
    for tree in forest.trees:
        placed = [ANY] * nodes
        for leaf in tree.leaves:
            place = 0
            for test, outcome in leaf.path:
                placed[place] = _plain(tree.tests[test])
                place = 2 * place + 1 + outcome
        tests.append(placed)
    bits = _compared(b, x, tests)
    both = b.concat([b.flip(bits), bits], 2)
    leaves, levels = np.arange(1 << depth), []
    for level in range(depth):
        before = leaves >> (depth - level)
        side = (leaves >> (depth - level - 1)) & 1
        levels.append(b.gather(both, 2, side * nodes + (1 << level) - 1 + before))
    return b.all(levels, [1] * depth)


def _leaves(b: Builder, x: Ref, forest: Forest, padding: Padding) -> Ref:
    """rows × trees × leaves: the bits of the leaves that are reached.

    A path is followed where its tests that want 1 add up to their number and the others to 0.
    """
    count = padding.comparisons
    if len(forest.trees) * count * padding.leaves > MOST_PATHS:
        raise Unsupported(
            f"has {len(forest.trees)} trees of up to {padding.leaves} leaves: their paths are "
            f"{len(forest.trees) * count * padding.leaves:.2g} secret numbers",
            "train fewer trees, or smaller ones (max_leaf_nodes, max_depth)",
        )
    tests, wants, starts = [], [], []
    for tree in forest.trees:
        flat = [(t, c) for t, test in enumerate(tree.tests) for c in test.comparisons]
        listed = [(tree.tests[t].feature, c.threshold, c.reached) for t, c in flat]
        tests.append(listed + [ANY] * (count - len(flat)))
        of_test = np.zeros((len(tree.tests), count))
        for k, (t, c) in enumerate(flat):
            of_test[t, k] = c.sign
        start = np.array([test.start for test in tree.tests])
        want = np.zeros((count, padding.leaves))
        missing = np.full((1, padding.leaves), -1.0)  # a padding leaf always lacks one
        for k, leaf in enumerate(tree.leaves):
            sides = np.zeros(len(tree.tests))
            for node, outcome in leaf.path:
                sides[node] += 1.0 if outcome else -1.0
            want[:, k] = sides @ of_test
            missing[0, k] = sides @ start - sum(outcome for _, outcome in leaf.path)
        wants.append(want)
        starts.append(missing)
    numbers = b.transpose(b.number(_compared(b, x, tests)), (1, 0, 2))
    most = float((1 << padding.path_bits) - 1)
    paths = b.weight(np.stack(wants), 0, span=(-most, most))
    offsets = b.weight(np.stack(starts), 0, span=(-most, most))
    lacking = b.within(b.matmul(numbers, paths, offsets, to=0), -most, 0.0)
    return b.transpose(b.flip(b.sign(lacking)), (1, 0, 2))


def _tables(forest: Forest, padding: Padding) -> Reals:
    """trees × leaves × targets: scores, repeated where a complete tree ends early."""
    scores = np.zeros((len(forest.trees), padding.leaves, forest.targets))
    for t, tree in enumerate(forest.trees):
        for k, leaf in enumerate(tree.leaves):
            if not padding.complete:
                scores[t, k] = leaf.scores
                continue
            free = padding.depth - len(leaf.path)
            first = 0
            for _, outcome in leaf.path:
                first = 2 * first + outcome
            scores[t, first << free : (first + 1) << free] = leaf.scores
    return scores


def _scores(b: Builder, hits: Ref, scores: Reals, aggregate: str) -> Ref:
    """rows × targets: the scores of the leaves that were hit, joined over the trees."""
    rows, trees, leaves = hits.shape
    targets = scores.shape[2]
    if aggregate == "AVERAGE":
        scores = scores / trees
    ends = scores.min(axis=1), scores.max(axis=1)
    largest = 2.0 ** np.ceil(np.log2(max(np.abs(scores).max(), 2.0**-b.frac_bits)))
    # So many small errors add up that each leaf has some bits more. Whole numbers have none: the
    # number of a leaf may be looked up next, and must not be a little less.
    fine = b.frac_bits + (int(trees).bit_length() + 1) // 2
    fine = 0 if np.all(scores == np.rint(scores)) else fine
    table = b.weight(scores, fine, span=(-largest, largest))
    joined = aggregate in ("SUM", "AVERAGE")
    if targets == 1:
        spread = b.expand(b.reshape(table, (1, trees, leaves)), hits.shape)
        found = b.select(hits, spread, when=1)
        each = b.reshape(b.sum(found, [1, 2] if joined else [2]), (rows, 1 if joined else trees, 1))
    elif joined:
        chosen = b.reshape(b.number(hits), (rows, trees * leaves))
        flat = b.reshape(table, (trees * leaves, targets))
        to = min(fine, b.frac_bits)
        each = b.reshape(b.matmul(chosen, flat, to=to), (rows, 1, targets))
    else:
        chosen = b.transpose(b.number(hits), (1, 0, 2))
        each = b.transpose(b.matmul(chosen, table, to=min(fine, b.frac_bits)), (1, 0, 2))
    slack = 2.0 ** (1 - b.frac_bits) if fine else 0.0
    low, high = (e.sum(axis=0) if joined else e for e in ends)
    shape = (1, -1, targets)
    each = b.within(each, low.reshape(shape) - slack, high.reshape(shape) + slack)
    each = b.shift(each, each.frac_bits - b.frac_bits) if each.frac_bits > b.frac_bits else each
    return b.reshape(each if joined else _extreme(b, each, aggregate), (rows, targets))


def _extreme(b: Builder, x: Ref, aggregate: str) -> Ref:
    """The largest or smallest along axis 1, by halves."""
    best = maximum if aggregate == "MAX" else minimum
    while (n := x.shape[1]) > 1:
        half = n // 2
        pair = best(b, b.slice(x, 1, 0, half), b.slice(x, 1, half, 2 * half))
        x = b.concat([pair, b.slice(x, 1, 2 * half, n)], 1) if n % 2 else pair
    return x
