"""Alice and bob: prepare a bundle before the input exists, evaluate it once when the input comes.

An evaluation is a generator of rounds: it owns no socket, thread or clock. Independent
instructions advance together and share rounds, in the order of `plan.schedule`, which both servers
compute from the plan alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from mpcserve.errors import Refused, WireError
from mpcserve.kernels import bits, packing
from mpcserve.kernels.tasks import Run, one_by_one
from mpcserve.plan.ops import packed_bytes
from mpcserve.plan.plan import Plan, Value
from mpcserve.plan.stack import stack
from mpcserve.protocol.parties import (
    Buffer,
    Material,
    PrepareIO,
    Round,
    Side,
    Steps,
    input_mask,
    input_seed,
)
from mpcserve.protocol.primitives import product
from mpcserve.protocol.results import Results, Seal
from mpcserve.protocol.walk import NOTHING, Fixed, Walk, complete
from mpcserve.randomness import Stream, bundle_key, derive, weights_key
from mpcserve.ring import Words, word_type

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

    It has one slot or more, each for one request. `seeds`: of each slot, in the order of the plan's
    inputs. `seals`: of each slot. `nbytes`: memory it holds, if prepared whole.
    """

    __slots__ = ("_materials", "_seal", "_seals", "id", "nbytes", "seeds")

    def __init__(
        self,
        id: bytes,
        seeds: tuple[tuple[bytes, ...], ...],
        materials: Materials,
        seal: Callable[[int], Seal],
    ) -> None:
        self.id = id
        self.seeds = seeds
        self.nbytes = int(getattr(materials, "nbytes", 0))
        self._materials: Materials | None = materials
        self._seal = seal
        self._seals: tuple[Seal, ...] = ()

    def __repr__(self) -> str:
        return f"Bundle({self.id.hex()}, {self.nbytes} bytes, spent={self._materials is None})"

    @property
    def slots(self) -> int:
        """How many requests it is for."""
        return len(self.seeds)

    @property
    def input_seeds(self) -> tuple[bytes, ...]:
        """The seeds of its only slot."""
        (seeds,) = self.seeds
        return seeds

    @property
    def seals(self) -> tuple[Seal, ...]:
        """Made when first asked for. Two threads that ask at once may make two alike, of which each
        part is used but once, by the one that evaluates."""
        if not self._seals:
            self._seals = tuple(map(self._seal, range(self.slots)))
        return self._seals

    def input_tag(self, slot: int, inputs: Sequence[Buffer]) -> str:
        """What alice and bob compare of the Δx they received, in hex, once: their sizes are the
        plan's."""
        return self.seals[slot].inputs.tag(inputs).hex()

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
    """One deployment on alice or bob: the plan, pair keys and masked weights Δw, by name in order.

    `run` runs the parts of a large product or selection: on several cores, if it has them.
    """

    def __init__(
        self,
        plan: Plan,
        role: Side,
        carol_key: bytes,
        peer_key: bytes,
        weights: Iterable[tuple[str, Words]],
        run: Run = one_by_one,
    ) -> None:
        self.plan, self.role = plan, role
        self._carol_key, self._peer_key = carol_key, peer_key
        deltas = {plan.weights[name]: words for name, words in weights}
        halves: dict[int, Words] = {}
        for id in deltas:
            seed = derive(weights_key(carol_key, plan.digest), id)
            value = plan.value(id)
            halves[id] = Stream(seed).masks(value.shape, value.width)
        complete(plan, deltas, True)
        complete(plan, halves, False)
        products = _packed(plan, role, deltas, halves)
        self._fixed = Fixed(deltas, halves, products)
        self._run = run
        self._walks = {
            1: Walk(plan, role, self._fixed, run, Results(plan, plan, plan.tagged, role))
        }

    def __repr__(self) -> str:
        return f"ServerProgram({self.plan.name!r}, {self.role})"

    @staticmethod
    def weight_seed(plan: Plan, role: Side, carol_key: bytes) -> bytes:
        """32 bytes for the model owner, who expands this side's share of the weights' masks."""
        return weights_key(carol_key, plan.digest)

    def plan_of(self, slots: int) -> Plan:
        """The plan of so many evaluations in one."""
        return self._walk(slots).plan

    def _walk(self, slots: int) -> Walk:
        """The plan of that many evaluations in one. Made when first needed: it holds no weights."""
        walk = self._walks.get(slots)
        if walk is None:
            walk = self._walks[slots] = self._stacked(slots)
        return walk

    def _stacked(self, slots: int) -> Walk:
        stacked, fixed = stack(self.plan, slots), self._fixed
        deltas = {stacked.of[id]: value for id, value in fixed.deltas.items()}
        halves = {stacked.of[id]: value for id, value in fixed.halves.items()}
        complete(stacked.plan, deltas, True)
        complete(stacked.plan, halves, False)
        products = {stacked.done_by[id]: weight for id, weight in fixed.products.items()}
        tagged = tuple(stacked.of[id] for id in self.plan.tagged)
        results = Results(self.plan, stacked.plan, tagged, self.role)
        return Walk(stacked.plan, self.role, Fixed(deltas, halves, products), self._run, results)

    # -- before the input ---------------------------------------------------------------------

    def prepare(
        self, bundle_id: bytes, take: Callable[[int], Buffer] | None, slots: int = 1
    ) -> Bundle:
        """A whole bundle: every term that needs no input.

        `take(n)` returns bob's next n dealt bytes; None on alice.
        """
        parts = dict(self.materials(bundle_id, take, slots))
        return self.bundle(bundle_id, _Ready(parts), slots)

    def bundle(self, bundle_id: bytes, materials: Materials, slots: int = 1) -> Bundle:
        """A bundle whose materials come from elsewhere, perhaps while it is being evaluated."""
        key = bundle_key(self._carol_key, self.plan.digest, bundle_id)
        seeds = [
            tuple(input_seed(key, spec.id, slot) for spec in self.plan.inputs)
            for slot in range(slots)
        ]
        seal = partial(Seal, self._peer_key, self.plan.digest, bundle_id)
        return Bundle(bundle_id, tuple(seeds), materials, seal)

    def materials(
        self, bundle_id: bytes, take: Callable[[int], Buffer] | None, slots: int = 1
    ) -> Iterator[tuple[int, Material]]:
        """(id, material) of every interactive instruction in plan order, and last of OUTPUTS.

        Expands this side's masks and dealt shares and computes what needs no input.
        """
        assert (take is None) == (self.role == "alice")
        key = bundle_key(self._carol_key, self.plan.digest, bundle_id)
        walk = self._walk(slots)
        halves = walk.halves.copy()
        io = PrepareIO(key, take, walk.results.zeros(self._peer_key, bundle_id))
        for spec, stacked in zip(self.plan.inputs, walk.plan.inputs, strict=True):
            halves[stacked.id] = input_mask(self.plan, key, spec.id, slots)
        for step in walk.before:
            mine = [halves[j] for j in step.operands]
            if step.local is not None:
                halves[step.id] = step.local(mine)
            else:
                assert step.prepare is not None
                halves[step.id], material = step.prepare(io, mine)
                yield step.id, material
            for j in step.over:
                halves[j] = NOTHING
        yield OUTPUTS, walk.results.opened(halves)

    # -- online -------------------------------------------------------------------------------

    def evaluate(
        self, bundle: Bundle, inputs: Sequence[Buffer], watch: Watch | None = None
    ) -> Steps[bytes]:
        """Packed Δx of every plan input → this server's message to the data owner.

        Yields one `Round` per round of the bill. `watch` is told whose work begins: a profile.
        Raises: Refused when the bundle is spent, WireError when an input has the wrong size.
        """
        (message,) = yield from self.evaluate_all(bundle, [inputs], watch)
        assert message is not None
        return message

    def evaluate_all(
        self,
        bundle: Bundle,
        inputs: Sequence[Sequence[Buffer] | None],
        watch: Watch | None = None,
    ) -> Steps[list[bytes | None]]:
        """The same for every slot of the bundle; None stands for one that has no owner any more.

        What is computed in such a slot is masked as ever, and told to nobody.
        """
        assert len(inputs) == bundle.slots
        materials, walk = bundle.spend(), self._walk(bundle.slots)
        values: list[Any] = list(walk.deltas)
        for k, spec in enumerate(walk.plan.inputs):
            values[spec.id] = self._input(k, inputs)
        waiting: list[_Waiting] = []
        for level in walk.levels:
            for step in level:
                if watch is not None:
                    watch(step.id)
                deltas = [values[j] for j in step.operands]
                if step.local is not None:
                    values[step.id] = step.local(deltas)
                else:
                    assert step.evaluate is not None
                    steps = step.evaluate(materials.take(step.id), deltas)
                    try:
                        waiting.append((step.id, steps, next(steps)))
                    except StopIteration as done:
                        values[step.id] = done.value
                for j in step.over:
                    values[j] = NOTHING
            if waiting:
                waiting = yield from _exchange(waiting, values, watch)
        if watch is not None:
            watch(OUTPUTS)
        wanted = [given is not None for given in inputs]
        return walk.results.messages(values, materials.take(OUTPUTS), bundle.seals, wanted)

    def _input(self, k: int, inputs: Sequence[Sequence[Buffer] | None]) -> Words:
        """Δx of the plan's k-th input, of all slots."""
        spec = self.plan.inputs[k]
        value = self.plan.value(spec.id)
        slots = [
            unpack_value(self.plan, spec.id, given[k], spec.name)
            if given is not None
            else np.zeros(value.shape, word_type(value.width))
            for given in inputs
        ]
        return slots[0] if len(slots) == 1 else np.stack(slots)


def _packed(
    plan: Plan, role: Side, deltas: dict[int, Words], halves: dict[int, Words]
) -> dict[int, product.Fixed]:
    """The weights of each product in the kernels' order.

    What they were packed from is dropped as soon as nobody reads it any more: a large model's
    weights would otherwise lie in memory twice.
    """
    for held in (deltas, halves):
        for id in held.keys() - plan.static_reads - plan.last_fixed.keys():
            del held[id]
    products: dict[int, product.Fixed] = {}
    made: dict[Hashable, product.Fixed] = {}
    for id, index in plan.fixed.items():
        w, key = plan[id].inputs[index], product.layout_of(plan, plan[id], index)
        if key not in made:
            made[key] = product.fix(role, plan, plan[id], index, deltas[w], halves[w])
        products[id] = made[key]
        if plan.last_fixed[w] == id and w not in plan.static_reads:
            del deltas[w], halves[w]
    return products


_Waiting = tuple[int, Steps[Any], Round]


def _exchange(
    waiting: list[_Waiting], values: list[Any], watch: Watch | None
) -> Steps[list[_Waiting]]:
    """One round for all that wait; returns those that wait again."""
    if len(waiting) == 1 and watch is None:
        id, steps, mine = waiting[0]
        received = yield mine
        try:
            return [(id, steps, steps.send(received))]
        except StopIteration as done:
            values[id] = done.value
            return []
    watched = watch or _unwatched

    def pieces() -> Iterator[Buffer]:
        for id, _, r in waiting:
            watched(id)
            yield from r.pieces
        watched(WAITING)

    received = memoryview((yield Round(pieces(), sum(r.expect for _, _, r in waiting))))
    again, at = [], 0
    for id, steps, r in waiting:
        watched(id)
        try:
            again.append((id, steps, steps.send(received[at : at + r.expect])))
        except StopIteration as done:
            values[id] = done.value
        at += r.expect
    return again


def _unwatched(id: int) -> None:
    """The watch of an evaluation that nobody profiles."""


def unpack_value(plan: Plan, id: int, data: Buffer, name: str) -> Words:
    """Packed words of value `id` → array of its shape, or a bit's plane.

    Raises: WireError on a wrong length.
    """
    value = plan.value(id)
    check_size(value, data, name)
    if value.width == 1:
        return np.asarray(bits.unpack_planes(data, 1, value.size)[0])
    return packing.unpack(data, value.size, value.width).reshape(value.shape)


def check_size(value: Value, data: Buffer, name: str) -> None:
    """Raises: WireError unless `data` has the size of a packed `value`."""
    expected = packed_bytes(value.size, value.width)
    if len(data) != expected:
        raise WireError(
            f"{name!r}: {len(data)} bytes, expected {expected} for shape {value.shape}"
            f" of {value.width} bits",
            "client and servers must use the same plan",
        )
