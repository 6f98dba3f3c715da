"""What exporters write of GELU, SiLU, Mish, softplus, … becomes one function of one value.

A subgraph that computes one value from another, element by element and with public-looking numbers
alone, is recognised by what it computes: it is tried on points and held against known functions. So
every way to write a function is found, and the numbers in it are those of the function, no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpcserve.compiler import curves
from mpcserve.compiler.fused import Fusion, Inside, fuse
from mpcserve.compiler.graph import Graph, Node

Reals = NDArray[np.float64]

POINTS = np.concatenate([np.linspace(-9, 9, 181), [-1e-3, 1e-3]])
"""Beyond, all of these are near their asymptotes."""

NEAR = 2e-4
"""Of constants in half precision; the two forms of GELU differ by more."""

MOST_NODES = 16

QUICK_GELU = 1.702
"""The gain of the sigmoid that stands for Φ. Other gains may be trained: those are weights."""


def _elementwise() -> Mapping[str, Callable[..., Reals]]:
    return {
        "Add": np.add,
        "Sub": np.subtract,
        "Mul": np.multiply,
        "Div": np.divide,
        "Neg": np.negative,
        "Pow": np.power,
        "Exp": np.exp,
        "Log": np.log,
        "Tanh": np.tanh,
        "Sqrt": np.sqrt,
        "Reciprocal": np.reciprocal,
        "Erf": curves.erf_curve,
        "Sigmoid": curves.sigmoid_curve,
        "Softplus": curves.softplus_curve,
        "Relu": lambda x: np.maximum(x, 0),
        "Max": np.maximum,
        "Min": np.minimum,
    }


def _with_attributes(node: Node, xs: list[Any]) -> Reals | None:
    """Those whose numbers are attributes or optional."""
    x = xs[0]
    if node.op == "HardSigmoid":
        alpha, beta = node.attrs.get("alpha", 0.2), node.attrs.get("beta", 0.5)
        return np.asarray(np.clip(alpha * x + beta, 0, 1))
    if node.op == "Clip":
        ends = [None if e is None else float(e) for e in (*xs[1:], None, None)[:2]]
        low, high = (node.attrs.get(k, e) for k, e in zip(("min", "max"), ends, strict=True))
        return np.asarray(
            np.clip(x, -np.inf if low is None else low, np.inf if high is None else high)
        )
    return None


SHAPERS = frozenset(
    {"Erf", "Tanh", "Sigmoid", "Exp", "Softplus", "HardSigmoid", "Clip", "Relu", "Min"}
)
"""One of these is in every function that is looked for."""

ROOTS = frozenset({"Mul", "Div", "Add", "Log", "Neg", "Reciprocal", "Sub"})


@dataclass(frozen=True, slots=True)
class Known:
    """A function with a lowering of its own."""

    op: str
    curve: Callable[..., Reals]
    attrs: Mapping[str, Any] = field(default_factory=dict)


def _hard_swish(x: Reals) -> Reals:
    return np.asarray(x * np.clip(x / 6 + 0.5, 0, 1))


def _known() -> tuple[Known, ...]:
    return (
        Known("Gelu", curves.gelu_curve),
        Known("Gelu", curves.tanh_gelu_curve, {"approximate": "tanh"}),
        Known("Mish", curves.mish_curve),
        Known("HardSwish", _hard_swish),
        Known("Swish", curves.swish_curve),
        Known("Swish", lambda x: curves.swish_curve(x, QUICK_GELU), {"alpha": QUICK_GELU}),
        Known("Softplus", curves.softplus_curve),
        Known("LogSigmoid", curves.log_sigmoid_curve),
        Known("Sigmoid", curves.sigmoid_curve),
        Known("Tanh", np.tanh),
    )


def fuse_activations(graph: Graph) -> Graph:
    """The same function; each activation one node."""
    inside = Inside(graph)
    known, functions = _known(), _elementwise()
    taken: set[str] = set()
    found = []
    for node in reversed(graph.nodes):
        if node.op not in ROOTS or node.domain or node.name in taken:
            continue
        fusion = _fusion(node, inside, known, functions)
        if fusion is not None:
            taken |= {n.name for n in fusion.inside}
            found.append(fusion)
    return fuse(graph, found)


def _fusion(
    root: Node,
    inside: Inside,
    known: tuple[Known, ...],
    functions: Mapping[str, Callable[..., Reals]],
) -> Fusion | None:
    """The largest subgraph below `root` that is a known function of one value."""
    everything = _ancestors(root, inside, functions)
    if not any(n.op in SHAPERS for n in everything):
        return None
    order = {n.name: k for k, n in enumerate(inside.graph.nodes)}
    everything.sort(key=lambda n: order[n.name])
    makers = {o: n for n in everything for o in n.outputs}
    values = dict.fromkeys(
        i for n in everything for i in n.inputs if i and i not in inside.graph.constants
    )
    for x in values:
        nodes = _between(root, x, makers, inside)
        if nodes is None or not any(n.op in SHAPERS for n in nodes) or not inside.closed(nodes):
            continue
        if inside.graph.shapes.get(x) != inside.graph.shapes.get(root.outputs[0]):
            continue
        y = _tried(nodes, x, inside, functions)
        match = None if y is None else _recognised(y, known)
        if match is not None:
            return Fusion(match.op, (x,), tuple(nodes), match.attrs, {})
    return None


def _ancestors(
    root: Node, inside: Inside, functions: Mapping[str, Callable[..., Reals]]
) -> list[Node]:
    """Elementwise nodes that `root` is made of."""
    found, queue = {root.name: root}, [root]
    while queue and len(found) < MOST_NODES:
        for name in queue.pop(0).inputs:
            node = inside.maker(name)
            if node is None or node.name in found:
                continue
            if node.op in functions or node.op in ("HardSigmoid", "Clip"):
                found[node.name] = node
                queue.append(node)
    return list(found.values())


def _between(root: Node, x: str, makers: Mapping[str, Node], inside: Inside) -> list[Node] | None:
    """The nodes from x to `root`, in order, if nothing but x and single numbers enters them."""
    needed: dict[str, Node] = {}
    stack = [root]
    while stack:
        node = stack.pop()
        needed[node.name] = node
        for name in node.inputs:
            if name in ("", x) or inside.scalar(name) is not None:
                continue
            if name not in makers:
                return None
            stack.append(makers[name])
    return [n for n in {m.name: m for m in makers.values()}.values() if n.name in needed]


def _tried(
    nodes: list[Node], x: str, inside: Inside, functions: Mapping[str, Callable[..., Reals]]
) -> Reals | None:
    """What the nodes make of POINTS; None where that is not finite."""
    values: dict[str, Any] = {x: POINTS, "": None}
    with np.errstate(all="ignore"):
        for node in nodes:
            xs = [values.get(i, None if not i else inside.scalar(i)) for i in node.inputs]
            f = functions.get(node.op)
            y = _with_attributes(node, xs) if f is None else f(*xs)
            if y is None:
                return None
            values[node.outputs[0]] = y
    last = np.asarray(values[nodes[-1].outputs[0]], np.float64)
    return last if last.shape == POINTS.shape and np.isfinite(last).all() else None


def _recognised(y: Reals, known: tuple[Known, ...]) -> Known | None:
    errors = [(float(np.abs(y - k.curve(POINTS)).max()), k) for k in known]
    error, best = min(errors, key=lambda e: e[0])
    return best if error <= NEAR else None
