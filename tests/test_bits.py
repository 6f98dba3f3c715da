"""Bits as values: moved, joined and revealed locally, counted in one round; wrapped numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpcserve.errors import PlanError
from mpcserve.plan import bill_of, verify_plan
from mpcserve.plan.bill import cost_of
from mpcserve.plan.ops import Cost
from mpcserve.plan.plan import Plan
from mpcserve.protocol import Together
from mpcserve.reference import evaluate_clear
from tests.plan_interpreter import Interpreter
from tests.plans import PlanWriter, even_chunks, inside

SEED = 20261123


def run(plan: Plan, *inputs: Any) -> list[Any]:
    """The protocol, equal to both references, at the predicted bill."""
    verify_plan(plan)
    reals = [np.asarray(x, np.float64) for x in inputs]
    outputs, bill = Together(plan, {}).infer(reals)
    assert bill == bill_of(plan)
    for other in (evaluate_clear(plan, {}, reals), Interpreter(plan, {}).run(*reals)):
        for got, expected in zip(outputs, other, strict=True):
            assert np.array_equal(got, expected)
    return outputs


def writer(*shape: int) -> tuple[PlanWriter, int, int]:
    """A plan with an input of 12 bits and the bit of its sign."""
    p = PlanWriter()
    x = p.input(shape, 12, bound=11)
    return p, x, p.sign(x, 12, even_chunks(12, 5), [3])


@pytest.mark.parametrize("shape", [(), (1,), (63,), (64,), (5, 13), (2, 3, 70)])
def test_a_revealed_bit_costs_a_bit_and_is_exact(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(SEED)
    p, _, bit = writer(*shape)
    plan = p.done(bit, p.emit("xor", [bit], width=1, flip=1))
    v = rng.integers(-2000, 2000, shape)
    negative, other = run(plan, v)
    assert np.array_equal(negative, v < 0)
    assert np.array_equal(other, v >= 0)
    size = (v.size + 7) // 8
    assert bill_of(plan).bytes["alice->client"] == 2 * size + 32 + 16


def test_bits_move_and_join_without_a_byte() -> None:
    rng = np.random.default_rng(SEED)
    p, x, bit = writer(3, 5, 7)
    alone = bill_of(inside(p.done(bit))).online_bytes
    one = p.emit("slice", [bit], width=1, starts=[1, 0, 0], stops=[2, 5, 7], steps=[1, 2, 3])
    outs = [
        p.emit("transpose", [bit], width=1, perm=[2, 0, 1]),
        p.emit("concat", [bit, bit], width=1, axis=1),
        p.emit("gather", [bit], width=1, axis=2, indices=[6, 0, 0, 3]),
        p.shaped("expand", one, (4, 3, 3), 1),
        p.shaped("reshape", bit, (15, 7), 1),
        p.emit("odd", [x], width=1),
        p.emit("xor", [bit, p.emit("odd", [x], width=1), bit], width=1, flip=1),
    ]
    plan = p.done(*outs)
    assert bill_of(plan).online_bytes == alone
    v = rng.integers(-2000, 2000, (3, 5, 7))
    assert np.array_equal(run(plan, v)[5], v % 2)


@pytest.mark.parametrize("width", [4, 17, 33, 64])
@pytest.mark.parametrize("size", [1, 64, 77, 1100])
def test_a_tally_counts_bits_in_one_round(width: int, size: int) -> None:
    rng = np.random.default_rng([SEED, width, size])
    p, _, bit = writer(3, size)
    plan = p.done(p.emit("tally", [bit], width=width, bound=3, values=[3, -5, 1]))
    v = rng.integers(-2000, 2000, (3, size))
    assert np.array_equal(run(plan, v)[0], np.array([3, -5, 1]) @ (v < 0))
    told, id = bill_of(plan), plan.outputs[0].id
    assert (told.rounds, cost_of(plan, id).rounds) == (2, ())
    cost = cost_of(inside(plan), id)
    assert cost == Cost(((size * width + 7) // 8,), (3 * size * width + 7) // 8)


@pytest.mark.parametrize("bits", [2, 5, 9])
def test_a_wrapped_number_keeps_its_low_bits_and_its_sign_is_the_highest(bits: int) -> None:
    rng = np.random.default_rng([SEED, bits])
    p, x, _ = writer(300)
    low = p.emit("wrap", [x], width=bits, bits=bits)
    top = p.sign(low, bits, [bits - 1], [1])
    v = rng.integers(-2047, 2048, 300)
    wrapped, negative = run(p.done(low, top), v)
    half = 1 << (bits - 1)
    assert np.array_equal(wrapped, (v + half) % (2 * half) - half)
    assert np.array_equal(negative, wrapped < 0)


def test_the_law_keeps_bits_and_numbers_apart() -> None:
    p, x, bit = writer(4)
    bad = {
        "takes a bit for a number": p.emit("add", [bit, bit], width=4),
        "takes something for a bit": p.emit("xor", [x, x], width=1, flip=0),
        "width 9 of a number mod 2": p.emit("wrap", [x], width=9, bits=5),
    }
    for message in bad:
        with pytest.raises(PlanError) as caught:
            verify_plan(p.done(*bad.values()))
        assert any(message in problem for problem in caught.value.problems)
