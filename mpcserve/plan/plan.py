"""A plan is a list of instructions in single-assignment form: instruction i defines value i.

It is public: it holds shapes, widths, fraction bits and bounds, nothing of a weight or an input.
Every value is an integer tensor; the real number it stands for is `x / 2**frac_bits`. During an
evaluation it exists only as a masked value Δ = x + λ (mod 2**width) on alice and bob and as shares
of its mask λ = λ_A + λ_B on (alice, carol) and (bob, carol).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpcserve.errors import InputError
from mpcserve.plan.client import ClientProgram, RawInput, program_from_json
from mpcserve.plan.table import read, written

FORMAT = 3
"""Version of the plan file and of what the instructions mean; servers refuse any other."""

RING_BITS = 64
"""Widest ring: shares are computed in uint64 words."""


@dataclass(frozen=True, slots=True)
class Value:
    """What is public about a secret tensor.

    `width`: it is shared mod 2**width. `frac_bits`: fixed-point scale. `bound`: |x| < 2**bound ulp.
    `known`: how the bound is known: exact | proved | calibrated | assumed.
    A bit has width 1, frac_bits 0, bound 0 and means 0 or 1; every other value is signed.
    """

    shape: tuple[int, ...]
    width: int
    frac_bits: int
    bound: int
    known: str = "proved"
    size: int = field(init=False, repr=False, compare=False)  # number of elements

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", prod(self.shape))


@dataclass(frozen=True, slots=True)
class Instruction:
    """One step: `op` (see `plan.ops`), ids of its operands, public attributes, its value.

    `layer` is the name of the ONNX node it came from: reports are grouped by it.
    """

    id: int
    op: str
    inputs: tuple[int, ...]
    value: Value
    attrs: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    layer: str = ""


@dataclass(frozen=True, slots=True)
class InputSpec:
    """A data owner's input: `id` of its `input` instruction, declared real range [low, high].

    With `classes`, each whole number 0 … classes − 1 is shared as a row of so many, a 1 in its
    place: the instruction's value has that axis more.
    """

    name: str
    id: int
    dtype: str
    shape: tuple[int, ...]
    low: float
    high: float
    known: str = "assumed"
    classes: int = 0

    def encoded(self, x: NDArray[Any], value: Value) -> NDArray[np.int64]:
        """The integers that stand for x. Raises: InputError on a number that is no class."""
        reals = self.reals(self.flat(x), 0, value.size).reshape(value.shape)
        return np.rint(np.ldexp(reals, value.frac_bits)).astype(np.int64)

    def flat(self, x: NDArray[Any]) -> NDArray[Any]:
        """The numbers of x in a row. Raises: InputError on one that is no class."""
        numbers = np.asarray(x).reshape(-1)
        outside = self.classes and not ((numbers >= 0) & (numbers < self.classes)).all()
        if outside:
            raise InputError(
                f"input {self.name!r}: expected whole numbers 0 to {self.classes - 1}",
                "they are places of a table: check that it is that of the model",
            )
        return numbers

    def reals(self, flat: NDArray[Any], start: int, stop: int) -> NDArray[np.float64]:
        """Elements `start` … `stop` of what is shared for these numbers: they, or their rows."""
        if not self.classes:
            return np.asarray(flat[start:stop], np.float64)
        first, last = start // self.classes, -(-stop // self.classes)
        ones = np.arange(first, last) * self.classes + flat[first:last].astype(np.int64) - start
        rows = np.zeros(stop - start)
        rows[ones[(ones >= 0) & (ones < stop - start)]] = 1
        return rows


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """A result revealed to the data owner: decoded from value `id`, cast to `dtype`.

    `labels`: names of classes, of which the value is an index. `columns`: classes whose shares are
    the columns of a matrix, as a ZipMap says. Both are public: the client puts them in place.
    """

    name: str
    id: int
    dtype: str
    shape: tuple[int, ...]
    labels: tuple[str, ...] = ()
    columns: tuple[str, ...] | tuple[int, ...] = ()

    def decoded(self, numbers: NDArray[Any]) -> NDArray[Any]:
        """Numbers, in any shape, in the declared type, or the names that they stand for."""
        if self.labels:
            index = np.clip(numbers, 0, len(self.labels) - 1).astype(np.int64)
            named: NDArray[Any] = np.take(np.array(self.labels), index)
            return named
        return np.asarray(numbers).astype(self.dtype)

    def presented(self, rows: NDArray[Any]) -> Output:
        """What the model's own output would be: a matrix with `columns` as a map for each row."""
        if not self.columns:
            return rows
        return [dict(zip(self.columns, row, strict=True)) for row in rows.tolist()]


Output = NDArray[Any] | list[dict[str | int, float]]
"""An array, or a map from each class to its share for every row."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """A way to evaluate the model that was compared. Bytes of one evaluation, online both ways.

    `seconds`: estimated online, by network.
    """

    how: str
    rounds: int
    online_bytes: int
    dealt_bytes: int
    seconds: Mapping[str, float]
    chosen: bool


@dataclass(frozen=True)
class Plan:
    """The whole public program. `batch` is the leading dimension fixed at compile time."""

    name: str
    instructions: tuple[Instruction, ...]
    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]
    batch: int = 1
    opset: int = 0
    model_digest: str = ""
    notes: tuple[str, ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    client: ClientProgram = field(default_factory=ClientProgram)

    def __getitem__(self, id: int) -> Instruction:
        return self.instructions[id]

    def value(self, id: int) -> Value:
        """The public description of value `id`."""
        return self.instructions[id].value

    def operands(self, instruction: Instruction) -> list[Value]:
        """Values of an instruction's operands, in order."""
        return [self.instructions[i].value for i in instruction.inputs]

    @property
    def raw_inputs(self) -> tuple[RawInput, ...]:
        """What the data owner hands in; the client's steps make the shared `inputs` of it."""
        same = tuple(RawInput(i.name, i.dtype, i.shape) for i in self.inputs)
        return self.client.inputs or same

    def on_client(self) -> Iterator[str]:
        """A line, for people, for all that the data owner's client does beside sharing."""
        for node, public in self.client.nodes().items():
            yield f"on the client: {node}" + (f" ({public})" if public else "")
        for o in self.outputs:
            if classes := o.labels or o.columns:
                how = "names" if o.labels else "a map by name"
                yield f"on the client: {how} of {len(classes)} classes in {o.name!r} (public)"

    @cached_property
    def ring_bits(self) -> int:
        """Bits of the widest ring that an instruction works in."""
        return max(max(i.value.width, int(i.attrs.get("ring", 0))) for i in self.instructions)

    @cached_property
    def weights(self) -> dict[str, int]:
        """Name → value id of every secret weight, in plan order."""
        return {i.attrs["name"]: i.id for i in self.instructions if i.op == "weight"}

    @cached_property
    def static(self) -> frozenset[int]:
        """Ids of values fixed at deployment: weights, constants and local functions of them."""
        from mpcserve.plan.ops import OPS

        known: set[int] = set()
        for i in self.instructions:
            if i.op in ("weight", "constant") or (
                OPS[i.op].local and i.inputs and all(j in known for j in i.inputs)
            ):
                known.add(i.id)
        return frozenset(known)

    @cached_property
    def fixed(self) -> dict[int, int]:
        """Product id → which of its operands is static: prepared once for all evaluations."""
        return {
            i.id: 1 if i.inputs[1] in self.static else 0
            for i in self.instructions
            if i.op in ("mul", "matmul", "conv") and not self.static.isdisjoint(i.inputs[:2])
        }

    @cached_property
    def static_reads(self) -> frozenset[int]:
        """Static values that evaluations read as such: not only as a product's fixed operand."""
        return frozenset(
            j
            for i in self.instructions
            if i.id not in self.static
            for k, j in enumerate(i.inputs)
            if j in self.static and self.fixed.get(i.id) != k
        ) | {o.id for o in self.outputs if o.id in self.static}

    @cached_property
    def last_fixed(self) -> dict[int, int]:
        """Static value id → id of the last product whose fixed operand it is."""
        return {self[id].inputs[index]: id for id, index in self.fixed.items()}

    @cached_property
    def unopened(self) -> dict[int, int]:
        """Instruction id → index of the output that it is: nobody else reads it, so both servers
        give their shares of it to the data owner and open nothing."""
        return {id: k for k, (id, _) in self._ends.items()}

    @cached_property
    def computed(self) -> tuple[Instruction, ...]:
        """What every evaluation computes, in plan order: no inputs, nothing that is fixed at
        deployment, and no other shapes of an unopened value."""
        views = {view for _, views in self._ends.values() for view in views}
        left_out = self.static | views | {spec.id for spec in self.inputs}
        return tuple(i for i in self.instructions if i.id not in left_out)

    @cached_property
    def tagged(self) -> tuple[int, ...]:
        """Values whose Δ both servers must agree on: opened outputs, and what the unopened ones are
        computed from. They agree on the inputs before."""
        computed, ids = {i.id for i in self.computed}, list[int]()
        for k, o in enumerate(self.outputs):
            if k in self._ends:
                ids += [j for j in self[self._ends[k][0]].inputs if j in computed]
            else:
                ids.append(o.id)
        return tuple(dict.fromkeys(ids))

    @cached_property
    def _ends(self) -> dict[int, tuple[int, list[int]]]:
        """Output index → (the interactive instruction that alone makes it, shapes between)."""
        from mpcserve.plan.ops import OPS

        readers = Counter(j for i in self.instructions for j in i.inputs)
        readers.update(o.id for o in self.outputs)
        ends = {}
        for k, o in enumerate(self.outputs):
            id, views = o.id, list[int]()
            while readers[id] == 1 and self[id].op == "reshape":
                views.append(id)
                (id,) = self[id].inputs
            same = self.value(id).width == self.value(o.id).width  # a view may drop high bits
            if same and readers[id] == 1 and OPS[self[id].op].interactive:
                ends[k] = (id, views)
        return ends

    @cached_property
    def last_use(self) -> dict[int, int]:
        """Value id → id of the last instruction that reads it (outputs live to the end)."""
        last = {i.id: i.id for i in self.instructions}
        for i in self.instructions:
            for j in i.inputs:
                last[j] = i.id
        for o in self.outputs:
            last[o.id] = len(self.instructions)
        return last

    def to_json(self) -> dict[str, Any]:
        """Plain data, the content of a plan file."""
        return {
            "format": FORMAT,
            "name": self.name,
            "batch": self.batch,
            "opset": self.opset,
            "model_digest": self.model_digest,
            "notes": list(self.notes),
            "alternatives": [
                [a.how, a.rounds, a.online_bytes, a.dealt_bytes, dict(a.seconds), a.chosen]
                for a in self.alternatives
            ],
            "inputs": [
                [i.name, i.id, i.dtype, list(i.shape), i.low, i.high, i.known, i.classes]
                for i in self.inputs
            ],
            "outputs": [
                [o.name, o.id, o.dtype, list(o.shape), list(o.labels), list(o.columns)]
                for o in self.outputs
            ],
            "client": self.client.to_json(),
            "instructions": [
                [
                    i.op,
                    list(i.inputs),
                    {k: written(v) for k, v in i.attrs.items()},
                    [
                        list(i.value.shape),
                        i.value.width,
                        i.value.frac_bits,
                        i.value.bound,
                        i.value.known,
                    ],
                    i.layer,
                ]
                for i in self.instructions
            ],
        }

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON: all parties compare it before anything else."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


def plan_from_json(data: Mapping[str, Any]) -> Plan:
    """Inverse of `Plan.to_json`. Raises: KeyError, TypeError, ValueError on malformed data."""
    if data["format"] != FORMAT:
        raise ValueError(f"plan format {data['format']!r}, this version reads {FORMAT}")
    instructions = []
    for id, (op, inputs, attrs, (shape, width, frac_bits, bound, known), layer) in enumerate(
        data["instructions"]
    ):
        value = Value(tuple(map(int, shape)), int(width), int(frac_bits), int(bound), str(known))
        instructions.append(
            Instruction(
                id,
                str(op),
                tuple(map(int, inputs)),
                value,
                MappingProxyType({k: read(v) for k, v in attrs.items()}),
                str(layer),
            )
        )
    return Plan(
        name=str(data["name"]),
        instructions=tuple(instructions),
        inputs=tuple(
            InputSpec(n, int(i), t, tuple(map(int, s)), float(lo), float(hi), k, int(c))
            for n, i, t, s, lo, hi, k, c in data["inputs"]
        ),
        outputs=tuple(
            OutputSpec(n, int(i), t, tuple(map(int, s)), tuple(map(str, labels)), tuple(columns))
            for n, i, t, s, labels, columns in data["outputs"]
        ),
        batch=int(data["batch"]),
        opset=int(data["opset"]),
        model_digest=str(data["model_digest"]),
        notes=tuple(map(str, data["notes"])),
        alternatives=tuple(
            Alternative(
                str(how),
                int(rounds),
                int(online),
                int(dealt),
                MappingProxyType({str(k): float(v) for k, v in seconds.items()}),
                bool(chosen),
            )
            for how, rounds, online, dealt, seconds, chosen in data["alternatives"]
        ),
        client=program_from_json(data["client"]),
    )
