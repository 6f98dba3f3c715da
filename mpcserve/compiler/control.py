"""Control flow that is public: branches taken and loops unrolled while the model is read.

What a secret decides would show in what the servers do next, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper

from mpcserve.compiler.problems import Unsupported

if TYPE_CHECKING:
    from mpcserve.compiler.unfold import Scope, Unfolding

MOST_TURNS = 1 << 12
"""Copies of a loop's body beyond which a plan would be too long to be evaluated."""


def captured(node: onnx.NodeProto) -> set[str]:
    """Names that a node's subgraphs read, their own included."""
    return {
        name
        for attribute in node.attribute
        if attribute.type == onnx.AttributeProto.GRAPH
        for name in (
            *(i for inner in attribute.g.node for i in (*inner.input, *captured(inner))),
            *(o.name for o in attribute.g.output),
        )
    }


def branch(
    u: Unfolding, node: onnx.NodeProto, scope: Scope, name: str, outputs: Sequence[str]
) -> list[str]:
    """If: the branch that its public condition takes."""
    taken = _public(u, scope.values[node.input[0]], "its condition")
    body: onnx.GraphProto = _attributes(node)["then_branch" if taken.any() else "else_branch"]
    names = {o.name: new for o, new in zip(body.output, outputs, strict=True) if new}
    return u.graph(body, scope.inside(f"{name}/", names))


def loop(
    u: Unfolding, node: onnx.NodeProto, scope: Scope, name: str, outputs: Sequence[str]
) -> list[str]:
    """Loop: a copy of the body per turn."""
    body: onnx.GraphProto = _attributes(node)["body"]
    given = [scope.values[i] if i else "" for i in node.input] + [""] * (2 - len(node.input))
    most = int(_public(u, given[0], "its number of turns").item()) if given[0] else None
    going = bool(_public(u, given[1], "its condition").item()) if given[1] else True
    carried = given[2:]
    rows: list[list[str]] = []
    while going and (most is None or len(rows) < most):
        turn = len(rows)
        if turn >= MOST_TURNS:
            raise Unsupported(f"runs more than {MOST_TURNS} turns", "export it with fewer")
        inner = scope.inside(f"{name}/{turn}/")
        first = [u.constant(u.fresh(f"{name}/{turn}/turn"), np.array(turn, np.int64)),
                 u.constant(u.fresh(f"{name}/{turn}/going"), np.array(going))]  # fmt: skip
        inner.values.update(zip((i.name for i in body.input), [*first, *carried], strict=True))
        found = u.graph(body, inner)
        going = bool(_public(u, found[0], "its condition").item())
        carried = found[1 : 1 + len(carried)]
        rows.append(found[1 + len(carried) :])
    kinds = [o.type for o in body.output[1 + len(carried) :]]
    stacked = [
        _stacked(u, [row[k] for row in rows], 0, f"{name}/scanned_{k}", kind)
        for k, kind in enumerate(kinds)
    ]
    return [*carried, *stacked]


def scan(
    u: Unfolding, node: onnx.NodeProto, scope: Scope, name: str, outputs: Sequence[str]
) -> list[str]:
    """Scan: a copy of the body per element along the scanned axes."""
    attrs = _attributes(node)
    body: onnx.GraphProto = attrs["body"]
    if u.opsets.get("", 1) < 9:
        raise Unsupported("has the form of opset 8", "export the model with opset 9 or newer")
    given = [scope.values[i] for i in node.input]
    count = int(attrs["num_scan_inputs"])
    carried, scanned = given[: len(given) - count], given[len(given) - count :]
    made = len(body.output) - len(carried)
    shapes = [u.shape(x) for x in scanned]
    axes = _per_item(attrs, "scan_input_axes", count)
    if any(s is None for s in shapes):
        raise Unsupported("scans a value of unknown length", "export it with fixed shapes")
    lengths = {s[a] for s, a in zip(shapes, axes, strict=True) if s is not None}
    if len(lengths) != 1:
        raise Unsupported(f"scans values of different lengths {sorted(lengths)}")
    length = lengths.pop()
    if length > MOST_TURNS:
        raise Unsupported(f"runs more than {MOST_TURNS} turns", "export it with fewer")
    backward = _per_item(attrs, "scan_input_directions", count)
    rows: list[list[str]] = []
    for turn in range(length):
        inner = scope.inside(f"{name}/{turn}/")
        items = []
        for k, (x, axis, back) in enumerate(zip(scanned, axes, backward, strict=True)):
            at = u.fresh(f"{name}/{turn}/at_{k}")
            u.constant(at, np.array(length - 1 - turn if back else turn, np.int64))
            items.append(u.make("Gather", [x, at], u.fresh(f"{name}/{turn}/item_{k}"), axis=axis))
        inner.values.update(zip((i.name for i in body.input), [*carried, *items], strict=True))
        found = u.graph(body, inner)
        carried = found[: len(carried)]
        rows.append(found[len(carried) :])
    stacked = []
    for k in range(made):
        axis = _per_item(attrs, "scan_output_axes", made)[k]
        column = [row[k] for row in rows]
        if _per_item(attrs, "scan_output_directions", made)[k]:
            column.reverse()
        kind = body.output[len(carried) + k].type
        stacked.append(_stacked(u, column, axis, f"{name}/scanned_{k}", kind))
    return [*carried, *stacked]


Unroll = Callable[["Unfolding", onnx.NodeProto, "Scope", str, Sequence[str]], list[str]]

UNROLLED: Mapping[str, Unroll] = {"If": branch, "Loop": loop, "Scan": scan}
"""Operators that hold graphs; each returns its outputs in the unfolded graph."""


def _public(u: Unfolding, value: str, what: str) -> Any:
    if value not in u.constants:
        raise Unsupported(
            f"{what} depends on a secret input: what the servers do next would tell it",
            "compute all branches and choose with Where, or make it a constant of the model",
        )
    return u.constants[value]


def _stacked(u: Unfolding, items: Sequence[str], axis: int, name: str, kind: onnx.TypeProto) -> str:
    """One result per turn, joined along a new axis."""
    if not items:
        dims = [d.dim_value for d in kind.tensor_type.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(kind.tensor_type.elem_type)
        return u.constant(u.fresh(name), np.zeros([*dims[:axis], 0, *dims[axis:]], dtype))
    axes = u.constant(u.fresh(f"{name}/axes"), np.array([axis], np.int64))
    wide = []
    for turn, item in enumerate(items):
        one = u.fresh(f"{name}/{turn}")
        if u.opsets.get("", 1) < 13:
            wide.append(u.make("Unsqueeze", [item], one, axes=[axis]))
        else:
            wide.append(u.make("Unsqueeze", [item, axes], one))
    return u.make("Concat", wide, u.fresh(name), axis=axis)


def _attributes(node: onnx.NodeProto) -> Mapping[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _per_item(attrs: Mapping[str, Any], name: str, count: int) -> list[int]:
    given: Iterable[int] = attrs.get(name, ())
    return [int(v) for v in given] or [0] * count
