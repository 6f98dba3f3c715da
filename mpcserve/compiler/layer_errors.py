"""Where error enters: fixed point against float, layer by layer.

The float graph, as the passes left it, runs in onnxruntime with every tensor as an output; the plan
runs by the reference. A layer's error has two parts: what its operands bring along, and what it
adds. For the second, the reference runs once more, each tensor that a layer has made replaced by
the float one before the next layer reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpcserve.compiler.artifact import CompiledModel
from mpcserve.compiler.graph import Graph, Node, to_onnx
from mpcserve.compiler.running import runner
from mpcserve.errors import ConfigError
from mpcserve.plan import Plan
from mpcserve.reference import evaluate_clear

Array = NDArray[Any]
Watch = Callable[[int, Array], Array | None]


@dataclass(frozen=True, slots=True)
class LayerError:
    """Of one tensor, against float. `relative`: `max_error` over the tensor's range; `growth`: how
    often the largest of its operands' that is; `own`: the same were the operands exact."""

    layer: str
    op: str
    tensor: str
    max_error: float
    mean_error: float
    relative: float
    growth: float | None
    own: float


def layer_errors(compiled: CompiledModel, inputs: Mapping[str, Array]) -> list[LayerError]:
    """One for each tensor that a node makes and that the plan holds, in order of evaluation.

    `compiled`: with its trace. `inputs`: one batch, of the plan's shapes.
    """
    if compiled.trace is None:
        raise ConfigError("the model was compiled without a trace", "compile it with trace=True")
    plan, graph = compiled.plan, compiled.trace.graph
    feed = {i.name: np.asarray(inputs[i.name], i.dtype).reshape(i.shape) for i in graph.inputs}
    exact = _floats(graph, feed)
    found = _Errors(plan, compiled.trace.tensors, exact)
    rows = [feed[i.name] for i in plan.inputs]
    errors = found.along(compiled, rows, replacing=False)
    own = found.along(compiled, rows, replacing=True)
    return [
        _layer(node, name, errors, own, exact)
        for node in graph.nodes
        for name in node.outputs
        if name in errors
    ]


def entering(errors: Sequence[LayerError]) -> LayerError | None:
    """The layer that adds most, relatively; None where all is exact."""
    worst = max(errors, key=lambda e: e.own, default=None)
    return worst if worst is not None and worst.own else None


@dataclass(frozen=True, slots=True)
class _Error:
    most: float
    mean: float


class _Errors:
    """The reference against known float tensors."""

    def __init__(self, plan: Plan, tensors: Mapping[str, int], exact: Mapping[str, Array]) -> None:
        self._plan, self._exact = plan, exact
        self._names: dict[int, list[str]] = {}
        for name, id in tensors.items():
            if name in exact and exact[name].shape == plan.value(id).shape:
                self._names.setdefault(id, []).append(name)

    def along(
        self, compiled: CompiledModel, rows: Sequence[Array], replacing: bool
    ) -> dict[str, _Error]:
        """Error of each tensor; `replacing`: from exact operands."""
        found: dict[str, _Error] = {}

        def watch(id: int, got: Array) -> Array | None:
            scale = self._plan.value(id).frac_bits
            for name in self._names.get(id, ()):
                exact = self._exact[name].astype(np.float64)
                if replacing:
                    exact = np.ldexp(np.rint(np.ldexp(exact, scale)), -scale)
                error = np.abs(np.ldexp(got.astype(np.float64), -scale) - exact)
                numbers = ~np.isnan(error)  # of NaN, behind a mask, there is no error
                mean = float(error[numbers].mean()) if numbers.any() else 0.0
                found[name] = _Error(float(error[numbers].max(initial=0.0)), mean)
                if replacing:
                    return np.where(numbers, np.ldexp(exact, scale), got).astype(np.int64)
            return None

        evaluate_clear(self._plan, compiled.weights, rows, watch)
        return found


def _floats(graph: Graph, feed: Mapping[str, Array]) -> dict[str, Array]:
    """Every numeric tensor of the float graph."""
    model = to_onnx(graph, every_value=True)
    names = [o.name for o in model.graph.output]
    values = zip(names, runner(model).run(names, dict(feed)), strict=True)
    return dict(feed) | {k: np.asarray(v) for k, v in _numeric(values)}


def _numeric(values: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Array]]:
    for name, value in values:
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            yield name, value


def _layer(
    node: Node,
    name: str,
    errors: Mapping[str, _Error],
    own: Mapping[str, _Error],
    exact: Mapping[str, Array],
) -> LayerError:
    def relative(found: Mapping[str, _Error], tensor: str) -> float:
        values = exact[tensor].astype(np.float64)
        values = values[np.isfinite(values)]
        reach = float(values.max() - values.min()) if values.size else 0.0
        return found[tensor].most / (reach or float(np.abs(values).max(initial=0.0)) or 1.0)

    before = max((relative(errors, x) for x in node.inputs if x in errors), default=0.0)
    here = relative(errors, name)
    return LayerError(
        node.name,
        node.op,
        name,
        errors[name].most,
        errors[name].mean,
        here,
        here / before if before else None,
        relative(own, name) if name in own else 0.0,
    )
