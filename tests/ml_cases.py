"""Small ai.onnx.ml models and what onnxruntime says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from mpcserve.compiler import importing
from mpcserve.compiler.ml.rewrite import in_standard_operators
from tests.onnx_cases import plain

Array = Any
ML = "ai.onnx.ml"
OPSET = importing.newest_opset()


def ml_model(
    op: str,
    features: int,
    outputs: Mapping[str, int],
    inputs: int = 1,
    version: int = 3,
    kind: int = onnx.TensorProto.FLOAT,
    **attrs: Any,
) -> onnx.ModelProto:
    """One node; `outputs`: name → element type."""
    names = [f"x{k}" for k in range(inputs)] if inputs > 1 else ["x"]
    node = helper.make_node(op, names, list(outputs), name=op, domain=ML, **attrs)
    ins = [helper.make_tensor_value_info(n, kind, ["N", features]) for n in names]
    outs = [helper.make_tensor_value_info(k, t, None) for k, t in outputs.items()]
    graph = helper.make_graph([node], "ml", ins, outs)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(ML, version)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def classifier(op: str, features: int, **attrs: Any) -> onnx.ModelProto:
    """A label and scores."""
    text = "classlabels_strings" in attrs
    kind = onnx.TensorProto.STRING if text else onnx.TensorProto.INT64
    return ml_model(op, features, {"label": kind, "scores": onnx.TensorProto.FLOAT}, **attrs)


def regressor(op: str, features: int, **attrs: Any) -> onnx.ModelProto:
    """One matrix of numbers."""
    return ml_model(op, features, {"y": onnx.TensorProto.FLOAT}, **attrs)


def rewritten(model: onnx.ModelProto) -> onnx.ModelProto:
    """As the compiler rewrites it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return in_standard_operators(importing.converted(importing.named(copy)))[0]


def same_in_standard_operators(
    model: onnx.ModelProto, *inputs: Array, within: float = 1e-5
) -> onnx.ModelProto:
    """onnxruntime answers the same for the model and for what it is rewritten to."""
    result = rewritten(model)
    assert_close(plain(result, *inputs), plain(model, *inputs), within)
    return result


def assert_close(got: Sequence[Array], expected: Sequence[Array], within: float) -> None:
    """Labels are equal, scores are within `within`."""
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.shape == theirs.shape
        if theirs.dtype.kind in "iuOU":
            np.testing.assert_array_equal(mine, theirs)
        else:
            np.testing.assert_allclose(mine, theirs, rtol=within, atol=within)


def random_forest(
    rng: np.random.Generator,
    trees: int,
    features: int,
    depth: int,
    targets: int,
    *,
    prefix: str = "class",
    modes: Sequence[str] = ("BRANCH_LEQ",),
    only: int | None = None,
    low: float = -1.0,
    grid: Sequence[float] = (),
) -> dict[str, Any]:
    """Attributes of trees with random splits; `only`: the one target they give scores to.

    `grid`: what thresholds are chosen from; else they are normal.
    """
    names = ("treeids", "nodeids", "featureids", "values", "modes", "truenodeids", "falsenodeids")
    nodes: list[tuple[Any, ...]] = []
    leaves: list[tuple[int, int, int, float]] = []

    def grow(tree: int, start: int, left: int) -> int:
        me = len(nodes) - start
        nodes.append(())
        if left == 0 or (left < depth and rng.random() < 0.25):
            nodes[start + me] = (tree, me, 0, 0.0, "LEAF", 0, 0)
            for k in range(targets) if only is None else [only]:
                leaves.append((tree, me, k, float(np.float32(rng.uniform(low, 1.0)))))
            return me
        value = float(rng.choice(grid)) if grid else float(np.float32(rng.normal()))
        children = [grow(tree, start, left - 1) for _ in range(2)]
        feature, mode = int(rng.integers(features)), str(rng.choice(modes))
        nodes[start + me] = (tree, me, feature, value, mode, *children)
        return me

    for tree in range(trees):
        grow(tree, len(nodes), depth)
    columns = zip(*nodes, strict=True)
    attrs = {f"nodes_{k}": list(c) for k, c in zip(names, columns, strict=True)}
    parts = ("treeids", "nodeids", "ids", "weights")
    scores = {
        f"{prefix}_{k}": list(c) for k, c in zip(parts, zip(*leaves, strict=True), strict=True)
    }
    return attrs | scores
