"""Widths by demand: every value as wide as its readers need, extends only where they must be."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from mpcserve.compiler import compile_model
from mpcserve.compiler.builder import Builder
from mpcserve.compiler.chunks import sign_chunks
from mpcserve.compiler.widths import extended
from mpcserve.errors import ModelError
from mpcserve.plan import Instruction, Plan, cost_of, verify_plan
from mpcserve.plan.ops import OPS
from tests.onnx_cases import agree, model_of, node, ops_of, rng_of


def eye(n: int) -> Any:
    return np.eye(n, dtype=np.float32)


def chain(*ops: str, n: int = 4) -> onnx.ModelProto:
    """MatMul by the identity, Relu or Neg one after the other."""
    nodes, name = [], "x"
    for position, op in enumerate(ops):
        out = "y" if position == len(ops) - 1 else f"h{position}"
        nodes.append(node(op, [name, "w"] if op == "MatMul" else [name], [out]))
        name = out
    return model_of(nodes, {"x": (2, n)}, {"w": eye(n)})


def instructions(plan: Plan, op: str) -> list[Instruction]:
    return [i for i in plan.instructions if i.op == op]


def test_a_layer_costs_four_rounds_and_the_stated_bits() -> None:
    n = 512
    plan = compile_model(chain("MatMul", "Relu", "MatMul", n=n), input_range=(-1, 1)).plan
    product, last = instructions(plan, "matmul")
    (sign,), (select,) = instructions(plan, "sign"), instructions(plan, "select")
    m, wide = product.value.width, select.value.width
    # One bit above the bound, no more; as wide behind as the next accumulator.
    assert m == product.value.bound + 1
    assert wide == last.attrs["ring"] == last.value.bound + 1 + last.attrs["truncate"]
    chunks = len(sign.attrs["chunks"])
    assert (sum(sign.attrs["chunks"]), sign.attrs["groups"]) == (m - 1, [chunks])
    costs = [cost_of(plan, i.id) for i in (product, sign, select)]
    assert sum(len(c.rounds) for c in costs) == 4
    bits = 8 * sum(sum(c.rounds) for c in costs) / product.value.size
    assert bits == m + 2 * (chunks - 1) + 1 + wide


def test_the_last_layer_is_as_narrow_as_its_bound() -> None:
    plan = compile_model(chain("MatMul")).plan
    value = plan.value(plan.outputs[0].id)
    assert value.width == value.bound + 1


def test_inputs_are_as_wide_as_the_first_accumulator() -> None:
    plan = compile_model(chain("MatMul")).plan
    (product,) = instructions(plan, "matmul")
    assert plan.value(plan.inputs[0].id).width == product.attrs["ring"]


def test_a_relu_needs_no_extend_however_many_layers_follow() -> None:
    plan = compile_model(chain(*["MatMul", "Relu"] * 6)).plan
    assert not instructions(plan, "extend")


@pytest.mark.parametrize(("layers", "extends"), [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2)])
def test_a_chain_of_linear_layers_is_extended_only_where_its_ring_would_pass_64(
    layers: int, extends: int
) -> None:
    rng = rng_of(1)
    model = chain(*["MatMul"] * layers)
    compiled = agree(model, [rng.uniform(-1, 1, (2, 4)).astype(np.float32)], ulps=layers, rng=rng)
    assert len(instructions(compiled.plan, "extend")) == extends


def test_no_extend_could_be_left_out() -> None:
    plan = compile_model(chain(*["MatMul"] * 5)).plan
    for i in instructions(plan, "extend"):
        (product,) = (plan[j] for j in i.inputs)
        assert i.value.width + product.attrs["truncate"] > 64


def test_an_extend_goes_where_it_touches_the_fewest_elements() -> None:
    # Both branches of the sum are products that cannot deliver what the last two layers need.
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("MatMul", ["x", "v"], ["b"]),
        node("Add", ["a", "b"], ["c"]),
        node("ReduceSum", ["c", "axes"], ["d"]),
        node("MatMul", ["d", "w"], ["e"]),
        node("MatMul", ["e", "w"]),
    ]
    constants = {"w": eye(4), "v": 2 * eye(4), "axes": np.array([0])}
    plan = compile_model(model_of(nodes, {"x": (6, 4)}, constants)).plan
    (extend,) = instructions(plan, "extend")
    assert extend.value.size == 4


def test_what_is_only_rearranged_is_extended_once() -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("Transpose", ["a"], ["t"]),
        node("MatMul", ["a", "t"], ["b"]),
        node("MatMul", ["b", "c"]),
    ]
    plan = compile_model(model_of(nodes, {"x": (3, 4)}, {"w": eye(4), "c": eye(3)})).plan
    extended = instructions(plan, "extend")
    assert sum(e.value.size for e in extended if e.value.size == 12) <= 12


def test_only_the_readers_that_need_it_read_the_extended_value() -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("MatMul", ["a", "w"], ["b"]),
        node("MatMul", ["b", "w"], ["y"]),
        node("Relu", ["a"], ["z"]),
    ]
    model = model_of(nodes, {"x": (2, 4)}, {"w": eye(4)}, outputs=["y", "z"])
    plan = compile_model(model).plan
    (extend,), (relu,) = instructions(plan, "extend"), instructions(plan, "rectify")
    assert relu.inputs == extend.inputs


def test_a_value_with_two_readers_has_the_wider_one_and_costs_the_narrow_one_nothing() -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("Relu", ["a"], ["z"]),
        node("MatMul", ["a", "w"], ["y"]),
    ]
    model = model_of(nodes, {"x": (2, 4)}, {"w": eye(4)}, outputs=["y", "z"])
    plan = compile_model(model).plan
    first, second = instructions(plan, "matmul")
    (relu,) = instructions(plan, "rectify")
    assert first.value.width == second.attrs["ring"] > first.value.bound + 1
    assert sum(relu.attrs["chunks"]) == first.value.bound


@pytest.mark.parametrize("seed", range(3))
def test_every_width_is_demanded_by_somebody(seed: int) -> None:
    rng = np.random.default_rng(seed)
    nodes = [
        node("Conv", ["x", "w"], ["c"], pads=[1] * 4),
        node("LeakyRelu", ["c"], ["l"], alpha=0.3),
        node("AveragePool", ["l"], ["p"], kernel_shape=[3, 3]),
        node("Flatten", ["p"], ["f"]),
        node("MatMul", ["f", "v"], ["m"]),
        node("Abs", ["m"], ["y"]),
    ]
    constants = {"w": rng.normal(size=(3, 2, 3, 3)), "v": rng.normal(size=(48, 5))}
    plan = compile_model(model_of(nodes, {"x": (1, 2, 6, 6)}, constants)).plan
    verify_plan(plan)
    outputs = {o.id for o in plan.outputs}
    for i in plan.instructions:
        if i.op == "sign" or i.value.width <= i.value.bound + 2 or i.id in outputs:
            continue
        assert any(
            i.value.width == _read(plan, r, i.id) for r in plan.instructions if i.id in r.inputs
        )


def _read(plan: Plan, reader: Instruction, x: int) -> int:
    """The width that an instruction takes from its operand x."""
    if "ring" in reader.attrs:
        return int(reader.attrs["ring"])
    if OPS[reader.op].local:
        return reader.value.width + int(reader.attrs.get("bits", 0))
    if reader.op == "sign":
        return int(sum(reader.attrs["chunks"])) + 1
    if reader.op == "select":
        return int(reader.attrs["widths"][reader.inputs[1::2].index(x)])
    return int(reader.attrs["width"])


@pytest.mark.parametrize("width", range(2, 65))
def test_chunks_cover_the_low_bits_evenly(width: int) -> None:
    chunks, groups = sign_chunks(width)
    assert sum(chunks) == width - 1
    assert sum(groups) == len(chunks)
    assert max(chunks) - min(chunks) <= 1
    assert max(groups) - min(groups) <= 1
    if width <= 9:
        assert chunks == [width - 1]
    else:
        assert max(chunks) <= 5 and len(chunks) == -(-(width - 1) // 5)
        assert (len(groups) == 1) == (len(chunks) <= 7)


def product_weights(model: onnx.ModelProto, **options: Any) -> tuple[Instruction, int]:
    plan = compile_model(model, **options).plan
    (product,) = instructions(plan, "matmul")
    return product, plan.value(product.inputs[1]).frac_bits


def just_above(value: float) -> NDArray[np.float32]:
    """Weights that no fixed number of fraction bits holds exactly."""
    return np.full((3, 2), np.nextafter(np.float32(value), np.float32(np.inf)))


def test_small_weights_keep_their_significant_bits() -> None:
    model = model_of([node("MatMul", ["x", "w"])], {"x": (1, 3)}, {"w": just_above(2.0**-12)})
    product, frac_bits = product_weights(model, input_range=(-1, 1))
    assert frac_bits == 16 - 4 + 12 and product.value.frac_bits == 16


def test_exact_weights_need_no_more_bits() -> None:
    model = model_of([node("MatMul", ["x", "w"])], {"x": (1, 3)}, {"w": np.full((3, 2), 2.0**-12)})
    assert product_weights(model, input_range=(-1, 1))[1] == 16


def test_large_inputs_ask_for_finer_weights() -> None:
    rng = rng_of(2)
    w = rng.normal(size=(3, 2)).astype(np.float32)
    model = model_of([node("MatMul", ["x", "w"])], {"x": (1, 3)}, {"w": w})
    x = rng.uniform(0, 4000, (1, 3)).astype(np.float32)
    _, frac_bits = product_weights(model, input_range=(0, 4000))
    assert frac_bits == 16 + 12 - 6
    agree(model, [x], ulps=80, rng=rng, input_range=(0, 4000))


def test_weights_give_up_bits_where_the_range_needs_them() -> None:
    model = model_of([node("MatMul", ["x", "w"])], {"x": (1, 3)}, {"w": just_above(2.0**10)})
    options: Any = {"input_range": (-(2.0**24), 2.0**24)}
    product, frac_bits = product_weights(model, **options)
    assert frac_bits < 16
    assert product.value.bound + product.attrs["truncate"] <= 62
    (note,) = (n for n in compile_model(model, **options).plan.notes if "weights of" in n)
    assert f"layer 'MatMul:y' have {frac_bits} fraction bits" in note


def test_weights_never_give_up_their_last_ten_significant_bits() -> None:
    model = model_of([node("MatMul", ["x", "w"])], {"x": (1, 3)}, {"w": np.full((3, 2), 0.75)})
    assert product_weights(model, input_range=(-(2.0**34), 2.0**34))[1] >= 10
    with pytest.raises(ModelError, match="does not fit 64 bits"):
        compile_model(model, input_range=(-(2.0**38), 2.0**38), frac_bits=16)


def test_inputs_that_large_weights_multiply_are_held_finer() -> None:
    model = model_of([node("MatMul", ["x", "w"])], {"x": (1, 3)}, {"w": np.full((3, 2), 300.0)})
    plan = compile_model(model, input_range=(0, 1)).plan
    # The norm of a column is 520 < 2^10; two bits of it are let pass.
    assert plan.value(plan.inputs[0].id).frac_bits == 16 + 10 - 2
    x = np.array([[0.1, 0.37, 0.9]], np.float32)
    agree(model, [x], ulps=3, input_range=(0, 1))


def test_the_plan_shows_nothing_of_the_weights_but_powers_of_two() -> None:
    texts = []
    for seed in (1, 2):
        w = np.random.default_rng(seed).uniform(0.3, 0.9, (5, 4)).astype(np.float32)
        model = model_of([node("MatMul", ["x", "w"])], {"x": (1, 5)}, {"w": w})
        texts.append(compile_model(model).plan.digest)
    assert texts[0] == texts[1]


def test_independent_branches_share_rounds() -> None:
    def rounds(branches: int) -> int:
        nodes = []
        for i in range(branches):
            nodes += [node("MatMul", ["x", f"w{i}"], [f"a{i}"]), node("Relu", [f"a{i}"], [f"r{i}"])]
        nodes.append(node("Sum", [f"r{i}" for i in range(branches)]))
        constants = {f"w{i}": (i + 1) * eye(4) for i in range(branches)}
        from mpcserve.plan import bill_of

        return bill_of(compile_model(model_of(nodes, {"x": (1, 4)}, constants)).plan).rounds

    assert (rounds(1), rounds(3)) == (2, 3)  # a sum is local: what it adds is opened


def test_ops_of_a_plan_are_few() -> None:
    assert ops_of(compile_model(chain("MatMul", "Relu")).plan) == ["matmul", "sign", "select"]


def test_an_extend_before_overlapping_parts_is_counted_once() -> None:
    b = Builder(16, 20)
    x = b.input("x", "float32", (8,), (-1.0, 1.0, "assumed"))
    h = b.mul(x, b.weight(np.full(8, 0.5), 40))
    for _ in range(12):
        h = b.slice(b.concat([b.slice(h, 0, k, k + 4) for k in range(4)], 0), 0, 0, 8)
    b.output("y", "float32", b.mul(h, b.weight(np.full(8, 0.5), 30)))
    draft = extended(b.draft())
    places = [step.inputs[0] for step in draft.steps if step.op == "extend"]
    # Twelve layers of four parts each are 4^12 ways to one value.
    assert [draft.steps[j].shape for j in places] == [(8,)]
