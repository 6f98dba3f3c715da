"""Elements at public places, read and written: equal to onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpcserve.compiler import compile_model
from mpcserve.errors import ModelError
from mpcserve.plan import bill_of
from tests.onnx_cases import NEWEST, agree, model_of, node, rng_of

SHAPE = (2, 3, 4)


def ints(*values: Any) -> Any:
    return np.array(values, np.int64)


def held(
    nodes: list[Any], given: Any, rounds: int | None = 0, opset: int = NEWEST, **on: Any
) -> None:
    """Equal to onnxruntime; in so many rounds."""
    rng = rng_of(1)
    inputs = {"x": SHAPE} | on
    values = [rng.uniform(-4, 4, s).astype(np.float32) for s in inputs.values()]
    ulps = 0 if rounds == 0 or rounds is None else 8
    compiled = agree(model_of(nodes, inputs, given, opset=opset), values, ulps=ulps, rng=rng)
    assert rounds in (None, bill_of(compiled.plan).rounds)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_gather_elements(axis: int) -> None:
    where = rng_of(2).integers(-2, 2, (2, 3, 2))
    held([node("GatherElements", ["x", "i"], axis=axis)], {"i": where})


@pytest.mark.parametrize(
    ("indices", "batch"),
    [(ints([0, -1], [1, 1]), 0), (ints([1, 2, 3]), 0), (ints([[0], [-1]], [[1], [2]]), 1)],
)
def test_gather_nd(indices: Any, batch: int) -> None:
    held([node("GatherND", ["x", "i"], batch_dims=batch)], {"i": indices})


@pytest.mark.parametrize("reduction", ["none", "add", "mul", "max", "min"])
@pytest.mark.parametrize("op", ["ScatterElements", "ScatterND"])
def test_scatter_joins_updates(op: str, reduction: str) -> None:
    twice = reduction != "none"
    if op == "ScatterND":
        given, shape = {"i": ints([1], [0], [-1] if twice else [1])[: 2 + twice]}, (2 + twice, 3, 4)
        attrs: dict[str, Any] = {}
    else:
        given, shape = {"i": ints([[0, 2, 1, 1 if twice else 3]])}, (1, 1, 4)
        attrs = {"axis": 2}
    rounds = {"none": 0, "add": 0}.get(reduction, 2 if reduction == "mul" else None)
    held([node(op, ["x", "i", "u"], reduction=reduction, **attrs)], given, rounds, u=shape)


def test_scatter_writes_constants_of_the_model() -> None:
    given = {"i": ints([0], [1]), "u": np.full((2, 3, 4), 0.5)}
    held([node("ScatterND", ["x", "i", "u"])], given)


@pytest.mark.parametrize("k", [-1, 0, 2])
@pytest.mark.parametrize("upper", [0, 1])
def test_a_triangle(upper: int, k: int) -> None:
    held([node("Trilu", ["x", "k"], upper=upper)], {"k": np.int64(k)})


@pytest.mark.parametrize("axis", [None, 1, -1])
def test_compress_keeps_what_a_condition_says(axis: int | None) -> None:
    attrs = {} if axis is None else {"axis": axis}
    held([node("Compress", ["x", "c"], **attrs)], {"c": np.array([False, True, True])})


def test_sequences_are_reversed() -> None:
    held([node("ReverseSequence", ["x", "n"], batch_axis=0, time_axis=1)], {"n": ints(3, 2)})


def test_blocks_are_put_back_where_they_overlap() -> None:
    given = {"i": ints(4, 5), "k": ints(2, 3)}
    attrs = {"strides": [1, 2], "pads": [1, 0, 0, 1]}
    rng = rng_of(3)
    x = rng.uniform(-4, 4, (1, 12, 8)).astype(np.float32)
    model = model_of([node("Col2Im", ["x", "i", "k"], **attrs)], {"x": x.shape}, given)
    assert bill_of(agree(model, [x], ulps=0, rng=rng).plan).rounds == 0


def test_a_pooled_picture_is_spread_again() -> None:
    given = {"i": ints(5, 7, 13, 15).reshape(1, 1, 2, 2)}
    attrs = {"kernel_shape": [2, 2], "strides": [2, 2]}
    model = model_of([node("MaxUnpool", ["x", "i"], **attrs)], {"x": (1, 1, 2, 2)}, given)
    agree(model, [np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)], ulps=0)


def test_a_secret_index_is_refused() -> None:
    nodes = [node("Cast", ["x"], ["i"], to=7), node("GatherND", ["x", "i"])]
    with pytest.raises(ModelError, match="secret"):
        compile_model(model_of(nodes, {"x": (2, 2)}))
