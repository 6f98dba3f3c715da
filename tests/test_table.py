"""Long lists in a plan: written compressed, read back equal; products by public matrices."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mpcserve.compiler.builder import Builder
from mpcserve.compiler.rearrange import combined, taken
from mpcserve.compiler.widths import assign_widths
from mpcserve.plan import Plan, verify_plan
from mpcserve.plan.store import plan_bytes, plan_from_bytes
from mpcserve.plan.table import Table, listed, read, written
from mpcserve.protocol.together import Together
from mpcserve.reference import evaluate_clear
from tests.onnx_cases import rng_of
from tests.plan_interpreter import Interpreter


@pytest.mark.parametrize("length", [1, 32, 33, 5000])
def test_a_table_is_read_back_as_it_was_written(length: int) -> None:
    values = rng_of(length).integers(-(2**62), 2**62, length)
    held = listed(values)
    assert isinstance(held, Table) == (length > 32)
    back = read(json.loads(json.dumps(written(held))))
    assert back == held
    assert np.array_equal(np.asarray(back), values)


def test_regular_indices_take_a_byte_or_less() -> None:
    upsampled = np.repeat(np.arange(10_000), 2)
    assert len(json.dumps(written(listed(upsampled)))) < 1000


def test_a_damaged_table_is_refused() -> None:
    count, packed = written(listed(np.arange(100)))["table"]
    for damaged in ([count - 1, packed], [count + 1, packed], [count, packed[:-8]], [count, "no!"]):
        with pytest.raises(ValueError, match=r"table|base64|Invalid|padding|data"):
            read({"table": damaged})


def _plan(weights: np.ndarray, axis: int) -> Plan:
    b = Builder(16, 20)
    x = b.input("x", "float32", (3, 40, 2), (-4.0, 4.0, "assumed"))
    indices = rng_of(3).integers(0, x.shape[axis], weights.shape)
    b.output("y", "float32", combined(b, x, axis, indices, weights))
    b.output("z", "float32", taken(b, x, rng_of(4).integers(-1, 240, (11, 13))))
    plan = assign_widths(b.draft(), "sum")
    verify_plan(plan)
    return plan


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("taps", [1, 4, 30])
def test_public_weights_sum_without_a_round(axis: int, taps: int) -> None:
    rng = rng_of(10 * axis + taps)
    plan = _plan(rng.uniform(-2, 2, (taps, 50)), axis)
    assert plan_from_bytes(plan_bytes(plan)) == plan
    x = np.ldexp(rng.integers(-(2**17), 2**17, (3, 40, 2)), -16)
    y, z = Interpreter(plan, {}).run(x)
    clear = evaluate_clear(plan, {}, [x])
    real, bill = Together(plan, {}).infer([x])
    assert bill.rounds == 0
    assert np.array_equal(clear[0], y)
    assert np.array_equal(clear[1], z)
    assert np.abs(real[0] - y).max() <= 2 * 2.0**-16
    assert np.array_equal(real[1], z)
