"""The real protocol without servers: all three roles in this process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mpcserve.errors import InputError
from mpcserve.plan.bill import Bill
from mpcserve.plan.plan import Output
from mpcserve.protocol.together import simulate as simulate_plan
from mpcserve.serving.inputs import Array, OnRange, batches, check_inputs, join_outputs, presented

if TYPE_CHECKING:
    from mpcserve.compiler import CompiledModel


def simulate(
    model: CompiledModel, x: Array | Mapping[str, Array], *, on_range: OnRange = "error"
) -> tuple[Output | dict[str, Output], Bill]:
    """Outputs of one batch, as `Client.infer` gives them, and the rounds and bytes it took."""
    plan = model.plan
    parts = list(batches(plan, check_inputs(plan, x, on_range)))
    if len(parts) != 1:
        raise InputError(
            f"{len(parts)} batches of {plan.batch} rows, expected one",
            "simulate at most as many rows as the model was compiled for (--batch)",
        )
    count, rows = parts[0]
    outputs, bill = simulate_plan(plan, model.weights, rows)
    return presented(plan, join_outputs(plan, [(count, outputs)])), bill
