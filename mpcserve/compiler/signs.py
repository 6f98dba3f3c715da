"""Values that are on one side of zero whatever the input is, or may have no end in floats.

The larger of a negated distance and a small constant is that constant: exported weights of
neighbours say so. Fixed point, in which a root may be an ulp below zero, would not find out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

Array = NDArray[Any]

POSITIVE = frozenset(
    {"Abs", "Exp", "ReduceL1", "ReduceL2", "ReduceSumSquare", "Relu", "Sigmoid", "Softmax"}
    | {"Softplus", "Sqrt"}
)
"""Operators whose results are not below zero."""

KEEP = frozenset(
    {"Cast", "Expand", "Flatten", "Gather", "GatherElements", "Identity", "ReduceMax", "ReduceMean"}
    | {"ReduceMin", "ReduceSum", "Reshape", "Slice", "Squeeze", "Tile", "TopK", "Transpose"}
    | {"Unsqueeze"}
)
"""Operators whose first result is on the side of their first input."""

JOIN = frozenset({"Add", "Concat", "Max", "Min", "Sum"})
"""Operators whose result is on the side on which all their inputs are."""


def side_of(node: onnx.NodeProto, sides: Sequence[int]) -> int:
    """1 where the first result is ≥ 0, −1 where it is ≤ 0, else 0; `sides`: of the inputs."""
    op = node.op_type if not node.domain else ""
    if op in POSITIVE:
        return 1
    if op == "Cast" and not _is_real(node):
        return 0
    if op in KEEP:
        return sides[0]
    if op in JOIN:
        return sides[0] if len(set(sides)) == 1 else 0
    if op in ("Mul", "Div"):
        return sides[0] * sides[1]
    return -sides[0] if op == "Neg" else 0


POLES = frozenset({"Acos", "Acosh", "Asin", "Atanh", "Div", "Log", "Pow", "Reciprocal", "Sqrt"})
"""Operators that make NaN, or infinities, of numbers."""


def is_wild(node: onnx.NodeProto, constants: Mapping[str, Array], wild: Collection[str]) -> bool:
    """Whether the results may be NaN or infinite in floats, where some of the inputs may be.

    A softmax is NaN only where a mask hides all, which is known otherwise.
    """
    if node.op_type in ("IsNaN", "IsInf", "Softmax", "LogSoftmax"):
        return False
    if any(i in wild for i in node.input):
        return True
    if node.op_type not in POLES or node.domain:
        return False
    divisor = constants.get(node.input[1]) if node.op_type == "Div" else None
    return divisor is None or not divisor.all()


def _is_real(node: onnx.NodeProto) -> bool:
    to = helper.get_node_attr_value(node, "to")
    return np.dtype(helper.tensor_dtype_to_np_dtype(to)).kind == "f"


def side_of_constant(x: Array) -> int:
    """As `side_of`, of a constant; 0 for zeros."""
    if x.dtype.kind not in "iuf" or not x.size:
        return 0
    return int(np.all(x >= 0)) - int(np.all(x <= 0))


def extreme(
    node: onnx.NodeProto, constants: Mapping[str, Array], sides: Mapping[str, int]
) -> Array | None:
    """The constant that is the largest, or smallest, of all inputs whatever the others are."""
    if node.domain or node.op_type not in ("Max", "Min"):
        return None
    upper = node.op_type == "Max"
    known = [constants[i] for i in node.input if i in constants]
    others = [sides.get(i, 0) for i in node.input if i not in constants]
    if not known or any(side != (-1 if upper else 1) for side in others):
        return None
    found = known[0]
    for x in known[1:]:
        found = np.maximum(found, x) if upper else np.minimum(found, x)
    return found if np.all(found >= 0 if upper else found <= 0) else None
