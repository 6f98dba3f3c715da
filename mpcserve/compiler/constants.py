"""Public nodes are computed by onnx's own reference implementation, but for what it does wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mpcserve.compiler.problems import Unsupported

Array = NDArray[Any]


def evaluated(
    node: onnx.NodeProto, feed: Mapping[str, Array], opsets: Mapping[str, int]
) -> dict[str, Array]:
    """The node's outputs from the values of its inputs. Raises: Unsupported."""
    from onnx.reference import ReferenceEvaluator

    if node.op_type == "GatherElements" and not node.domain:
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        data, indices = (feed[i] for i in node.input)
        return {node.output[0]: _gathered(data, indices, axis)}
    graph = onnx.GraphProto(name="constant", node=[node])
    names = [o for o in node.output if o]
    graph.input.extend(onnx.ValueInfoProto(name=i) for i in feed)
    graph.output.extend(onnx.ValueInfoProto(name=o) for o in names)
    try:
        # Overflow and division by zero are answers here; NumPy would warn of them.
        with np.errstate(all="ignore"):
            values = ReferenceEvaluator(graph, opsets=dict(opsets)).run(None, dict(feed))
    except Exception as e:  # the reference raises whatever NumPy does
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise Unsupported(
            f"its inputs are constant, but it cannot be computed: {reason}",
            "compute it before the export",
        ) from None
    return dict(zip(names, values, strict=True))


def _gathered(data: Array, indices: Array, axis: int) -> Array:
    """GatherElements: onnx chooses among up to 32 elements only."""
    places: list[Array] = list(np.indices(indices.shape, sparse=True))
    places[axis] = indices
    found: Array = data[tuple(places)]
    return found


def hollow(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An array of which only shape and type are read; it takes no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)
