"""Alice and bob: prepare a bundle before the input exists, evaluate it once when the input comes.

An evaluation is a generator of rounds: it owns no socket, thread or clock. Independent
instructions advance together and share rounds, in the order of `plan.schedule`, which both servers
compute from the plan alone.
"""

from __future__ import annotations

import hmac
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from mpcserve.errors import Refused, WireError
from mpcserve.kernels import bits
from mpcserve.plan.ops import OPS, PRODUCTS, packed_bytes
from mpcserve.plan.plan import Instruction, Plan
from mpcserve.plan.schedule import schedule_of
from mpcserve.protocol.parties import Buffer, Material, PrepareIO, Round, Side, Steps
from mpcserve.protocol.primitives import join, product, select, sign, spectral, tally
from mpcserve.protocol.primitives.local_ops import apply_local
from mpcserve.randomness import Stream, bundle_key, derive, weights_key
from mpcserve.ring import Words, reduce

NOTHING: Words = np.empty(0, np.uint64)
"""Stands for a product's fixed operand, which is not read again."""

OUTPUTS = -1
"""The key under which a bundle holds this side's mask shares of the outputs."""


WAITING = -2
"""What a watch is told when a round is sent and its answer awaited."""

Watch = Callable[[int], None]
"""Called with an instruction's id, WAITING or OUTPUTS when the work that follows is its."""


class Materials(Protocol):
    """Where an evaluation finds what was prepared; it may still be under way."""

    def take(self, id: int) -> Material:
        """The material of instruction `id` (or OUTPUTS), once; waits until it is there."""


class _Ready:
    """Materials that are all in memory."""

    __slots__ = ("_parts", "nbytes")

    def __init__(self, parts: dict[int, Material]) -> None:
        self._parts = parts
        self.nbytes = size_of(list(parts.values()))

    def take(self, id: int) -> Material:
        return self._parts.pop(id)


class Bundle:
    """All correlated randomness of one evaluation, as one server holds it. Used once.

    `input_seeds`: in the order of the plan's inputs. `nbytes`: memory it holds, if prepared whole.
    """

    __slots__ = ("_materials", "id", "input_seeds", "nbytes")

    def __init__(self, id: bytes, input_seeds: tuple[bytes, ...], materials: Materials) -> None:
        self.id = id
        self.input_seeds = input_seeds
        self.nbytes = int(getattr(materials, "nbytes", 0))
        self._materials: Materials | None = materials

    def __repr__(self) -> str:
        return f"Bundle({self.id.hex()}, {self.nbytes} bytes, spent={self._materials is None})"

    def spend(self) -> Materials:
        """Hand out the material, once. Raises: Refused on a second call."""
        if self._materials is None:
            raise Refused(
                f"bundle {self.id.hex()} is spent", "a retry takes a new bundle: send it again"
            )
        materials, self._materials = self._materials, None
        return materials


def size_of(material: Material) -> int:
    """Bytes of the arrays in a primitive's material."""
    if isinstance(material, tuple | list):
        return sum(map(size_of, material))
    return int(getattr(material, "nbytes", 0))


class ServerProgram:
    """One deployment on alice or bob: the plan, pair keys and masked weights Δw."""

    def __init__(
        self,
        plan: Plan,
        role: Side,
        carol_key: bytes,
        peer_key: bytes,
        weights: Mapping[str, Words],
    ) -> None:
        self.plan, self.role = plan, role
        self._carol_key, self._peer_key = carol_key, peer_key
        self._schedule = schedule_of(plan)
        self._known: dict[int, Words] = {}
        self._halves: dict[int, Words] = {}
        for i in plan.instructions:
            if i.id in plan.static:
                self._fix_value(i, weights)
        self._fixed: dict[int, product.Fixed] = {}
        for i in plan.instructions:
            if (index := plan.fixed.get(i.id)) is not None:
                w = i.inputs[index]
                self._fixed[i.id] = product.fix(role, i, index, self._known[w], self._halves[w])
        # A large model's weights would otherwise lie in memory twice.
        for held in (self._known, self._halves):
            for id in held.keys() - plan.static_reads:
                del held[id]

    def __repr__(self) -> str:
        return f"ServerProgram({self.plan.name!r}, {self.role})"

    @staticmethod
    def weight_seed(plan: Plan, role: Side, carol_key: bytes) -> bytes:
        """32 bytes for the model owner, who expands this side's share of the weights' masks."""
        return weights_key(carol_key, plan.digest)

    def _fix_value(self, i: Instruction, weights: Mapping[str, Words]) -> None:
        if i.op == "weight":
            seed = derive(weights_key(self._carol_key, self.plan.digest), i.id)
            self._known[i.id] = weights[i.attrs["name"]]
            self._halves[i.id] = Stream(seed).masks(i.value.shape, i.value.width)
        else:
            self._known[i.id] = apply_local(self.plan, i, [self._known[j] for j in i.inputs], True)
            self._halves[i.id] = apply_local(
                self.plan, i, [self._halves[j] for j in i.inputs], False
            )

    # -- before the input ---------------------------------------------------------------------

    def prepare(self, bundle_id: bytes, take: Callable[[int], Buffer] | None) -> Bundle:
        """A whole bundle: every term that needs no input.

        `take(n)` returns bob's next n dealt bytes; None on alice.
        """
        return self.bundle(bundle_id, _Ready(dict(self.materials(bundle_id, take))))

    def bundle(self, bundle_id: bytes, materials: Materials) -> Bundle:
        """A bundle whose materials come from elsewhere, perhaps while it is being evaluated."""
        key = bundle_key(self._carol_key, self.plan.digest, bundle_id)
        seeds = tuple(derive(key, spec.id) for spec in self.plan.inputs)
        return Bundle(bundle_id, seeds, materials)

    def materials(
        self, bundle_id: bytes, take: Callable[[int], Buffer] | None
    ) -> Iterator[tuple[int, Material]]:
        """(id, material) of every interactive instruction in plan order, and last of OUTPUTS.

        Expands this side's masks and dealt shares and computes what needs no input.
        """
        assert (take is None) == (self.role == "alice")
        key = bundle_key(self._carol_key, self.plan.digest, bundle_id)
        halves = dict(self._halves)
        uses = _uses(self.plan)
        for i in self.plan.instructions:
            if i.id in self.plan.static:
                continue
            mine = [halves.get(j, NOTHING) for j in i.inputs]
            if OPS[i.op].local:
                halves[i.id] = apply_local(self.plan, i, mine, False)
            elif i.op == "input":
                seed = derive(key, i.id)
                halves[i.id] = Stream(seed).masks(i.value.shape, i.value.width)
            else:
                io = PrepareIO(key, i.id, take)
                halves[i.id], material = self._prepare(io, i, mine)
                yield i.id, material
            for j in _finished(i, uses):
                if j not in self._halves:
                    halves.pop(j, None)
        yield OUTPUTS, tuple(halves[o.id] for o in self.plan.outputs)

    def _prepare(
        self, io: PrepareIO, i: Instruction, halves: list[Words]
    ) -> tuple[Words, Material]:
        if i.op in PRODUCTS:
            return product.prepare(io, i, halves, self._known, self._fixed.get(i.id))
        if i.op == "sign":
            return sign.prepare(io, i)
        if i.op == "all":
            return join.prepare(io, i, halves)
        if i.op == "spectral":
            return spectral.prepare(io, i, halves)
        if i.op == "tally":
            return tally.prepare(io, i)
        if i.op == "select":
            return select.prepare_select(io, i, halves)
        assert i.op == "extend"
        return select.prepare_extend(io, i, halves)

    # -- online -------------------------------------------------------------------------------

    def evaluate(
        self, bundle: Bundle, inputs: Sequence[Buffer], watch: Watch = lambda id: None
    ) -> Steps[bytes]:
        """Packed Δx of every plan input → this server's message to the data owner.

        Yields one `Round` per round of the bill. `watch` is told whose work begins: a profile.
        Raises: Refused when the bundle is spent, WireError when an input has the wrong size.
        """
        materials = bundle.spend()
        values = dict(self._known)
        for spec, data in zip(self.plan.inputs, inputs, strict=True):
            values[spec.id] = unpack_value(self.plan, spec.id, data, spec.name)
        uses = _uses(self.plan)
        waiting: list[tuple[int, Steps[Words], Round]] = []
        for level in self._schedule.levels:
            for id in level:
                i = self.plan[id]
                if id not in values and id not in self.plan.static:
                    watch(id)
                    deltas = [values.get(j, NOTHING) for j in i.inputs]
                    if OPS[i.op].local:
                        values[id] = apply_local(self.plan, i, deltas, True)
                    else:
                        steps = self._evaluate(i, materials.take(id), deltas)
                        waiting.append((id, steps, next(steps)))
                for j in _finished(i, uses):
                    values.pop(j, None)
            if waiting:
                waiting = yield from _exchange(waiting, values, watch)
        watch(OUTPUTS)
        return self._output_message(bundle.id, values, materials.take(OUTPUTS))

    def _evaluate(self, i: Instruction, material: Material, deltas: list[Words]) -> Steps[Words]:
        if i.op in PRODUCTS:
            fixed = self._fixed.get(i.id)
            return product.evaluate(self.role, i, material, deltas, self._known, fixed)
        if i.op == "sign":
            return sign.evaluate(self.role, i, material, deltas[0])
        if i.op == "all":
            return join.evaluate(self.role, i, material, deltas)
        if i.op == "spectral":
            return spectral.evaluate(self.role, i, material, deltas[0])
        if i.op == "tally":
            return tally.evaluate(self.role, i, material, deltas[0])
        if i.op == "select":
            return select.evaluate_select(self.role, i, material, deltas)
        assert i.op == "extend"
        return select.evaluate_extend(self.role, i, material, deltas[0])

    def _output_message(
        self, bundle_id: bytes, values: Mapping[int, Words], halves: Sequence[Words]
    ) -> bytes:
        """A tag over all Δy, then this side's additive share of every output.

        Shares are re-randomised by a stream that alice and bob share: the data owner learns the
        outputs and nothing of the masks they were computed under.
        """
        secret = derive(self._peer_key, "output", self.plan.digest, bundle_id)
        fresh = Stream(derive(secret, "shares"))
        tag = hmac.new(derive(secret, "tag"), digestmod="sha256")
        parts = []
        for spec, half in zip(self.plan.outputs, halves, strict=True):
            value = self.plan.value(spec.id)
            delta = values[spec.id]
            if value.width == 1:
                tag.update(bits.pack_planes(delta[None], value.size))
                share = fresh.planes(1, value.size) ^ half
                share = share ^ delta if self.role == "alice" else share
                parts.append(bits.pack_planes(share, value.size))
                continue
            r = fresh.masks(value.shape, value.width)
            tag.update(bits.pack(delta, value.width))
            share = delta - half + r if self.role == "alice" else -half - r
            parts.append(bits.pack(reduce(share, value.width), value.width))
        return b"".join([tag.digest(), *parts])


def _exchange(
    waiting: list[tuple[int, Steps[Words], Round]], values: dict[int, Words], watch: Watch
) -> Steps[list[tuple[int, Steps[Words], Round]]]:
    """One round for all that wait; returns those that wait again."""

    def pieces() -> Iterator[Buffer]:
        for id, _, r in waiting:
            watch(id)
            yield from r.pieces
        watch(WAITING)

    received = memoryview((yield Round(pieces(), sum(r.expect for _, _, r in waiting))))
    again, at = [], 0
    for id, steps, r in waiting:
        watch(id)
        try:
            again.append((id, steps, steps.send(received[at : at + r.expect])))
        except StopIteration as done:
            values[id] = done.value
        at += r.expect
    return again


def _uses(plan: Plan) -> Counter[int]:
    uses = Counter(j for i in plan.instructions for j in i.inputs)
    for o in plan.outputs:
        uses[o.id] += 1
    return uses


def _finished(i: Instruction, uses: Counter[int]) -> Iterator[int]:
    """Operands that nobody reads after `i`."""
    for j in i.inputs:
        uses[j] -= 1
        if not uses[j]:
            yield j


def unpack_value(plan: Plan, id: int, data: Buffer, name: str) -> Words:
    """Packed words of value `id` → array of its shape, or a bit's plane.

    Raises: WireError on a wrong length.
    """
    value = plan.value(id)
    expected = packed_bytes(value.size, value.width)
    if len(data) != expected:
        raise WireError(
            f"{name!r}: {len(data)} bytes, expected {expected} for shape {value.shape}"
            f" of {value.width} bits",
            "client and servers must use the same plan",
        )
    if value.width == 1:
        return np.asarray(bits.unpack_planes(data, 1, value.size)[0])
    return bits.unpack(data, value.size, value.width).reshape(value.shape)
