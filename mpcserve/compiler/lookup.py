"""Tables read at secret places: an embedding of token ids that only the data owner knows.

An integer input that is an index is shared as rows of which one element is 1: e_x. Then T[x] is the
product e_x @ T, which is exact, so that its ring is no wider than an entry of T. For a long table
the input is what costs; entries are then written with a few digits d_k, each of a narrow ring of
its own, in which e_x @ d_k is opened and then extended:

    T = Σ_k base^k·d_k,   |d_k| ≤ base / 2

The data owner sends as many bits per element of e_x as the widest digit has, and 2. The number x
itself is a local sum. An index that the servers computed is compared with every place of the table.

Source: one-hot selection as in CrypTen's embeddings; digits and extension are ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, floor, prod

import numpy as np
from numpy.typing import NDArray

from mpcserve.compiler.builder import Array, Builder, Ref
from mpcserve.compiler.functions import axis_of
from mpcserve.compiler.graph import Graph, Node
from mpcserve.compiler.problems import Unsupported
from mpcserve.plan.ops import packed_bytes

MOVES = frozenset(
    {"Cast", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Transpose", "Expand", "Concat", "Flatten"}
    | {"Identity", "Split", "Gather"}
)
"""Operators behind which an index is still an index, if it is their first input."""

MOST_DIGITS = 3
"""Every digit is a product with the whole table."""

MOST_COMPARED = 1 << 22
"""Comparisons that an index may take that is no input."""

ENTRY_BITS = 16
"""Fraction bits that an entry has at least: in a ring of its own it costs nobody else."""

WIDE_BITS = 24
"""About what an extended entry is opened with."""


def choices(graph: Graph) -> dict[str, int]:
    """Integer input → how many values it may take, for those that are an index of a table."""
    users = graph.uses()
    found: dict[str, int] = {}
    for i in graph.inputs:
        if np.dtype(i.dtype).kind not in "iu":
            continue
        lengths = [
            graph.shapes[node.inputs[0]][axis_of(node.attrs.get("axis", 0), rank)]
            for node, name in _readers(i.name, users)
            if node.op == "Gather"
            and node.inputs[1] == name
            and (rank := len(graph.shapes.get(node.inputs[0], ())))
        ]
        if lengths:
            found[i.name] = min(lengths)
    return found


def note_uses(graph: Graph) -> Graph:
    """The same graph; integer inputs whose use says so are known to be places of a table, or 0 or 1
    as attention masks are."""
    flags = _flags(graph)
    reaches = {k: (0.0, n - 1.0) for k, n in choices(graph).items()}
    reaches |= dict.fromkeys(flags, (0.0, 1.0))
    inputs = tuple(replace(i, reach=reaches.get(i.name, i.reach)) for i in graph.inputs)
    return replace(graph, inputs=inputs)


def _flags(graph: Graph) -> set[str]:
    users = graph.uses()
    return {
        i.name
        for i in graph.inputs
        if np.dtype(i.dtype).kind in "iu"
        and (readers := [*_readers(i.name, users)])
        and all(_as_flag(node, name, graph) for node, name in readers)
    }


def _readers(name: str, users: dict[str, list[Node]]) -> Iterator[tuple[Node, str]]:
    """(node, the name it reads) of what reads a value behind moves."""
    for node in users.get(name, ()):
        if node.op in MOVES and node.inputs[0] == name and node.attrs.get("to") != _BOOL:
            for output in node.outputs:
                yield from _readers(output, users)
        else:
            yield node, name


_BOOL = 9
"""TensorProto's."""


def _as_flag(node: Node, name: str, graph: Graph) -> bool:
    """Cast to bool, 1 − x, x = 0, x > 0 and the like."""
    if node.op == "Cast":
        return node.attrs.get("to") == _BOOL
    other = next((i for i in node.inputs if i != name), "")
    value = graph.constants.get(other)
    if value is None or value.size == 0:
        return False
    if node.op == "Sub":
        return node.inputs[1] == name and bool(np.all(value == 1))
    if node.op in ("Equal", "Greater", "Less"):
        return bool(np.all((value == 0) | (value == 1)))
    return False


def number_of(b: Builder, hot: Ref) -> Ref:
    """The numbers that rows of one 1 stand for: local."""
    count = hot.shape[-1]
    places = np.arange(count)[:, None]
    x = b.combine(hot, len(hot.shape) - 1, places, places)
    x = b.within(b.reshape(x, hot.shape[:-1]), 0.0, float(count - 1))
    b.choices[x.id] = hot
    return x


def looked_up(b: Builder, table: Array | Ref, index: Ref, axis: int) -> Ref:
    """The table's entries at a secret index along an axis. Error: none beyond the table's rounding.

    Cost: 1 round, 2 for a long table, and the digits' widths for the data owner to send.
    """
    axis = axis_of(axis, len(table.shape))
    count = table.shape[axis]
    hot = one_hot(b, index, count)
    hot = b.reshape(hot, (prod(index.shape), hot.shape[-1]))
    order = [axis, *(a for a in range(len(table.shape)) if a != axis)]
    rest = [table.shape[a] for a in order[1:]]
    if isinstance(table, Ref):
        flat = b.reshape(b.transpose(table, order), (count, prod(rest)))
        rows = b.matmul(hot, b.slice(flat, 0, 0, hot.shape[1]))
    else:
        values = np.asarray(table, np.float64).transpose(order).reshape(count, prod(rest))
        rows = _rows(b, hot, values[: hot.shape[1]])
    place = len(index.shape)
    y = b.reshape(rows, (*index.shape, *rest))
    back = [*range(place, place + axis), *range(place), *range(place + axis, len(y.shape))]
    return b.transpose(y, back)


def one_hot(b: Builder, index: Ref, count: int) -> Ref:
    """Rows of 1 at the index and 0 elsewhere, along a new last axis, of at most `count`."""
    hot = _hot(b, index)
    if hot is not None:
        if hot.shape[-1] > count:
            raise Unsupported(
                f"an index that may be {hot.shape[-1] - 1} reads a table of {count}",
                "declare the range of the input that it is",
            )
        return hot
    held = b.interval(index)
    # A range seen in samples reaches farther than they do; ONNX says that an index is in the table.
    outside = held.most < -0.5 or held.least > count - 0.5
    if b.known(index) != "calibrated":
        outside = held.least < -0.5 or held.most > count - 0.5
    if index.frac_bits or outside:
        raise Unsupported(
            f"reads a table of {count} at a secret index in [{held.least:g}, {held.most:g}]",
            "an index is a whole number that its range shows to be within the table",
        )
    count = min(count, floor(held.most + 0.5) + 1)
    if prod(index.shape) * count > MOST_COMPARED:
        raise Unsupported(
            f"compares {prod(index.shape)} secret indices with {count} places each",
            "read the table at an input, or at fewer places",
        )
    return _compared(b, index, count)


def _compared(b: Builder, index: Ref, count: int) -> Ref:
    """[x < j + 1] − [x < j] for every place j; the nearest one for what is beyond the ends."""
    wide = b.expand(b.reshape(index, (*index.shape, 1)), (*index.shape, count - 1))
    ends = b.constant(np.arange(1, count).reshape(*[1] * len(index.shape), -1))
    below = b.number(b.sign(b.sub(wide, b.expand(ends, wide.shape))))
    lead = [0] * len(index.shape)
    upper = b.pad(below, [*lead, 0], [*lead, 1], 1.0)
    hot = b.sub(upper, b.pad(below, [*lead, 1], [*lead, 0], 0.0))
    return b.within(hot, 0.0, 1.0)


def _hot(b: Builder, x: Ref) -> Ref | None:
    """The rows that an input was shared as, moved as x was; None for what is no input."""
    if x.id in b.choices:
        return b.choices[x.id]
    step = b.step(x)
    if step.op not in ("reshape", "transpose", "slice", "gather", "expand", "concat"):
        return None
    found = [_hot(b, b.ref(j)) for j in step.inputs]
    hots = [h for h in found if h is not None]
    if len(hots) < len(found) or len({h.shape[-1] for h in hots}) != 1:
        return None
    hot, at, count = hots[0], step.attrs, hots[0].shape[-1]
    if step.op == "reshape":
        return b.reshape(hot, (*x.shape, count))
    if step.op == "transpose":
        return b.transpose(hot, [*at["perm"], len(x.shape)])
    if step.op == "gather":
        return b.gather(hot, at["axis"], list(at["indices"]))
    if step.op == "expand":
        return b.expand(hot, (*x.shape, count))
    if step.op == "concat":
        return b.concat(hots, at["axis"])
    for axis, ends in enumerate(zip(at["starts"], at["stops"], at["steps"], strict=True)):
        hot = b.slice(hot, axis, *ends)
    return hot


@dataclass(frozen=True, slots=True)
class Digits:
    """A way to write entries: `base` is odd, digits lie within ± (base − 1) / 2."""

    count: int
    base: int

    @property
    def ring(self) -> int:
        """Bits that the product with a digit is opened with; an extension wants one more."""
        return int(self.base // 2).bit_length() + (1 if self.count == 1 else 2)

    def cost(self, rows: int, places: int, width: int) -> int:
        """Bytes online: what the data owner sends to both servers, and they to each other."""
        sent = packed_bytes(rows * places, self.ring)
        opened = packed_bytes(self.count * rows * width, self.ring)
        wide = packed_bytes(self.count * rows * width, WIDE_BITS) if self.count > 1 else 0
        return 2 * (sent + opened + wide)

    def of(self, words: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """The digits of whole numbers, lowest first."""
        half = self.base // 2
        for _ in range(self.count):
            digit = (words + half) % self.base - half
            yield digit
            words = (words - digit) // self.base


def digits_for(largest: int, rows: int, places: int, width: int) -> Digits:
    """The cheapest digits of entries up to `largest`, for so many rows of a table."""
    ways = []
    for count in range(1, MOST_DIGITS + 1):
        base = max(ceil((2 * largest + 1) ** (1 / count)), 3) | 1
        while (base**count - 1) // 2 < largest:
            base += 2
        ways.append(Digits(count, base))
    return min(ways, key=lambda d: d.cost(rows, places, width))


def _rows(b: Builder, hot: Ref, table: NDArray[np.float64]) -> Ref:
    """hot @ table for a table of the model owner's."""
    frac_bits = max(b.frac_bits, ENTRY_BITS)
    words = np.rint(np.ldexp(table, frac_bits)).astype(np.int64)
    largest = int(np.abs(words).max(initial=1))
    digits = digits_for(largest, hot.shape[0], hot.shape[1], table.shape[1])
    half, width = digits.base // 2, table.shape[1]
    # The table of a vocabulary is most of many a model: digits are exact in float32.
    written = np.empty((len(words), digits.count * width), np.float32 if half < 1 << 24 else float)
    for k, digit in enumerate(digits.of(words)):
        written[:, k * width : (k + 1) * width] = digit
    weight = b.weight(written, 0, span=(-float(half), float(half)))
    found = b.within(b.matmul(hot, weight, to=0), -float(half), float(half))
    if digits.count > 1:
        found = b.extend(found)
    total = None
    for k in range(digits.count):
        part = b.scale(b.slice(found, 1, k * width, (k + 1) * width), digits.base**k)
        total = part if total is None else b.add(total, part)
    assert total is not None
    reach = largest * 2.0**-frac_bits
    return b.within(b.scale(total, 1, frac_bits), -reach, reach)
