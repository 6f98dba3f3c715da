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
    given = [scope.values[i] if i else "" for i in node.input]
    if u.opsets.get("", 1) >= 9:
        return _scanned(u, node, scope, name, given)
    if given[0]:
        raise Unsupported("has lengths of sequences", "export the model with opset 9 or newer")
    rows = []
    for row in range((u.shape(given[1]) or (0,))[0]):  # the old form had a batch in front
        at = u.constant(u.fresh(f"{name}/row_{row}"), np.array(row, np.int64))
        own = [u.make("Gather", [x, at], u.fresh(f"{name}/{row}"), axis=0) for x in given[1:]]
        rows.append(_scanned(u, node, scope, f"{name}/{row}", own))
    kinds = [o.type for o in _attributes(node)["body"].output]
    columns = enumerate(zip(*rows, strict=True))
    return [_stacked(u, c, 0, f"{name}/joined_{k}", kinds[k]) for k, c in columns]


def _scanned(
    u: Unfolding, node: onnx.NodeProto, scope: Scope, name: str, given: list[str]
) -> list[str]:
    attrs = _attributes(node)
    body: onnx.GraphProto = attrs["body"]
    count = int(attrs["num_scan_inputs"])
    carried, scanned = given[: len(given) - count], given[len(given) - count :]
    axes = _per_item(attrs, "scan_input_axes", count)
    length = _length([u.shape(x) for x in scanned], axes)
    old = "directions" if u.opsets.get("", 1) < 9 else "scan_input_directions"
    backward = _per_item(attrs, old, count)
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
    made = len(body.output) - len(carried)
    along = _per_item(attrs, "scan_output_axes", made)
    reverse = _per_item(attrs, "scan_output_directions", made)
    stacked = []
    for k, info in enumerate(body.output[len(carried) :]):
        column = [row[k] for row in rows]
        column = column[::-1] if reverse[k] else column
        stacked.append(_stacked(u, column, along[k], f"{name}/scanned_{k}", info.type))
    return [*carried, *stacked]


def _length(shapes: Sequence[tuple[int, ...] | None], axes: Sequence[int]) -> int:
    """How many elements there are along the scanned axes."""
    if any(s is None for s in shapes):
        raise Unsupported("scans a value of unknown length", "export it with fixed shapes")
    lengths = {s[a] for s, a in zip(shapes, axes, strict=True) if s is not None}
    if len(lengths) != 1:
        raise Unsupported(f"scans values of different lengths {sorted(lengths)}")
    length = lengths.pop()
    if length > MOST_TURNS:
        raise Unsupported(f"runs more than {MOST_TURNS} turns", "export it with fewer")
    return length


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
