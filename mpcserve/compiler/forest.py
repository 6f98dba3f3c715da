"""Trees as tables: what each node tests, which outcomes lead to each leaf, what a leaf gives.

A test is a whole number, 0 where its node goes to the true branch and 1 where it goes to the false
one, made of comparisons [x > threshold]: one for inequalities, two for an equality, two for each
member of a set. NaN is not compared: the data owner's client refuses it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpcserve.compiler.graph import Graph
from mpcserve.compiler.problems import Unsupported

Reals = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Comparison:
    """`sign` · [x > threshold], or [x ≥ threshold] where it is `reached`."""

    sign: int
    threshold: float
    reached: bool = False


@dataclass(frozen=True, slots=True)
class Test:
    """`start` and the comparisons of one feature: 1 where the node goes to its false branch."""

    feature: int
    start: int
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True, slots=True)
class Leaf:
    """`path`: (test, outcome) from the root; `scores`: one per target."""

    path: tuple[tuple[int, int], ...]
    scores: Reals


@dataclass(frozen=True, slots=True)
class Tree:
    """Leaves in any order: exactly one of them is reached."""

    tests: tuple[Test, ...]
    leaves: tuple[Leaf, ...]

    @property
    def depth(self) -> int:
        """Most tests on a path."""
        return max(len(leaf.path) for leaf in self.leaves)

    @property
    def comparisons(self) -> int:
        """Of all its tests."""
        return sum(len(test.comparisons) for test in self.tests)


@dataclass(frozen=True, slots=True)
class Forest:
    """Trees of one ensemble; all have scores for the same targets."""

    trees: tuple[Tree, ...]
    targets: int

    @property
    def depth(self) -> int:
        """Of the deepest tree."""
        return max(tree.depth for tree in self.trees)

    @property
    def leaves(self) -> int:
        """Of the tree that has most."""
        return max(len(tree.leaves) for tree in self.trees)

    @property
    def simple(self) -> bool:
        """Whether every test is one comparison."""
        return all(
            test.start == 0 and len(test.comparisons) == 1
            for tree in self.trees
            for test in tree.tests
        )


def has_trees(graph: Graph) -> bool:
    """Whether some node is an ensemble of trees."""
    return any(node.op.startswith("TreeEnsemble") for node in graph.nodes)


def test_of(mode: str, feature: int, value: float, members: Sequence[float] = ()) -> Test:
    """What a node of a mode compares."""
    above, from_it = Comparison(1, value), Comparison(1, value, reached=True)
    below, until_it = Comparison(-1, value), Comparison(-1, value, reached=True)
    if mode == "BRANCH_MEMBER":
        each = [(Comparison(-1, v, reached=True), Comparison(1, v)) for v in members]
        return Test(feature, 1, tuple(c for pair in each for c in pair))
    found = {
        "BRANCH_LEQ": Test(feature, 0, (above,)),
        "BRANCH_LT": Test(feature, 0, (from_it,)),
        "BRANCH_GT": Test(feature, 1, (below,)),
        "BRANCH_GTE": Test(feature, 1, (until_it,)),
        "BRANCH_EQ": Test(feature, 1, (until_it, above)),
        "BRANCH_NEQ": Test(feature, 0, (from_it, below)),
    }
    if mode not in found:
        raise Unsupported(f"has a node of mode {mode!r}")
    return found[mode]


MODES = (
    *("BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ"),
    "BRANCH_MEMBER",
)
"""In the order of their numbers in TreeEnsemble."""

Child = tuple[str, int]
"""("node" or "leaf", its number)."""


def tree_of(
    root: Child,
    tests: Mapping[int, Test],
    children: Mapping[int, tuple[Child, Child]],
    scores: Mapping[int, Reals],
) -> Tree:
    """Walk from the root. `children`: (true, false) of each node."""
    places: dict[int, int] = {}
    used: list[Test] = []
    leaves: list[Leaf] = []
    left: list[tuple[Child, tuple[tuple[int, int], ...]]] = [(root, ())]
    while left:
        (kind, number), path = left.pop()
        if kind == "leaf":
            leaves.append(Leaf(path, scores[number]))
            continue
        if number in places:
            raise Unsupported("has a node with two parents")
        place = places[number] = len(used)
        test, (yes, no) = tests[number], children[number]
        if test.start and len(test.comparisons) == 1:
            # Not [x > t] is the same test with its branches exchanged.
            (only,) = test.comparisons
            turned = Comparison(-only.sign, only.threshold, only.reached)
            test, yes, no = Test(test.feature, 0, (turned,)), no, yes
        used.append(test)
        left += [(no, (*path, (place, 1))), (yes, (*path, (place, 0)))]
    return Tree(tuple(used), tuple(leaves))


def given(attrs: Mapping[str, Any], name: str) -> Any:
    """An attribute that may be a list or a tensor."""
    tensor = attrs.get(f"{name}_as_tensor")
    return np.ravel(attrs.get(name, ()) if tensor is None else tensor)


def forest_of_nodes(attrs: Mapping[str, Any]) -> Forest:
    """Of TreeEnsembleRegressor's attributes."""
    trees, nodes = attrs["nodes_treeids"], attrs["nodes_nodeids"]
    place = {key: k for k, key in enumerate(zip(trees, nodes, strict=True))}
    targets = int(attrs["n_targets"])
    scores = {k: np.zeros(targets) for k in range(len(nodes))}
    weights = given(attrs, "target_weights")
    keys = zip(attrs["target_treeids"], attrs["target_nodeids"], strict=True)
    for key, target, weight in zip(keys, attrs["target_ids"], weights, strict=True):
        scores[place[key]][target] += weight
    modes, values = attrs["nodes_modes"], given(attrs, "nodes_values")
    tests: dict[int, Test] = {}
    children: dict[int, tuple[Child, Child]] = {}

    def child(tree: int, node: int) -> Child:
        k = place[tree, node]
        return ("leaf" if modes[k] == "LEAF" else "node"), k

    for k, mode in enumerate(modes):
        if mode != "LEAF":
            tests[k] = test_of(mode, attrs["nodes_featureids"][k], float(values[k]))
            ends = attrs["nodes_truenodeids"][k], attrs["nodes_falsenodeids"][k]
            children[k] = (child(trees[k], ends[0]), child(trees[k], ends[1]))
    roots: dict[int, Child] = {}
    for tree, node in zip(trees, nodes, strict=True):
        roots.setdefault(tree, child(tree, node))
    return Forest(tuple(tree_of(r, tests, children, scores) for r in roots.values()), targets)


def forest_of_roots(attrs: Mapping[str, Any]) -> Forest:
    """Of TreeEnsemble's attributes."""
    targets = int(attrs.get("n_targets") or 1)
    scores = {}
    weights = np.ravel(attrs["leaf_weights"])
    for k, (target, weight) in enumerate(zip(attrs["leaf_targetids"], weights, strict=True)):
        scores[k] = np.zeros(targets)
        scores[k][target] = weight
    members = _sets(attrs.get("membership_values"))
    tests, children = {}, {}
    ends = [
        list(zip(attrs[f"nodes_{side}leafs"], attrs[f"nodes_{side}nodeids"], strict=True))
        for side in ("true", "false")
    ]
    splits = np.ravel(attrs["nodes_splits"])
    for k, number in enumerate(np.ravel(attrs["nodes_modes"])):
        mode = MODES[int(number)]
        chosen = members.pop(0) if mode == "BRANCH_MEMBER" else ()
        tests[k] = test_of(mode, attrs["nodes_featureids"][k], float(splits[k]), chosen)
        yes, no = (("leaf" if leaf else "node", int(to)) for leaf, to in (e[k] for e in ends))
        children[k] = (yes, no)
    # A tree that is one leaf is written as a node whose branches are the same leaf.
    roots: list[Child] = [("node", int(r)) for r in attrs["tree_roots"]]
    return Forest(tuple(tree_of(r, tests, children, scores) for r in roots), targets)


def _sets(values: Any) -> list[tuple[float, ...]]:
    """Sets are written one after the other, with a NaN behind each."""
    sets: list[tuple[float, ...]] = []
    members: list[float] = []
    for v in () if values is None else np.ravel(values):
        if np.isnan(v):
            sets.append(tuple(members))
            members = []
        else:
            members.append(float(v))
    return sets
