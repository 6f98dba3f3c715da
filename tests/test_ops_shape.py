"""Operators that only move elements: equal to onnxruntime, local, in every opset's form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpcserve.compiler import compile_model
from mpcserve.errors import ModelError
from mpcserve.plan import bill_of
from tests.onnx_cases import NEWEST, agree, model_of, node, rng_of

pytestmark = pytest.mark.slow

SHAPE = (2, 3, 1, 4)


def moved(
    nodes: list[Any], constants: Any = None, opset: int = NEWEST, outputs: Any = ("y",)
) -> None:
    """Equal to onnxruntime, without a round."""
    rng = rng_of(1)
    x = rng.uniform(-4, 4, SHAPE).astype(np.float32)
    model = model_of(nodes, {"x": SHAPE}, constants, outputs=outputs, opset=opset)
    compiled = agree(model, [x], ulps=0, rng=rng)
    assert bill_of(compiled.plan).rounds == 0


def ints(*values: int) -> Any:
    return np.array(values, np.int64)


@pytest.mark.parametrize("shape", [(6, 4), (0, -1), (2, 0, 4), (-1,), (1, 2, 3, 4)])
def test_reshape_copies_and_infers_axes(shape: Any) -> None:
    moved([node("Reshape", ["x", "s"])], {"s": ints(*shape)})


@pytest.mark.parametrize("axis", [0, 1, 2, -1, 4])
def test_flatten_splits_the_axes_in_two(axis: int) -> None:
    moved([node("Flatten", ["x"], axis=axis)])


@pytest.mark.parametrize("perm", [None, [0, 2, 3, 1], [3, 0, 1, 2]])
def test_transpose_permutes(perm: Any) -> None:
    moved([node("Transpose", ["x"], **({} if perm is None else {"perm": perm}))])


@pytest.mark.parametrize("opset", [7, 11, 13, NEWEST])
def test_squeeze_and_unsqueeze_take_axes_as_attribute_or_input(opset: int) -> None:
    if opset < 13:
        moved([node("Squeeze", ["x"], axes=[2])], opset=opset)
        moved([node("Unsqueeze", ["x"], axes=[0, 3])], opset=opset)
    else:
        moved([node("Squeeze", ["x", "a"])], {"a": ints(-2)}, opset)
        moved([node("Unsqueeze", ["x", "a"])], {"a": ints(0, -1)}, opset)
    moved([node("Squeeze", ["x"])], opset=opset)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_concat_joins_secret_and_constant_parts(axis: int) -> None:
    moved([node("Concat", ["x", "c", "x"], axis=axis)], {"c": np.full(SHAPE, 0.25)})


@pytest.mark.parametrize("opset", [7, 13, 18, NEWEST])
def test_split_takes_sizes_as_attribute_or_input_or_even_parts(opset: int) -> None:
    outputs = ["y", "z"]
    if opset < 13:
        moved([node("Split", ["x"], outputs, axis=3, split=[1, 3])], None, opset, outputs)
    else:
        given = {"s": ints(1, 3)}
        moved([node("Split", ["x", "s"], outputs, axis=3)], given, opset, outputs)
    attrs = {"num_outputs": 2} if opset >= 18 else {}
    moved([node("Split", ["x"], outputs, axis=-1, **attrs)], None, opset, outputs)
    if opset >= 18:
        moved([node("Split", ["x"], outputs, axis=1, num_outputs=2)], None, opset, outputs)


@pytest.mark.parametrize("opset", [7, 10, 13, NEWEST])
def test_slice_takes_ranges_as_attributes_or_inputs(opset: int) -> None:
    far = 2**63 - 1
    if opset < 10:
        moved([node("Slice", ["x"], starts=[1, -3], ends=[9, -1], axes=[0, 3])], None, opset)
        return
    given = {"s": ints(1, -3), "e": ints(far, -1), "a": ints(0, 3)}
    moved([node("Slice", ["x", *"sea"])], given, opset)
    given = {"s": ints(0, -1), "e": ints(3, -far), "a": ints(1, 3), "t": ints(2, -1)}
    moved([node("Slice", ["x", *"seat"])], given, opset)


@pytest.mark.parametrize("opset", [7, 11, 18, NEWEST])
@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
def test_pad_takes_its_widths_as_attribute_or_input(opset: int, mode: str) -> None:
    pads = [0, 1, 0, 2, 0, 1, 0, 1]
    if opset < 11:
        moved([node("Pad", ["x"], pads=pads, mode=mode, value=1.5)], None, opset)
        return
    given: dict[str, Any] = {"p": ints(*pads), "v": np.float32(1.5)}
    moved([node("Pad", ["x", "p", "v"], mode=mode)], given, opset)
    if opset >= 18:
        given = {"p": ints(1, -1, 2, 0), "v": np.float32(-1), "a": ints(1, 3)}
        if mode == "constant":
            moved([node("Pad", ["x", "p", "v", "a"])], given, opset)


def test_pad_wraps_round() -> None:
    moved([node("Pad", ["x", "p"], mode="wrap")], {"p": ints(0, 1, 0, 2, 0, 1, 0, 1)})


def test_expand_and_tile_repeat() -> None:
    moved([node("Expand", ["x", "s"])], {"s": ints(5, 2, 1, 2, 1)} | {"s": ints(3, 5, 4)})
    moved([node("Tile", ["x", "r"])], {"r": ints(1, 2, 3, 1)})


@pytest.mark.parametrize("indices", [ints(2, 0, -1), np.array([[0, 1], [1, 2]]), np.int64(1)])
def test_gather_reads_at_constant_indices(indices: Any) -> None:
    moved([node("Gather", ["x", "i"], axis=1)], {"i": indices})


@pytest.mark.parametrize("opset", [7, 12, NEWEST])
def test_dropout_does_nothing(opset: int) -> None:
    moved([node("Dropout", ["x"])], opset=opset)


def test_shape_computations_fold_to_constants() -> None:
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "i"], ["n"]),
        node("Unsqueeze", ["n", "z"], ["m"]),
        node("Concat", ["m", "rest"], ["shape"], axis=0),
        node("Reshape", ["x", "shape"]),
    ]
    moved(nodes, {"i": np.int64(0), "z": ints(0), "rest": ints(-1)})


def test_a_reshape_that_hides_the_batch_is_refused() -> None:
    model = model_of([node("Reshape", ["x", "s"])], {"x": ("N", 2, 3)}, {"s": ints(1, 6)})
    with pytest.raises(ModelError, match=r"reshapes \[2, 2, 3\] to \[1, 6\]"):
        compile_model(model, batch=2)
