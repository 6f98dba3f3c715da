"""The bill is exact: formulas, shared rounds, and agreement with what the protocol sends."""

from __future__ import annotations

import numpy as np
import pytest

from mpcserve.plan import bill_of, schedule_of, verify_plan
from mpcserve.plan.plan import Plan
from mpcserve.protocol import OUTPUTS, WAITING, Together, drive, share_input
from tests.plans import PlanWriter, even_chunks, inside

ELEMENTS = 128


def layer(p: PlanWriter, x: int, m: int, n: int) -> int:
    """Linear + truncate + ReLU of ELEMENTS outputs, m bits wide inside, n bits at its end."""
    w = p.weight((64, ELEMENTS), 40, bound=10)
    z = p.emit("matmul", [x, w], width=m, frac_bits=-13, bound=m - 2, ring=40, truncate=13)
    bit = p.sign(z, m, even_chunks(m, 5), [len(even_chunks(m, 5))])
    return p.emit(
        "select", [bit, z], width=n, frac_bits=-13, bound=m - 1, reads=m, when=0, nonnegative=True
    )


def measured(plan: Plan) -> None:
    verify_plan(plan)
    rng = np.random.default_rng(1)
    weights = {
        name: rng.integers(-100, 100, plan.value(id).shape) for name, id in plan.weights.items()
    }
    inputs = [rng.integers(-100, 100, s.shape).astype(float) for s in plan.inputs]
    assert Together(plan, weights).infer(inputs)[1] == bill_of(plan)


@pytest.mark.parametrize(("m", "n"), [(20, 64), (24, 64), (20, 40), (16, 32)])
def test_linear_truncate_relu_is_four_rounds_of_the_stated_bits(m: int, n: int) -> None:
    p = PlanWriter()
    plan = p.done(layer(p, p.input((1, 64), 40, bound=20), m, n))
    bill, chunks = bill_of(inside(plan)), len(even_chunks(m, 5))
    assert bill.rounds == 4
    assert bill.bytes["alice->bob"] * 8 == (m + 2 * (chunks - 1) + 1 + n) * ELEMENTS
    assert bill.bytes["alice->bob"] == bill.bytes["bob->alice"]
    measured(inside(plan))


def test_what_only_the_data_owner_reads_is_not_opened() -> None:
    """One round less, and no byte between the servers for it."""
    p = PlanWriter()
    plan = p.done(layer(p, p.input((1, 64), 40, bound=20), 20, 40))
    told, opened = bill_of(plan), bill_of(inside(plan))
    assert (told.rounds, opened.rounds) == (3, 4)
    assert opened.bytes["alice->bob"] - told.bytes["alice->bob"] == 40 * ELEMENTS // 8
    assert told.bytes["alice->client"] == opened.bytes["alice->client"]
    assert told.dealt_bytes == opened.dealt_bytes
    measured(plan)


def product() -> tuple[PlanWriter, int]:
    """A linear layer of 23 bits."""
    p = PlanWriter()
    x, w = p.input((1, 64), 40, bound=20), p.weight((64, ELEMENTS), 40, bound=10)
    at = {"frac_bits": -13, "bound": 20, "ring": 40, "truncate": 13}
    return p, p.emit("matmul", [x, w], width=23, **at)


def test_an_output_in_another_shape_is_not_opened_either() -> None:
    p, z = product()
    plan = p.done(p.shaped("reshape", z, (ELEMENTS, 1), 23))
    assert plan.unopened == {z: 0}
    measured(plan)


@pytest.mark.parametrize("reader", ["output", "view", "sum", "narrow view"])
def test_what_something_else_reads_is_opened(reader: str) -> None:
    p, z = product()
    if reader == "output":
        plan = p.done(z, z)
    elif reader == "view":
        plan = p.done(z, p.shaped("reshape", z, (ELEMENTS, 1), 23))
    elif reader == "sum":
        plan = p.done(p.emit("add", [z, z], width=23, frac_bits=-13, bound=21))
    else:
        plan = p.done(p.shaped("reshape", z, (ELEMENTS, 1), 22))
    assert plan.unopened == {}
    assert bill_of(plan).rounds == 1
    measured(plan)


def test_a_linear_layer_is_one_round_of_its_width() -> None:
    p = PlanWriter()
    x, w = p.input((1, 64), 40, bound=20), p.weight((64, ELEMENTS), 40, bound=10)
    z = p.emit("matmul", [x, w], width=23, frac_bits=-13, bound=22, ring=40, truncate=13)
    plan = p.done(z)
    assert bill_of(inside(plan)).rounds == 1
    assert bill_of(inside(plan)).bytes["alice->bob"] * 8 == 23 * ELEMENTS
    assert bill_of(plan).dealt_bytes * 8 == 40 * ELEMENTS
    measured(plan)


def test_two_independent_branches_cost_the_rounds_of_one() -> None:
    p = PlanWriter()
    x = p.input((1, 64), 40, bound=20)
    one, two = layer(p, x, 20, 40), layer(p, x, 20, 40)
    plan = p.done(p.emit("add", [one, two], width=40, frac_bits=-13, bound=21))
    assert bill_of(plan).rounds == 4
    assert len(schedule_of(plan).levels) == 5
    measured(plan)


def test_branches_of_different_length_advance_together() -> None:
    p = PlanWriter()
    x = p.input((1, 64), 40, bound=20)
    w = p.weight((64, ELEMENTS), 40, bound=10)
    short = p.emit("matmul", [x, w], width=27, frac_bits=-13, bound=22, ring=40, truncate=13)
    long = layer(p, x, 20, 27)
    plan = p.done(p.emit("sub", [long, short], width=27, frac_bits=-13, bound=23))
    assert bill_of(plan).rounds == 4
    measured(plan)


def test_dealt_bits_are_no_more_than_the_published_formulas() -> None:
    m, n, chunks = 24, 64, even_chunks(24, 5)
    j = len(chunks)
    p = PlanWriter()
    x = p.input((ELEMENTS,), m, bound=m - 2)
    bit = p.sign(x, m, chunks, [j])
    y = p.emit("select", [bit, x], width=n, bound=m - 1, reads=m, when=0, nonnegative=True)
    dealt = bill_of(p.done(y)).dealt_bytes * 8 / ELEMENTS
    published = sum(2**c - 1 for c in chunks) + 1 + 3 * 2 ** (j - 1) - 3 + 5 * n
    ours = sum(2**c - 1 for c in chunks) + 1 + 3 * 2 ** (j - 1) - 3 - 2 * (j - 1)
    assert dealt == ours + 2 * n + 3 * (n - m)
    assert dealt < published


def test_a_watch_sees_every_instruction_and_every_round() -> None:
    p = PlanWriter()
    plan = p.done(layer(p, p.input((1, 64), 40, bound=20), 20, 40))
    rng = np.random.default_rng(2)
    weights = {n: rng.integers(-9, 9, plan.value(i).shape) for n, i in plan.weights.items()}
    together = Together(plan, weights)
    alice, bob, _ = together.prepare()
    x = np.zeros((1, 64))
    packed = [b"".join(share_input(plan, 0, x, alice.input_seeds[0], bob.input_seeds[0]))]
    seen: list[int] = []
    steps = together.alice.evaluate(alice, packed, seen.append)
    drive(steps, together.bob.evaluate(bob, packed))
    assert seen.count(WAITING) == bill_of(plan).rounds
    assert seen[-1] == OUTPUTS
    assert {i.id for i in plan.instructions if i.op in ("matmul", "sign", "select")} <= set(seen)
