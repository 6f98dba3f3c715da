"""Several requests in one evaluation: each gets what it would have got alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpcserve.compiler import compile_model
from mpcserve.plan import Plan, bill_of, verify_plan
from mpcserve.plan.stack import can_stack, stack
from mpcserve.protocol import Dealer, ServerProgram, Together, drive, reveal, share_input
from mpcserve.reference import evaluate_clear
from tests.plans import PlanWriter, even_chunks

SEED = 20261123
MODELS = Path(__file__).parent.parent / "models"


def run(plan: Plan, requests: list[list[np.ndarray]], **weights: np.ndarray) -> list[list[object]]:
    """The stacked plan is lawful, takes the plan's rounds, and costs what its own bill says."""
    stacked = stack(plan, len(requests)).plan
    verify_plan(stacked)
    outputs, bill = Together(plan, weights).infer_all(
        [[np.asarray(x, np.float64) for x in r] for r in requests]
    )
    expected = bill_of(stacked)
    assert bill.rounds == expected.rounds == bill_of(plan).rounds
    for way in ("alice->bob", "bob->alice", "carol->bob"):
        assert bill.bytes[way] == expected.bytes[way]
        assert bill.bytes[way] <= len(requests) * bill_of(plan).bytes[way]
    return outputs


def test_local_ops_of_a_slot_are_those_of_the_plan() -> None:
    rng = np.random.default_rng(SEED)
    p = PlanWriter()
    x, y = p.input((2, 3, 4), 30, bound=20), p.input((3, 1), 30, bound=20)
    c = p.constant((4,), [1, -2, 3, -4], 30)
    flat = p.shaped("reshape", x, (24,), 30)
    outs = [
        p.emit("add", [x, y], width=30, bound=21),
        p.emit("sub", [y, x], width=25, bound=21),
        p.emit("add", [c, x], width=30, bound=21),
        p.emit("concat", [p.shaped("reshape", c, (1, 4), 30), y_row(p, y)], width=30, axis=1),
        p.emit("scale", [x], width=30, bound=23, factor=5),
        p.emit("offset", [x], width=30, bound=21, value=-12345),
        p.shaped("expand", y, (2, 3, 4), 30),
        p.emit("transpose", [x], width=30, bound=20, perm=[2, 0, 1]),
        p.emit("slice", [flat], width=30, bound=20, starts=[1], stops=[24], steps=[5]),
        p.emit("pad", [x], width=30, bound=20, before=[0, 1, 0], after=[1, 0, 2], value=-99),
        p.emit("gather", [x], width=30, bound=20, axis=2, indices=[3, 3, 0]),
        p.emit("gather", [x], width=30, bound=20, axis=2, indices=[0, 2]),
        p.emit("sum", [x], width=30, bound=25, axes=[0, 1, 2]),
        p.emit("sum", [x], width=30, bound=24, axes=[0, 2]),
    ]
    plan = p.done(*outs)
    requests = [[rng.integers(-9999, 9999, s.shape) for s in plan.inputs] for _ in range(3)]
    for got, given in zip(run(plan, requests), requests, strict=True):
        for mine, alone in zip(got, evaluate_clear(plan, {}, given), strict=True):
            assert np.array_equal(mine, alone)


def test_bits_of_a_slot_are_those_of_the_plan() -> None:
    rng = np.random.default_rng(SEED + 2)
    p = PlanWriter()
    x = p.input((5, 3), 20, bound=12)
    low = p.emit("odd", [x], width=1, bound=0)
    negative = p.sign(x, 20, even_chunks(20, 5), [4])
    either = p.emit("xor", [low, negative], width=1, bound=0, flip=True)
    turned = p.emit("transpose", [either], width=1, bound=0, perm=[1, 0])
    outs = [
        either,
        turned,
        p.emit("gather", [low], width=1, bound=0, axis=0, indices=[4, 0, 0]),
        p.emit("tally", [either], width=20, bound=8, values=[1, 2, 4, 8, 16]),
        p.emit("tally", [turned], width=20, bound=8, values=[1, -2, 40]),
        p.emit("wrap", [x], width=6, bound=5, bits=6),
        p.emit(
            "combine", [x], width=20, bound=15, axis=1, taps=2,
            indices=[0, 1, 2, 2, 0, 1], factors=[1, 2, -3, 4, 5, 6],
        ),
    ]  # fmt: skip
    plan = p.done(*outs)
    requests = [[rng.integers(-2000, 2000, (5, 3))] for _ in range(3)]
    for got, given in zip(run(plan, requests), requests, strict=True):
        for mine, alone in zip(got, evaluate_clear(plan, {}, given), strict=True):
            assert np.array_equal(mine, alone)


@pytest.mark.parametrize("size", [1, 7, 8, 67])
def test_what_is_not_opened_is_cut_into_slots(size: int) -> None:
    """No slot's part need begin at a whole byte of what all take together."""
    rng = np.random.default_rng([SEED, size])
    p = PlanWriter()
    x = p.input((size,), 20, bound=12)
    negative, low = p.sign(x, 20, even_chunks(20, 5), [4]), p.emit("odd", [x], width=1, bound=0)
    outs = [
        p.sign(x, 20, even_chunks(20, 4), [5]),
        p.emit("rectify", [x], width=23, bound=13, chunks=[7, 6, 6]),
        p.emit("select", [negative, x], width=21, bound=12, reads=20, when=1, nonnegative=False),
        p.emit("all", [negative, low], width=1, bound=0, when=[0, 1]),
        p.emit("tally", [p.shaped("reshape", low, (1, size), 1)], width=5, bound=3, values=[5]),
    ]
    plan = p.done(*outs)
    assert list(plan.unopened) == outs
    requests = [[rng.integers(-2000, 2000, (size,))] for _ in range(3)]
    for got, given in zip(run(plan, requests), requests, strict=True):
        for mine, alone in zip(got, evaluate_clear(plan, {}, given), strict=True):
            assert np.array_equal(mine, alone)


def y_row(p: PlanWriter, y: int) -> int:
    """(3, 1) as one row."""
    return p.shaped("reshape", y, (1, 3), 30)


def test_every_primitive_of_a_slot_is_that_of_the_plan() -> None:
    rng = np.random.default_rng(SEED + 1)
    p = PlanWriter()
    x = p.input((2, 3, 5, 5), 40, bound=8)
    w, d = p.weight((4, 3, 3, 3), 40, bound=8), p.weight((4, 1, 1), 40, bound=10)
    at = {"strides": [1, 1], "pads": [0, 0, 0, 0], "dilations": [1, 1], "groups": 1}
    z = p.emit("conv", [x, w, d], width=24, bound=16, ring=24, truncate=0, **at)
    bit = p.sign(z, 24, even_chunks(24, 5), [5])
    y = p.emit("select", [bit, z], width=40, bound=16, reads=24, when=0, nonnegative=True)
    other = p.emit("all", [bit, p.sign(y, 40, even_chunks(40, 5), [4, 4])], width=1, when=[1, 0])
    part = p.emit("select", [other, z], width=40, bound=16, reads=24, when=1, nonnegative=False)
    flat, side = p.shaped("reshape", y, (2, 36), 40), p.shaped("reshape", part, (36, 2), 40)
    v = p.weight((36, 3), 40, bound=4)
    outs = [
        y,
        part,
        p.emit("matmul", [flat, v], width=40, bound=33, ring=40, truncate=0),
        p.emit("mul", [part, y], width=40, bound=33, ring=40, truncate=0),
        p.emit("matmul", [flat, side], width=40, bound=39, ring=40, truncate=0),
        p.emit(
            "mul", [flat, p.weight((36,), 40, bound=3)], width=40, bound=30, ring=40, truncate=0
        ),
    ]
    plan = p.done(*outs)
    weights = {name: rng.integers(-7, 8, plan.value(id).shape) for name, id in plan.weights.items()}
    requests = [[rng.integers(-200, 200, (2, 3, 5, 5))] for _ in range(3)]
    for got, given in zip(run(plan, requests, **weights), requests, strict=True):
        for mine, alone in zip(got, evaluate_clear(plan, weights, given), strict=True):
            assert np.array_equal(mine, alone)


@pytest.mark.parametrize("slots", [2, 5])
def test_a_model_answers_each_request_as_if_it_were_alone(slots: int) -> None:
    compiled = compile_model(
        MODELS / "mnist_cnn.onnx", calibrate=MODELS / "mnist_calibration.npy", batch=1
    )
    samples = np.load(MODELS / "mnist_samples.npy")
    requests = [[samples[k : k + 1]] for k in range(slots)]
    answers = run(compiled.plan, requests, **compiled.weights)
    for (answer,), request in zip(answers, requests, strict=True):
        (expected,) = evaluate_clear(compiled.plan, compiled.weights, request)
        assert np.abs(answer - expected).max() < 0.02


def test_a_slot_without_an_owner_changes_no_other_and_is_told_to_nobody() -> None:
    p = PlanWriter()
    x = p.input((3,), 30, bound=10)
    w = p.weight((3,), 30, bound=10)
    plan = p.done(p.emit("mul", [x, w], width=30, bound=20, ring=30, truncate=0))
    together = Together(plan, {"w1": np.array([2, -3, 5])})
    alice, bob, _ = together.prepare(3)
    given = np.array([7.0, 8.0, 9.0])
    packed = [b"".join(share_input(plan, 0, given, a, b)) for (a,), (b,) in _seeds(alice, bob)]
    inputs = [[packed[0]], None, [packed[2]]]
    _, _, (mine, theirs) = drive(
        together.alice.evaluate_all(alice, inputs), together.bob.evaluate_all(bob, inputs)
    )
    assert (mine[1], theirs[1]) == (None, None)
    for k in (0, 2):
        assert np.array_equal(reveal(plan, mine[k], theirs[k])[0], [14, -24, 45])


def test_slots_have_masks_and_tags_of_their_own() -> None:
    p = PlanWriter()
    plan = p.done(p.emit("scale", [p.input((3,), 30, bound=10)], width=30, bound=11, factor=1))
    together = Together(plan, {})
    alice, bob, _ = together.prepare(4)
    assert len({s for side in (alice, bob) for slot in side.seeds for s in slot}) == 8
    same = [bytes(24)] * 4
    inputs = [[data[:12]] for data in same]
    _, _, (mine, _) = drive(
        together.alice.evaluate_all(alice, inputs), together.bob.evaluate_all(bob, inputs)
    )
    assert len(set(mine)) == 4
    assert len({message[:32] for message in mine if message}) == 4


def _seeds(alice: object, bob: object) -> list[tuple[object, object]]:
    return list(zip(alice.seeds, bob.seeds, strict=True))


def test_a_plan_whose_slots_cannot_share_a_batch_is_known() -> None:
    p = PlanWriter()
    x, k = p.input((1, 1, 4, 4), 40, bound=8), p.input((1, 1, 2, 2), 40, bound=8)
    at = {"strides": [1, 1], "pads": [0, 0, 0, 0], "dilations": [1, 1], "groups": 1}
    plan = p.done(p.emit("conv", [x, k], width=40, bound=20, ring=40, truncate=0, **at))
    assert not can_stack(plan)
    p = PlanWriter()
    fixed = p.weight((2,), 20, bound=8)
    assert not can_stack(p.done(p.emit("scale", [fixed], width=20, bound=9, factor=2)))


def test_programs_of_many_slots_hold_no_weights_of_their_own() -> None:
    p = PlanWriter()
    x, w = p.input((1, 4), 40, bound=8), p.weight((4, 8), 40, bound=8)
    plan = p.done(p.emit("matmul", [x, w], width=40, bound=20, ring=40, truncate=0))
    keys = [bytes([k]) * 32 for k in (1, 2, 3)]
    program = ServerProgram(plan, "alice", keys[0], keys[2], [("w1", np.ones((4, 8), np.uint64))])
    before = dict(program._fixed.products)
    program.prepare(bytes(16), None, 7)
    assert program._fixed.products == before
    assert len(list(Dealer(plan, keys[0], keys[1]).deal(bytes(16), 7))) == 1
