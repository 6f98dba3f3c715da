"""How far trees are padded: what the plan tells of their shape."""

from __future__ import annotations

from dataclasses import dataclass

from mpcserve.compiler.forest import Forest
from mpcserve.compiler.problems import Unsupported

DEEPEST_COMPLETE = 10
"""Complete trees have at most 2^10 leaves."""

SIGNIFICANT = 3
"""Numbers of leaves are rounded up to this many bits: 33 to 40 become 40, 41 to 48 become 48."""


@dataclass(frozen=True, slots=True)
class TreeBounds:
    """What the plan may tell of trees; None: what they have, leaves rounded up."""

    depth: int | None = None
    leaves: int | None = None


@dataclass(frozen=True, slots=True)
class Padding:
    """Of every tree. `complete`: 2^depth leaves and the tests before them; else `comparisons`
    comparisons and `leaves` leaves behind at most 2^path_bits − 1 tests."""

    complete: bool
    depth: int
    comparisons: int
    leaves: int

    @property
    def path_bits(self) -> int:
        """Bits that count the tests of a path."""
        return self.depth.bit_length()


def padding_of(forest: Forest, declared: TreeBounds) -> Padding:
    """The smaller of the two. Raises: Unsupported when a tree is larger than declared."""
    depth = _at_least("depth", forest.depth, forest.depth, declared.depth)
    leaves = _at_least("leaves", forest.leaves, _rounded(forest.leaves), declared.leaves)
    comparisons = max(_rounded(max(t.comparisons for t in forest.trees)), leaves - 1)
    small = depth <= DEEPEST_COMPLETE and 1 << depth <= 2 * leaves
    if forest.simple and small:
        return Padding(True, depth, (1 << depth) - 1, 1 << depth)
    return Padding(False, depth, comparisons, leaves)


def _at_least(what: str, needed: int, usual: int, declared: int | None) -> int:
    if declared is None:
        return usual
    if declared < needed:
        raise Unsupported(
            f"has a tree with {what} {needed}, padded to {declared}", f"declare {needed} or more"
        )
    return declared


def _rounded(count: int) -> int:
    """Up to SIGNIFICANT bits."""
    spare = max(count.bit_length() - SIGNIFICANT, 0)
    return -(-count >> spare) << spare
