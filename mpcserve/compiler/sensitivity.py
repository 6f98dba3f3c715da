"""How far errors of a layer are felt at the outputs, tried on a sample.

Rounding a weight is one error for all positions of a picture, and convolutions spread errors that
were independent to their neighbours. What layers behind add up, and a mean over positions keeps, is
then far more than `noise` says of independent errors. So some layers are disturbed for a trial, one
after the other: their weights, their results; and inputs, by rounding them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import shake_256
from itertools import cycle
from math import prod, sqrt
from statistics import fmean
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mpcserve.compiler.graph import Graph, Node, Shape, large_constants, to_onnx
from mpcserve.compiler.lower import Ranges
from mpcserve.compiler.running import runner

Array = NDArray[Any]
Feed = Mapping[str, Array]
Change = tuple[float, ...]
"""Mean squared change of each output per unit of variance."""


@dataclass(frozen=True, slots=True)
class Felt:
    """What was tried, by name of an input or of a layer's node."""

    inputs: Mapping[str, Change] = field(default_factory=dict)
    weights: Mapping[str, Change] = field(default_factory=dict)
    results: Mapping[str, Change] = field(default_factory=dict)


DISTURBANCE = 2.0**-8
"""Size of errors, relatively: far above those of float32, yet nothing else changes."""

INPUT_STEP = 2.0**-12
"""Inputs are rounded to this part of their largest element."""

WORK = 1 << 35
"""Multiply-adds to spend; where that is not enough for all layers, some are left out."""

REPEATS = 16
"""Trials of each layer, where there is work left: of few weights, one tells little. Each is on the
next sample: what one saturates, and hides errors by, another lets through."""

FEWEST = 2
"""Layers that are tried in any case: the first and the last."""


def felt_in(graph: Graph, ranges: Ranges) -> Felt:
    """Tried on the samples in turn; nothing without samples or real outputs."""
    layers = _chosen(graph)
    real = all(np.issubdtype(np.dtype(o.dtype), np.floating) for o in graph.outputs)
    if not (real and ranges.feeds and layers):
        return Felt()
    trial = _Trial(graph, ranges.feeds, layers)
    times = min(max(WORK // (2 * len(layers) * _work(graph)), 1), REPEATS)
    weights, results = {}, {}
    for node in layers:
        value = graph.constants[node.inputs[1]]
        errors = _errors(node.inputs[1], value.shape, float(np.square(value).mean()), times)
        weights[node.name] = trial.change(node.inputs[1], errors, value)
        result = node.outputs[0]
        seen = ranges.values.get(result)
        errors = _errors(result, graph.shapes[result], seen.power if seen else 1.0, times)
        results[node.name] = trial.change(_added(node), errors)
    inputs = {i.name: trial.rounded(i.name, times) for i in graph.inputs}
    return Felt({k: change for k, change in inputs.items() if change}, weights, results)


class _Trial:
    """The graph in onnxruntime; weights of layers can be fed, and what to add to their results."""

    def __init__(self, graph: Graph, feeds: Sequence[Feed], layers: Sequence[Node]) -> None:
        self._feeds = feeds
        self._turns = cycle(range(len(feeds)))
        self._clean: dict[int, list[Array]] = {}
        self._types = {k: x.dtype for k, x in feeds[0].items()}
        nodes: list[Node] = []
        zeros: dict[str, Array] = {}
        for node in graph.nodes:
            if node not in layers:
                nodes.append(node)
                continue
            result, dtype = node.outputs[0], graph.constants[node.inputs[1]].dtype
            plain = f"{result}/undisturbed"
            zeros[_added(node)] = np.zeros((), dtype)
            self._types |= {_added(node): dtype, node.inputs[1]: dtype}
            nodes.append(replace(node, outputs=(plain,)))
            nodes.append(Node("Add", (plain, _added(node)), (result,), {}, f"{node.name}/added"))
        disturbed = graph.with_nodes(nodes, zeros)
        self._apart = large_constants(disturbed, self._types)
        model = to_onnx(disturbed, apart=self._apart)
        for tensor in model.graph.initializer:
            # An initialiser that is an input as well may be fed, in any shape where none is said.
            if tensor.name in self._types:
                kind = onnx.helper.make_tensor_type_proto(tensor.data_type, None)
                model.graph.input.append(onnx.ValueInfoProto(name=tensor.name, type=kind))
        self._run = runner(model, self._apart)
        self._outputs = [o.name for o in graph.outputs]

    def change(self, name: str, errors: Iterable[Array], value: Array | None = None) -> Change:
        """Mean over `errors` in what is fed as `name`: in `value`, where it is not the sample's."""
        return _mean(self._one(name, error, value, next(self._turns)) for error in errors)

    def rounded(self, name: str, times: int) -> Change:
        """The same for an input that is rounded; nothing where that changes no sample."""
        turns = [next(self._turns) for _ in range(times)]
        values = [(turn, self._feeds[turn][name]) for turn in turns]
        errors = [(turn, x, _rounding(x)) for turn, x in values if x.dtype.kind == "f"]
        found = [self._one(name, error, x, turn) for turn, x, error in errors if error.any()]
        return _mean(found) if found else ()

    def _one(self, name: str, error: Array, value: Array | None, turn: int) -> Change:
        """Of the outputs on one sample, per unit of the variance of `error`."""
        feed = self._feeds[turn]
        if turn not in self._clean:
            self._clean[turn] = self._run.run(self._outputs, dict(feed))
        disturbed = error if value is None else value + error
        moved = self._run.run(self._outputs, {**feed, name: disturbed.astype(self._types[name])})
        variance = float(np.square(error).mean())
        return tuple(
            float(np.square(m.astype(np.float64) - c).mean()) / variance
            for m, c in zip(moved, self._clean[turn], strict=True)
        )


def _added(node: Node) -> str:
    return f"{node.outputs[0]}/added"


def _chosen(graph: Graph) -> list[Node]:
    """Layers with constant weights: all, or as many as may be tried, at equal distances."""
    layers = [n for n in graph.nodes if _has_weights(graph, n)]
    count = min(max(WORK // (2 * _work(graph)), FEWEST), len(layers))
    places = np.linspace(0, len(layers) - 1, count).round().astype(int)
    return [layers[k] for k in dict.fromkeys(places.tolist())]


def _has_weights(graph: Graph, node: Node) -> bool:
    if node.op not in ("Conv", "Gemm", "MatMul") or node.inputs[0] in graph.constants:
        return False
    weights = graph.constants.get(node.inputs[1])
    return weights is not None and weights.dtype.kind == "f" and bool(weights.any())


def _work(graph: Graph) -> int:
    """Multiply-adds of all layers with constant weights."""
    total = 1
    for node in graph.nodes:
        if _has_weights(graph, node):
            weights = graph.constants[node.inputs[1]].shape
            inner = prod(weights[1:]) if node.op == "Conv" else graph.shapes[node.inputs[0]][-1]
            total += prod(graph.shapes[node.outputs[0]]) * inner
    return total


def _errors(name: str, shape: Shape, power: float, times: int) -> Iterator[Array]:
    """Uniform errors about zero in values of mean square `power`, the same for the same name."""
    for k in range(times):
        digest = shake_256(f"{name} {k}".encode()).digest(2 * prod(shape))
        words = np.frombuffer(digest, np.uint16).astype(np.float64)
        unit = (words.reshape(shape) + 0.5) / (1 << 15) - 1
        yield unit * DISTURBANCE * sqrt(3 * (power or 1.0))


def _mean(changes: Iterable[Change]) -> Change:
    return tuple(map(fmean, zip(*changes, strict=True)))


def _rounding(x: Array) -> Array:
    step = INPUT_STEP * float(np.abs(x).max(initial=0.0))
    return np.rint(x / step) * step - x if step else np.zeros_like(x)
