"""Small plans and fakes for the tests of the servers."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from mpcserve.plan import InputSpec, Instruction, OutputSpec, Plan, Value, verify_plan

FRAC = 8


def dense_relu_plan(name: str = "dense", batch: int = 2, features: int = 6, units: int = 4) -> Plan:
    """relu(x @ w): one product, one sign, one select. 4 rounds."""
    wide = 40

    def step(
        id: int, op: str, inputs: tuple[int, ...], value: Value, **attrs: object
    ) -> Instruction:
        return Instruction(id, op, inputs, value, MappingProxyType(attrs), "dense")

    x = Value((batch, features), wide, FRAC, FRAC + 4)
    w = Value((features, units), wide, FRAC, FRAC + 2)
    z = Value((batch, units), 20, FRAC, FRAC + 8)
    plan = Plan(
        name=name,
        instructions=(
            step(0, "input", (), x, name="x"),
            step(1, "weight", (), w, name="w"),
            step(2, "matmul", (0, 1), z, ring=wide, truncate=FRAC),
            step(3, "sign", (2,), Value((batch, units), 1, 0, 0), chunks=[5, 5, 5, 4], groups=[4]),
            step(
                4,
                "select",
                (3, 2),
                Value((batch, units), 24, FRAC, FRAC + 8),
                when=0,
                nonnegative=True,
                width=20,
            ),
        ),
        inputs=(InputSpec("x", 0, "float32", (batch, features), -8.0, 8.0, "proved"),),
        outputs=(OutputSpec("y", 4, "float32", (batch, units)),),
        batch=batch,
    )
    verify_plan(plan)
    return plan


def dense_weights(plan: Plan, seed: int = 0) -> dict[str, NDArray[np.int64]]:
    """Encoded weights within the plan's bound."""
    shape = plan.value(plan.weights["w"]).shape
    return {"w": np.random.default_rng(seed).integers(-256, 256, shape, dtype=np.int64)}


def dense_relu(
    x: NDArray[np.floating], weights: dict[str, NDArray[np.int64]]
) -> NDArray[np.floating]:
    """What the plan computes, in float."""
    return np.maximum(x.astype(np.float64) @ (weights["w"] / 2.0**FRAC), 0)
