"""What each role holds of a value, and how dealt values travel: the vocabulary of the primitives.

    carol            Mask      both shares of λ
    alice, bob       an array  their share λ_i, before the input exists
    alice, bob       an array  Δ, during the evaluation

A primitive has three faces here (its cost is in `plan.ops`):
    deal(io, i, masks) -> Mask                     on carol
    prepare(io, i, halves, known) -> (half, material)   on alice and bob, before the input
    evaluate(side, i, material, deltas) -> Steps   on alice and bob, online
deal and prepare read the pairwise streams in the same order; that is what makes the shares match.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from mpcserve.kernels import bits, packing
from mpcserve.plan.plan import Instruction, Plan
from mpcserve.randomness import Stream, derive
from mpcserve.ring import Words, as_words, reduce

Side = Literal["alice", "bob"]
Buffer = bytes | bytearray | memoryview
T = TypeVar("T")


@dataclass(frozen=True, slots=True, repr=False)
class Round:
    """One exchange: post every piece as it is produced, then receive exactly `expect` bytes."""

    pieces: Iterable[Buffer]
    expect: int

    def __repr__(self) -> str:
        return f"Round(expect={self.expect})"


Steps = Generator[Round, Buffer, T]
"""A generator that yields rounds, is resumed with the peer's bytes, and returns a result."""


class Mask(NamedTuple):
    """Carol's view of a value: λ = a + b (mod 2^width), or a ⊕ b for a bit."""

    a: Words
    b: Words

    def __repr__(self) -> str:
        return "Mask(<secret>)"

    def total(self, width: int) -> Words:
        """λ mod 2^width, contiguous."""
        total = as_words(self.a, width) + as_words(self.b, width)
        return np.asarray(reduce(np.asarray(total, order="C"), width))


def input_seed(key: bytes, id: int, slot: int) -> bytes:
    """What expands to one pair's mask of input `id`, of one slot of a bundle."""
    return derive(key, id, slot)


def input_mask(plan: Plan, key: bytes, id: int, slots: int) -> Words:
    """One pair's mask of input `id`; of several slots, on top of one another."""
    value = plan.value(id)
    masks = [
        Stream(input_seed(key, id, slot)).masks(value.shape, value.width) for slot in range(slots)
    ]
    return masks[0] if slots == 1 else np.stack(masks)


NO_MASK = Mask(np.empty(0, np.uint64), np.empty(0, np.uint64))
"""Of what is not opened, of a product's fixed operand, which is not read again, and of what is not
known yet."""


class DealIO:
    """Carol's two streams of one bundle, and the corrections she owes bob."""

    __slots__ = ("_unopened", "a", "b", "corrections")

    def __init__(self, alice_key: bytes, bob_key: bytes, unopened: Container[int] = ()) -> None:
        self.a, self.b = Stream(derive(alice_key, "stream")), Stream(derive(bob_key, "stream"))
        self._unopened = unopened
        self.corrections: list[memoryview] = []

    def owed(self) -> list[memoryview]:
        """The corrections since the last call."""
        corrections, self.corrections = self.corrections, []
        return corrections

    def fresh(self, i: Instruction) -> Mask:
        """A fresh mask of an instruction's value, from the two pairwise streams: costs no bytes.

        What is not opened has none that carol knows.
        """
        if i.id in self._unopened:
            return NO_MASK
        if i.value.width == 1:
            return Mask(self.a.planes(1, i.value.size)[0], self.b.planes(1, i.value.size)[0])
        shape, width = i.value.shape, i.value.width
        return Mask(self.a.masks(shape, width), self.b.masks(shape, width))

    def planes(self, count: int, size: int) -> Mask:
        """Fresh masks of bits. Shapes: [count, ceil(size / 64)]."""
        return Mask(self.a.planes(count, size), self.b.planes(count, size))

    def deal(self, value: Words, width: int) -> None:
        """Share a value that carol knows: alice draws her part, bob is sent the correction.

        Only its low `width` bits count.
        """
        flat = np.ascontiguousarray(as_words(value, width)).reshape(-1)
        part = self.a.uniform(flat.size, width)
        self.corrections.append(packing.pack_difference(flat, part, width))

    def deal_bits(self, planes: Words, size: int) -> None:
        """The same for bit planes over Z_2. Shapes: [count, ceil(size / 64)]."""
        part = self.a.planes(planes.shape[0], size)
        self.corrections.append(bits.pack_planes(planes ^ part, size))

    def deal_blocks(self, rows: Words, size: int) -> None:
        """The same for rows of bits in blocks, which are overwritten. Shapes: [R · W]."""
        rows ^= self.a.words(rows.size)
        self.corrections.append(bits.pack_blocks(rows, size))


class PrepareIO:
    """One server's stream of one bundle with carol; bob also reads carol's corrections."""

    __slots__ = ("_take", "_unopened", "leader", "stream")

    def __init__(
        self,
        key: bytes,
        take: Callable[[int], Buffer] | None,
        unopened: Mapping[int, Callable[[], Words]],
    ) -> None:
        self.stream = Stream(derive(key, "stream"))
        self._take = take
        self._unopened = unopened
        self.leader = take is None

    def fresh(self, i: Instruction) -> Words:
        """This side's share of a fresh mask of an instruction's value.

        Of what is not opened, its share of zero: the data owner adds up both servers' messages.
        """
        if i.id in self._unopened:
            return self._unopened[i.id]()
        if i.value.width == 1:
            return np.asarray(self.stream.planes(1, i.value.size)[0])
        return self.stream.masks(i.value.shape, i.value.width)

    def planes(self, count: int, size: int) -> Words:
        """This side's share of fresh masks of bits."""
        return self.stream.planes(count, size)

    def dealt(self, shape: tuple[int, ...], width: int) -> Words:
        """This side's share of a dealt value mod 2^width."""
        if self._take is None:
            return self.stream.masks(shape, width)
        count = prod(shape)
        data = self._take((count * width + 7) // 8)
        return packing.unpack(data, count, width).reshape(shape)

    def dealt_bits(self, count: int, size: int) -> Words:
        """This side's shares of dealt bit planes. Shapes: [count, ceil(size / 64)]."""
        if self._take is None:
            return self.stream.planes(count, size)
        return bits.unpack_planes(self._take(count * ((size + 7) // 8)), count, size)

    def dealt_blocks(self, count: int, size: int) -> Words:
        """The same in blocks. Shapes: [count · ceil(size / 64)]."""
        if self._take is None:
            return self.stream.words(count * ((size + 63) // 64))
        return bits.unpack_blocks(self._take(count * ((size + 7) // 8)), count, size)


Material = Any
"""What prepare leaves for evaluate: a primitive's own tuple of arrays."""

Known = Mapping[int, Words]
"""Δ of the values that are fixed at deployment, by value id."""
