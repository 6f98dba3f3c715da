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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, floor, prod

import numpy as np
from numpy.typing import NDArray

from mpcserve.compiler.builder import Array, Builder, Ref
from mpcserve.compiler.functions import axis_of
from mpcserve.compiler.graph import Graph, Node
from mpcserve.compiler.problems import Unsupported
from mpcserve.compiler.rearrange import shaped, transposed
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

    Cost: 1 round, 2 for a long table, and the digits' widths for the data owner to send; of an
    index that the servers computed 4 rounds, a comparison and a product for every place.
    """
    axis = axis_of(axis, len(table.shape))
    count = table.shape[axis]
    order = [axis, *(a for a in range(len(table.shape)) if a != axis)]
    rest = [table.shape[a] for a in order[1:]]
    flat = shaped(b, transposed(b, table, order), (1, count, prod(rest)))
    rows = read(b, flat, b.reshape(index, (1, prod(index.shape))))
    place = len(index.shape)
    y = b.reshape(rows, (*index.shape, *rest))
    back = [*range(place, place + axis), *range(place), *range(place + axis, len(y.shape))]
    return b.transpose(y, back)


def looked_up_along(b: Builder, table: Array | Ref, index: Ref, axis: int) -> Ref:
    """As GatherElements: an index for each element of the result. Cost: as `looked_up`."""
    rank = len(table.shape)
    axis = axis_of(axis, rank)
    if len(index.shape) != rank:
        raise Unsupported(f"indices of {len(index.shape)} axes for a tensor of {rank}")
    for a in (a for a in range(rank) if a != axis):
        table = cut(b, table, a, index.shape[a])
    order = [*(a for a in range(rank) if a != axis), axis]
    lead, along = [index.shape[a] for a in order[:-1]], index.shape[axis]
    flat = shaped(b, transposed(b, table, order), (prod(lead), table.shape[axis], 1))
    places = b.reshape(b.transpose(index, order), (prod(lead), along))
    y = b.reshape(read(b, flat, places), (*lead, along))
    return b.transpose(y, np.argsort(order).tolist())


def looked_up_slices(b: Builder, table: Array | Ref, index: Ref, batch: int) -> Ref:
    """As GatherND: the last axis of the index holds those of leading axes. Cost: as `looked_up`.

    Where they are several, every position that they may name together is a place.
    """
    lead, depth = table.shape[:batch], index.shape[-1]
    along, rest = table.shape[batch : batch + depth], table.shape[batch + depth :]
    if depth > 1:
        index = _joined(b, index, along)
    places = b.reshape(index, (prod(lead), prod(index.shape) // prod(lead)))
    flat = shaped(b, table, (prod(lead), prod(along), prod(rest)))
    return b.reshape(read(b, flat, places), (*index.shape[:-1], *rest))


def _joined(b: Builder, index: Ref, along: Sequence[int]) -> Ref:
    """Indices of several axes, in the last axis, as one of all their places: local."""
    axis = len(index.shape) - 1
    low, high = (
        e.max(axis=tuple(range(axis))) for e in (-b.interval(index).low, b.interval(index).high)
    )
    if np.any(low > 0.5) or np.any(high > np.array(along) - 0.5):
        raise Unsupported(
            f"reads axes of {', '.join(map(str, along))} at secret indices in "
            f"[{ceil(-low.max())}, {floor(high.max())}]",
            "several indices must each be shown by their range to be within their axis",
        )
    steps = np.array([[prod(along[k + 1 :])] for k in range(len(along))])
    joined = b.combine(index, axis, np.arange(len(along))[:, None], steps)
    b.within(joined, 0.0, prod(along) - 1.0)
    return b.as_place(joined) if b.is_place(index) else joined


def cut(b: Builder, x: Array | Ref, axis: int, stop: int) -> Array | Ref:
    """The first elements along an axis."""
    if isinstance(x, Ref):
        return b.slice(x, axis, 0, stop)
    return x.take(range(stop), axis)


def read(b: Builder, table: Array | Ref, index: Ref) -> Ref:
    """table[n, index[n, j]]. Shapes: [n, places, width] at [n, j] → [n, j, width]."""
    hot = one_hot(b, index, table.shape[1])
    table = cut(b, table, 1, hot.shape[2])
    if isinstance(table, np.ndarray):
        whole = table.dtype.kind in "biu"
        if len(table) == 1:
            rows = _rows(b, b.reshape(hot, hot.shape[1:]), np.asarray(table[0], np.float64), whole)
            return b.reshape(rows, (*index.shape, table.shape[2]))
        table = b.weight(table, 0 if whole else None)
    if b.is_bit(table):
        return b.odd(_chosen(b, hot, b.number(table)))
    found = _chosen(b, hot, table)
    return b.as_place(found) if b.is_place(table) else found


def _chosen(b: Builder, hot: Ref, table: Ref) -> Ref:
    """hot @ table, which is one of the table's rows."""
    found, held = b.matmul(hot, table, to=table.frac_bits), b.interval(table)
    return b.within(
        found, held.low.min(axis=1, keepdims=True), held.high.max(axis=1, keepdims=True)
    )


def one_hot(b: Builder, index: Ref, count: int) -> Ref:
    """Rows of 1 at the index and 0 elsewhere, along a new last axis, of at most `count`.

    A negative index counts from the end.
    """
    hot = _hot(b, index)
    if hot is not None:
        if hot.shape[-1] > count:
            raise Unsupported(
                f"an index that may be {hot.shape[-1] - 1} reads a table of {count}",
                "declare the range of the input that it is",
            )
        return hot
    held = b.interval(index)
    low, high = held.least, held.most
    # A range seen in samples reaches farther than they do; ONNX says that an index is in the table.
    outside = high < -0.5 - count or low > count - 0.5
    if b.known(index) != "calibrated":
        outside = low < -0.5 - count or high > count - 0.5
    if index.frac_bits or outside:
        raise Unsupported(
            f"reads a table of {count} at a secret index in [{ceil(low)}, {floor(high)}]",
            "an index is a whole number that its range shows to be within the table: calibrate it, "
            "or declare its --input-range",
        )
    first, last = max(-count, floor(low + 0.5)), min(count, ceil(high - 0.5) + 1)
    first, last = min(first, 0), max(last, 0)
    if prod(index.shape) * (last - first) > MOST_COMPARED:
        raise Unsupported(
            f"compares {prod(index.shape)} secret indices with {last - first} places each, "
            f"{MOST_COMPARED} comparisons at most",
            "read the table at an input, or at fewer places",
        )
    hot = _compared(b, index, first, last)
    if first == 0:
        return hot
    lead, axis = [0] * len(index.shape), len(index.shape)
    from_end = b.slice(hot, axis, 0, -first)
    from_end = b.pad(from_end, [*lead, count + first], [*lead, 0])
    if not last:
        return from_end
    ahead = b.pad(b.slice(hot, axis, -first, last - first), [*lead, 0], [*lead, count - last])
    return b.within(b.add(from_end, ahead), 0.0, 1.0)


def _compared(b: Builder, index: Ref, first: int, last: int) -> Ref:
    """[x < j + 1] − [x < j] for every place j; the nearest one for what is beyond the ends."""
    shape, lead = (*index.shape, last - first), [0] * len(index.shape)
    if last - first == 1:
        return b.expand(b.constant(np.ones([1] * len(shape))), shape)
    wide = b.expand(b.reshape(index, (*index.shape, 1)), (*index.shape, last - first - 1))
    ends = b.constant(np.arange(first + 1, last).reshape(*[1] * len(lead), -1))
    below = b.number(b.sign(b.sub(wide, b.expand(ends, wide.shape))))
    upper = b.pad(below, [*lead, 0], [*lead, 1], 1.0)
    hot = b.sub(upper, b.pad(below, [*lead, 1], [*lead, 0], 0.0))
    return b.within(hot, 0.0, 1.0)


def is_hot(b: Builder, x: Ref) -> bool:
    """Whether x's rows of one 1 are known without comparing x."""
    return _hot(b, x) is not None


def _hot(b: Builder, x: Ref) -> Ref | None:
    """The rows that an input was shared as, or a ranking found, moved as x was; else None."""
    if x.id in b.choices:
        return b.choices[x.id]
    if x.id in b.found:
        bits = b.found[x.id]
        b.choices[x.id] = b.number(b.transpose(bits, [*range(1, len(bits.shape)), 0]))
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


def _rows(b: Builder, hot: Ref, table: NDArray[np.float64], whole: bool) -> Ref:
    """hot @ table for a table of the model owner's, of whole numbers or of reals."""
    frac_bits = 0 if whole else max(b.frac_bits, ENTRY_BITS)
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
    # Of whole numbers the plan tells whether any is negative, as of an index it must; of reals not.
    low = 0.0 if whole and not np.any(table < 0) else -reach
    found = b.within(b.scale(total, 1, frac_bits), low, reach)
    return b.as_place(found) if whole else found
