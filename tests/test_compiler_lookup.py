"""Tables at secret places: embeddings of token ids that the data owner keeps to itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from mpcserve.compiler import compile_model
from mpcserve.compiler.lookup import Digits, digits_for
from mpcserve.errors import InputError, ModelError
from mpcserve.plan import bill_of
from mpcserve.plan.plan import plan_from_json
from mpcserve.protocol import Together, share_input, simulate
from mpcserve.serving.inputs import check_inputs
from tests.onnx_cases import Array, model_of, node, plain, rng_of

F32 = np.float32


def with_ids(
    nodes: list[Any], constants: dict[str, Array], ids: dict[str, Any], opset: int = 13
) -> onnx.ModelProto:
    """A model of integer inputs and one real output."""
    model = model_of(nodes, ids, constants, opset=opset, kind=TensorProto.INT64)
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    return model


def agrees(model: onnx.ModelProto, inputs: list[Array], error: float = 1e-4, **options: Any) -> Any:
    made = compile_model(model, **options)
    (got,), bill = Together(made.plan, made.weights).infer(inputs)
    assert bill == bill_of(made.plan)
    expected = plain(model, *inputs)[0]
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= error
    return made


@pytest.mark.parametrize(("places", "digits"), [(30, 1), (3000, 3)])
def test_an_embedding_of_secret_ids_is_exact_and_short(places: int, digits: int) -> None:
    rng = rng_of(1)
    table = rng.normal(size=(places, 16))
    model = with_ids([node("Gather", ["t", "ids"])], {"t": table}, {"ids": (1, 8)})
    ids = rng.integers(0, places, (1, 8))
    ids[0, :2] = 0, places - 1
    made = agrees(model, [ids], 2.0**-16)
    assert bill_of(made.plan).rounds == (1 if digits == 1 else 2)
    # far fewer bytes than rows of 64-bit words
    assert bill_of(made.plan).bytes["client->alice"] <= 8 * places * (22 if digits == 1 else 8) / 8
    assert plan_from_json(made.plan.to_json()) == made.plan


def test_what_no_table_has_is_refused_by_the_client() -> None:
    model = with_ids([node("Gather", ["t", "ids"])], {"t": np.ones((10, 2))}, {"ids": (1, 3)})
    made = compile_model(model)
    for bad in (np.array([[0, 10, 1]]), np.array([[0, -1, 1]])):
        with pytest.raises(InputError, match=r"\[0, 9\]"):
            check_inputs(made.plan, bad, "error")
        with pytest.raises(InputError, match="0 to 9"):
            next(share_input(made.plan, 0, bad, bytes(32), bytes(32)))


def test_one_input_reads_several_tables_behind_moves() -> None:
    rng = rng_of(2)
    nodes = [
        node("Slice", ["ids", "one", "four", "one"], ["part"]),
        node("Unsqueeze", ["part", "zero"], ["wide"]),
        node("Gather", ["t", "wide"], ["a"]),
        node("Transpose", ["ids"], ["turned"]),
        node("Gather", ["u", "turned"], ["b"], axis=1),
        node("ReduceSum", ["a"], ["c"], keepdims=0),
        node("ReduceSum", ["b", "zero"], ["d"], keepdims=0),
        node("Add", ["c", "d"]),
    ]
    constants = {"t": rng.normal(size=(9, 3)), "u": rng.normal(size=(2, 9)), "one": np.array([1])}
    constants |= {"four": np.array([4]), "zero": np.array([0])}
    model = with_ids(nodes, constants, {"ids": (2, 4)})
    agrees(model, [rng.integers(0, 9, (2, 4))], 2e-3)


def test_an_index_may_also_be_a_number() -> None:
    nodes = [node("Gather", ["t", "ids"], ["a"]), node("Cast", ["ids"], ["b"], to=1),
             node("Add", ["a", "b"])]  # fmt: skip
    model = with_ids(nodes, {"t": np.arange(7) / 7}, {"ids": (1, 5)})
    agrees(model, [np.array([[0, 6, 3, 2, 2]])])


def test_a_mask_of_integers_is_a_flag_and_hides_scores() -> None:
    nodes = [node("Cast", ["mask"], ["m"], to=1), node("Sub", ["one", "m"], ["n"]),
             node("Mul", ["n", "low"], ["p"]), node("Gather", ["t", "ids"], ["e"]),
             node("Add", ["e", "p"], ["s"]), node("Softmax", ["s"], axis=-1)]  # fmt: skip
    rng = rng_of(3)
    constants = {"one": F32(1), "low": F32(np.finfo(F32).min), "t": rng.normal(size=20)}
    model = with_ids(nodes, constants, {"mask": (1, 6), "ids": (1, 6)})
    made = agrees(model, [np.array([[1, 1, 1, 0, 1, 0]]), rng.integers(0, 20, (1, 6))], 1e-3)
    assert {i.name: (i.low, i.high) for i in made.plan.inputs} == {"mask": (0, 1), "ids": (0, 19)}


def test_a_table_is_read_at_the_largest_element() -> None:
    rng = rng_of(4)
    model = model_of(
        [node("ArgMax", ["x"], ["k"], axis=1, keepdims=0), node("Gather", ["t", "k"])],
        {"x": (3, 6)},
        {"t": rng.normal(size=(6, 4))},
    )
    x = rng.permuted(np.linspace(-1, 1, 18)).reshape(3, 6).astype(F32)
    agrees(model, [x], input_range=(-1.0, 1.0))


def test_an_index_that_may_lie_outside_of_its_table_is_refused() -> None:
    model = model_of(
        [node("ArgMax", ["x"], ["k"], axis=1, keepdims=0), node("Gather", ["t", "k"])],
        {"x": (3, 6)},
        {"t": np.ones((4, 2))},
    )
    with pytest.raises(ModelError, match="table of 4"):
        compile_model(model, input_range=(-1.0, 1.0))


def test_a_calibrated_index_reads_what_its_table_has() -> None:
    nodes = [
        node("CumSum", ["mask", "one"], ["sums"]),
        node("Mul", ["sums", "mask"], ["k"]),
        node("Gather", ["t", "k"]),
    ]
    t = rng_of(9).normal(size=(7, 2)).astype(np.float32)
    model = with_ids(nodes, {"t": t, "one": np.array(1)}, {"mask": (1, 6)})
    mask = (np.arange(6) < np.arange(3, 7)[:, None]).astype(np.int64)
    made = compile_model(model, calibrate={"mask": mask})
    (got,), _ = simulate(made.plan, made.weights, [mask[1:2]])
    assert np.abs(got - plain(model, mask[1:2])[0]).max() <= 1e-3


def test_equal_whole_numbers_are_found_at_any_index() -> None:
    rng = rng_of(9)
    nodes = [
        node("GatherElements", ["types", "ids"], ["k"], axis=1),
        node("Gather", ["t", "k"], ["kind"]),
        node("Gather", ["words", "ids"], ["word"]),
        node("Add", ["kind", "word"]),
    ]
    types = np.ones((1, 40), np.int64)
    tables = {"t": rng.normal(size=(2, 3)), "words": rng.normal(size=(40, 3))}
    model = with_ids(nodes, {"types": types, **tables}, {"ids": (1, 5)})
    made = agrees(model, [np.array([[3, 1, 4, 1, 39]])])
    assert sum(i.op == "matmul" for i in made.plan.instructions) == 1


def test_public_places_of_a_long_table_are_computed() -> None:
    places = np.array([[35, 2, 39]])
    constants = {
        "types": np.arange(40)[None] % 2,
        "at": places,
        "t": np.eye(2, 3),
        "w": np.eye(9, 3),
    }
    nodes = [
        node("GatherElements", ["types", "at"], ["k"], axis=1),
        node("Gather", ["t", "k"], ["kind"]),
        node("Gather", ["w", "ids"], ["word"]),
        node("Add", ["kind", "word"]),
    ]
    agrees(with_ids(nodes, constants, {"ids": (1, 3)}), [np.array([[3, 1, 8]])])


@pytest.mark.parametrize("largest", [1, 2, 1000, 65535, 300_000])
def test_digits_write_every_entry(largest: int) -> None:
    words = np.unique(np.concatenate([np.linspace(-largest, largest, 101).astype(np.int64)]))
    for rows, places in ((1, 2), (128, 30_000)):
        digits = digits_for(largest, rows, places, 64)
        written = [*digits.of(words)]
        assert max(np.abs(d).max() for d in written) <= digits.base // 2
        assert np.array_equal(sum(d * digits.base**k for k, d in enumerate(written)), words)
        assert digits.base // 2 < 1 << digits.ring - (1 if digits.count == 1 else 2)
    assert Digits(1, 3).ring == 2


def test_rows_on_the_wire_tell_nothing_of_the_ids() -> None:
    model = with_ids([node("Gather", ["t", "ids"])], {"t": np.ones((500, 2))}, {"ids": (1, 4)})
    made = compile_model(model)
    seeds = bytes(range(32)), bytes(range(32, 64))
    sent = [b"".join(share_input(made.plan, 0, np.full((1, 4), k), *seeds)) for k in (0, 499)]
    assert len(sent[0]) == len(sent[1])
    ones = [sum(b.bit_count() for b in data) / (8 * len(data)) for data in sent]
    assert all(abs(share - 0.5) < 0.03 for share in ones)
