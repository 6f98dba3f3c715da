"""Small plans written by hand, for tests of the protocol: no compiler involved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from mpcserve.plan.ops import OPS
from mpcserve.plan.plan import InputSpec, Instruction, OutputSpec, Plan, Value


class PlanWriter:
    """Append instructions; `done` returns the plan with the given values as outputs."""

    def __init__(self) -> None:
        self.instructions: list[Instruction] = []
        self.inputs: list[InputSpec] = []

    def value(self, id: int) -> Value:
        return self.instructions[id].value

    def emit(
        self,
        op: str,
        inputs: Sequence[int] = (),
        *,
        width: int,
        frac_bits: int = 0,
        bound: int | None = None,
        shape: tuple[int, ...] | None = None,
        reads: int | None = None,
        **attrs: Any,
    ) -> int:
        """`width` is the new value's; `reads` is the attribute `width` of select and extend."""
        if reads is not None:
            pairs = len(inputs) // 2
            attrs |= {"widths": [reads] * pairs} if op == "select" else {"width": reads}
        id = len(self.instructions)
        rule = OPS[op].shape
        if shape is None:
            assert rule is not None
            shape = rule([self.value(j).shape for j in inputs], attrs)
        bound = width - 1 if bound is None else bound
        value = Value(shape, width, frac_bits, 0 if width == 1 else bound)
        self.instructions.append(
            Instruction(id, op, tuple(inputs), value, MappingProxyType(attrs), f"{op}{id}")
        )
        return id

    def input(self, shape: tuple[int, ...], width: int, frac_bits: int = 0, **k: Any) -> int:
        name = f"x{len(self.inputs)}"
        id = self.emit("input", width=width, frac_bits=frac_bits, shape=shape, name=name, **k)
        self.inputs.append(InputSpec(name, id, "float64", shape, -(2.0**62), 2.0**62))
        return id

    def weight(self, shape: tuple[int, ...], width: int, frac_bits: int = 0, **k: Any) -> int:
        name = f"w{len(self.instructions)}"
        return self.emit("weight", width=width, frac_bits=frac_bits, shape=shape, name=name, **k)

    def shaped(self, op: str, x: int, shape: tuple[int, ...], width: int) -> int:
        """reshape or expand."""
        it = self.value(x)
        id = self.emit(op, [x], width=width, frac_bits=it.frac_bits, bound=it.bound, shape=shape)
        return self._with(id, shape=list(shape))

    def constant(self, shape: tuple[int, ...], values: Sequence[int], width: int) -> int:
        id = self.emit("constant", width=width, shape=shape, values=list(values))
        return self._with(id, shape=list(shape))

    def _with(self, id: int, **attrs: Any) -> int:
        i = self.instructions[id]
        self.instructions[id] = replace(i, attrs=MappingProxyType({**i.attrs, **attrs}))
        return id

    def sign(self, x: int, width: int, chunks: Sequence[int], groups: Sequence[int]) -> int:
        assert sum(chunks) == width - 1
        return self.emit("sign", [x], width=1, chunks=list(chunks), groups=list(groups))

    def done(self, *outputs: int) -> Plan:
        specs = tuple(
            OutputSpec(
                f"y{k}",
                id,
                "float64" if self.value(id).frac_bits else "int64",
                self.value(id).shape,
            )
            for k, id in enumerate(outputs)
        )
        return Plan("test", tuple(self.instructions), tuple(self.inputs), specs)


def inside(plan: Plan) -> Plan:
    """The same plan as a part of a larger one: its outputs are read, and so are opened."""
    instructions, outputs = list(plan.instructions), []
    for o in plan.outputs:
        value, id = plan.value(o.id), len(instructions)
        op, attrs = ("xor", {"flip": 0}) if value.width == 1 else ("offset", {"value": 0})
        instructions.append(Instruction(id, op, (o.id,), value, MappingProxyType(attrs)))
        outputs.append(replace(o, id=id))
    return replace(plan, instructions=tuple(instructions), outputs=tuple(outputs))


def even_chunks(width: int, size: int) -> list[int]:
    """width − 1 bits in ceil((width − 1) / size) chunks, as even as possible."""
    count = -(-(width - 1) // size)
    base, extra = divmod(width - 1, count)
    return [base + (k < extra) for k in range(count)]
