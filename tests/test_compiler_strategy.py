"""What is traded for rounds: groups of values whose maximum is found at once, and chunk sizes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from mpcserve.compiler import CompiledModel, compile_model
from mpcserve.compiler.builder import Builder
from mpcserve.compiler.rectify import rectified
from mpcserve.compiler.strategy import BASIC, Strategy, fastest
from mpcserve.compiler.widths import assign_widths, extended
from mpcserve.plan import bill_of
from mpcserve.plan.estimate import LINES, Line, online_seconds
from mpcserve.plan.plan import plan_from_json
from mpcserve.protocol import Together

LOOPBACK, LAN, WAN = LINES


def pool_model(
    kernel: list[int], strides: list[int], pads: list[int], image: tuple[int, int] = (9, 8)
) -> bytes:
    """One max pooling of an image of two channels."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, *image])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    node = helper.make_node(
        "MaxPool", ["x"], ["y"], "pool", kernel_shape=kernel, strides=strides, pads=pads
    )
    graph = helper.make_graph([node], "pool", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


def agree(model: bytes, compiled: CompiledModel) -> None:
    """The real protocol, by its bill, against onnxruntime; ties and negative values included."""
    rng = np.random.default_rng(7)
    x = np.round(rng.uniform(-3, 3, (1, 2, 9, 8)) * 2).astype(np.float32) / 2
    (got,), bill = Together(compiled.plan, compiled.weights).infer([x])
    assert bill == bill_of(compiled.plan)
    (expected,) = ort.InferenceSession(model).run(None, {"x": x})
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.name)
@pytest.mark.parametrize(
    ("kernel", "strides", "pads"),
    [
        ([2, 2], [2, 2], [0, 0, 0, 0]),
        ([1, 3], [1, 2], [0, 1, 0, 1]),
        ([3, 3], [2, 2], [1, 1, 1, 1]),
        ([4, 1], [1, 1], [0, 0, 0, 0]),
        ([5, 2], [1, 1], [0, 0, 0, 0]),
    ],
)
def test_max_pooling_is_exact_however_it_is_grouped(
    kernel: list[int], strides: list[int], pads: list[int], line: Line
) -> None:
    model = pool_model(kernel, strides, pads)
    agree(model, compile_model(model, input_range=(-3, 3), line=line))


def test_a_slow_network_gets_fewer_rounds() -> None:
    model = pool_model([2, 2], [2, 2], [0, 0, 0, 0], (90, 80))
    near, far = (bill_of(compile_model(model, line=at).plan) for at in (None, WAN))
    assert far.rounds == 4
    assert near.rounds == 6
    assert far.dealt_bytes > near.dealt_bytes


def relu_model(count: int) -> bytes:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, count])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"], "relu")], "relu", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


@pytest.mark.parametrize(("count", "near", "lan", "far"), [(100, 1, 1, 1), (2000, 2, 2, 1)])
def test_a_round_is_saved_where_dealing_for_it_is_quicker(
    count: int, near: int, lan: int, far: int
) -> None:
    """Less the round of an output that is not opened."""
    model = relu_model(count)
    plans = {at: compile_model(model, input_range=(-8, 8), line=at).plan for at in (None, LAN, WAN)}
    for (at, plan), rounds in zip(plans.items(), (near, lan, far), strict=True):
        assert bill_of(plan).rounds == rounds, at
        saved = any(i.op == "rectify" for i in plan.instructions)
        assert saved == (rounds == 1)
        assert saved == any(
            a.chosen and "max(x, 0) in two rounds" in a.how for a in plan.alternatives
        )
        if saved:
            assert not any(i.op in ("sign", "select") for i in plan.instructions)


def test_with_no_network_declared_only_the_plan_of_fewest_bytes_saves_rounds() -> None:
    """Larger chunks deal more everywhere: a round that is saved with them alone is no reason."""
    plan = compile_model(relu_model(4), input_range=(-8, 8)).plan
    five, eight = Strategy(BASIC, 5), Strategy(BASIC, 8)
    saving = replace(eight, rectified=True)
    assert fastest([five, eight, saving], [plan] * 3, None) == 0
    five_saving = replace(five, rectified=True)
    assert fastest([five, eight, saving, five_saving], [plan] * 4, None) == 3


def test_only_a_sign_that_nothing_else_reads_is_joined_with_its_selection() -> None:
    for way, joined in (("relu", 1), ("negative part", 0), ("bit read", 0), ("other value", 0)):
        b = Builder(16, 21)
        x, v = (b.input(n, "float64", (4,), (-8.0, 8.0, "proved")) for n in ("x", "v"))
        bit = b.sign(x)
        chosen = v if way == "other value" else x
        kept = way != "negative part"
        y = b.select(bit, chosen, 0 if kept else 1, nonnegative=kept and chosen is x)
        b.output("y", "float64", y)
        if way == "bit read":
            b.output("z", "float64", b.weighted([bit], [1.0], 0))
        plan = assign_widths(extended(b.draft()), way)
        found = rectified(plan, LOOPBACK)
        assert (found is not None) == bool(joined), way


def test_the_plan_says_what_was_compared_and_chosen() -> None:
    plan = compile_model(pool_model([2, 2], [2, 2], [0, 0, 0, 0]), line=WAN).plan
    (chosen,) = [a for a in plan.alternatives if a.chosen]
    others = [a for a in plan.alternatives if not a.chosen]
    assert others and any(n.startswith(f"chosen for wan: {chosen.how}") for n in plan.notes)
    assert chosen.rounds == bill_of(plan).rounds
    assert all(list(a.seconds) == [line.name for line in LINES] for a in plan.alternatives)
    assert all(a.seconds["wan"] >= chosen.seconds["wan"] for a in others)
    assert plan_from_json(plan.to_json()) == plan


def test_an_estimate_grows_with_round_trips_and_shrinks_with_bandwidth() -> None:
    plan = compile_model(pool_model([2, 2], [2, 2], [0, 0, 0, 0])).plan
    near = online_seconds(plan, LOOPBACK)
    far = online_seconds(plan, Line("far", rtt=0.1))
    thin = online_seconds(plan, Line("thin", bits_per_second=1e4))
    assert far == pytest.approx(near + bill_of(plan).rounds * 0.05 + 0.1)
    assert thin > near + bill_of(plan).bytes["alice->bob"] * 8 / 1e4 / 2
