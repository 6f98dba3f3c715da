"""Elements read at places that the servers computed: what onnxruntime reads there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from mpcserve.compiler import compile_model, lookup
from mpcserve.compiler.check import check_model
from mpcserve.errors import ModelError
from mpcserve.plan import bill_of
from mpcserve.protocol import Together
from tests.onnx_cases import Array, model_of, node, plain, rng_of

F32 = np.float32


def with_places(
    nodes: list[Any],
    inputs: dict[str, Sequence[int]],
    constants: dict[str, Array] | None = None,
    kind: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """A model whose input `i` is of whole numbers; others, and the output, are real."""
    model = model_of(nodes, inputs, constants)
    for x in model.graph.input:
        if x.name == "i":
            x.type.tensor_type.elem_type = TensorProto.INT64
    model.graph.output[0].type.tensor_type.elem_type = kind
    return model


def agrees(model: onnx.ModelProto, inputs: list[Array], error: float = 2e-5, **options: Any) -> Any:
    made = compile_model(model, **options)
    (got,), bill = Together(made.plan, made.weights).infer(inputs)
    assert bill == bill_of(made.plan)
    expected = plain(model, *inputs)[0]
    assert got.shape == expected.shape
    assert np.abs(got.astype(float) - expected).max() <= error
    return made.plan


def signs(plan: Any) -> int:
    return sum(i.value.size for i in plan.instructions if i.op == "sign")


def within(low: int, high: int) -> dict[str, tuple[float, float]]:
    return {"x": (-4.0, 4.0), "i": (float(low), float(high))}


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("low", [0, -2, -1])
def test_an_index_for_each_element(axis: int, low: int) -> None:
    rng = rng_of(1)
    model = with_places(
        [node("GatherElements", ["x", "i"], axis=axis)], {"x": (2, 3, 4), "i": (2, 2, 3)}
    )
    x = rng.uniform(-4, 4, (2, 3, 4)).astype(F32)
    plan = agrees(model, [x, rng.integers(low, 2, (2, 2, 3))], input_range=within(low, 1))
    assert bill_of(plan).rounds <= 4


@pytest.mark.parametrize("low", [-5, -3, 0])
@pytest.mark.parametrize("axis", [0, 1])
def test_slices_of_a_secret_tensor(axis: int, low: int) -> None:
    rng = rng_of(2)
    length, high = 5, -1 if low == -3 else 4
    shape = tuple(length if a == axis else 3 for a in range(2))
    # An input that is an index by itself would be shared as rows.
    nodes = [node("Neg", ["i"], ["j"]), node("Neg", ["j"], ["k"]),
             node("Gather", ["x", "k"], axis=axis)]  # fmt: skip
    model = with_places(nodes, {"x": shape, "i": (2, 3)})
    x = rng.uniform(-4, 4, shape).astype(F32)
    i = rng.integers(low, high + 1, (2, 3))
    agrees(model, [x, i], input_range=within(low, high))


@pytest.mark.parametrize(
    ("shape", "places", "batch"),
    [((4, 3), (2, 1), 0), ((4, 3, 2), (2, 2), 0), ((2, 3, 2), (2, 4, 1), 1), ((2, 2), (3, 2), 0)],
)
def test_slices_at_several_indices(
    shape: tuple[int, ...], places: tuple[int, ...], batch: int
) -> None:
    rng = rng_of(3)
    high = min(shape[batch : batch + places[-1]]) - 1
    nodes = [node("GatherND", ["x", "i"], batch_dims=batch)]
    model = with_places(nodes, {"x": shape, "i": places})
    x = rng.uniform(-4, 4, shape).astype(F32)
    agrees(model, [x, rng.integers(0, high + 1, places)], input_range=within(0, high))


@pytest.mark.parametrize("values", [np.arange(12.0) / 7, np.arange(12) - 4])
def test_constants_of_the_model_stay_secret_weights(values: Array) -> None:
    rng = rng_of(4)
    table = values.reshape(3, 4)
    kind = TensorProto.FLOAT if table.dtype.kind == "f" else TensorProto.INT64
    nodes = [node("GatherElements", ["t", "i"], axis=1)]
    model = with_places(nodes, {"i": (3, 2)}, {"t": table}, kind)
    plan = agrees(model, [rng.integers(0, 4, (3, 2))], input_range=(0.0, 3.0))
    assert [i.op for i in plan.instructions].count("weight") == 1


def test_what_a_ranking_found_is_not_compared_again() -> None:
    rng = rng_of(5)
    sort = node("TopK", ["x", "n"], ["v", "order"], axis=1)
    nodes = [sort, node("GatherElements", ["z", "order"], axis=1)]
    shapes = {"x": (2, 6), "z": (2, 6)}
    x, z = (rng.permuted(np.linspace(-4, 4, 12)).reshape(2, 6).astype(F32) for _ in range(2))
    plan = agrees(model_of(nodes, shapes, {"n": np.array([6])}), [x, z], input_range=(-4.0, 4.0))
    alone = model_of([sort, node("Cast", ["order"], to=1)], {"x": (2, 6)}, {"n": np.array([6])})
    assert signs(plan) == signs(compile_model(alone, input_range=(-4.0, 4.0)).plan)


def test_a_weighted_median_reads_one_place_by_another() -> None:
    rng = rng_of(6)
    nodes = [
        node("TopK", ["x", "n"], ["v", "order"], axis=1),
        node("Gather", ["w", "order"], ["sorted"]),
        node("CumSum", ["sorted", "one"], ["sums"]),
        node("Less", ["sums", "half"], ["less"]),
        node("Cast", ["less"], ["below"], to=1),
        node("ArgMin", ["below"], ["median"], axis=1),
        node("GatherElements", ["order", "median"], ["which"], axis=1),
        node("GatherElements", ["x", "which"], axis=1),
    ]
    weights = np.array([0.5, 0.1, 0.9, 0.4, 0.3])
    constants = {"n": np.array([5]), "w": weights, "one": np.array(1), "half": F32(1.1)}
    x = rng.permuted(np.linspace(-4, 4, 20)).reshape(4, 5).astype(F32)
    agrees(model_of(nodes, {"x": (4, 5)}, constants), [x], input_range=(-4.0, 4.0))


def test_bits_at_secret_places_stay_bits() -> None:
    rng = rng_of(7)
    nodes = [node("Less", ["x", "zero"], ["b"]), node("GatherElements", ["b", "i"], ["c"], axis=0),
             node("Where", ["c", "x", "zero"])]  # fmt: skip
    model = with_places(nodes, {"x": (4, 2), "i": (4, 2)}, {"zero": F32(0)})
    x = rng.uniform(-4, 4, (4, 2)).astype(F32)
    agrees(model, [x, rng.integers(0, 4, (4, 2))], input_range=within(0, 3))


def test_places_that_no_sample_showed_are_read_as_well() -> None:
    nodes = [node("ArgMax", ["x"], ["k"], axis=1), node("GatherElements", ["x", "k"], axis=1)]
    model = model_of(nodes, {"x": (1, 40)})
    early = np.where(np.arange(40) < 2, 3.0, rng_of(8).uniform(-3, 2, (30, 40))).astype(F32)
    made = compile_model(model, calibrate=early)
    late = early[:1, ::-1].copy()
    (got,), _ = Together(made.plan, made.weights).infer([late])
    assert abs(got[0, 0] - 3.0) < 1e-4


def test_an_index_beyond_its_axis_is_refused() -> None:
    nodes = [node("GatherElements", ["x", "i"], axis=1)]
    model = with_places(nodes, {"x": (2, 3), "i": (2, 2)})
    with pytest.raises(ModelError, match=r"a table of 3 at a secret index in \[0, 5\]") as caught:
        compile_model(model, input_range=within(0, 5))
    assert "--input-range" in caught.value.hint
    nodes = [node("GatherND", ["x", "i"])]
    model = with_places(nodes, {"x": (2, 3), "i": (2, 2)})
    with pytest.raises(ModelError, match=r"axes of 2, 3 at secret indices in \[-1, 1\]"):
        compile_model(model, input_range=within(-1, 1))


def test_too_many_comparisons_are_refused_with_their_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lookup, "MOST_COMPARED", 100)
    nodes = [node("GatherElements", ["x", "i"], axis=1)]
    model = with_places(nodes, {"x": (3, 40), "i": (3, 2)})
    with pytest.raises(ModelError, match="6 secret indices with 40 places each, 100 comparisons"):
        compile_model(model, input_range=within(0, 39))
    (bad,) = [r for r in check_model(model, input_range=within(0, 39)) if r.status != "supported"]
    assert "secret indices" in bad.reason
