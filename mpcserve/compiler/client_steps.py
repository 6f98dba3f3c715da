"""One ONNX node as steps of the client's program, where it can be one.

Moving elements is done once, on their positions, by onnx's own reference: what comes out says where
each element goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from mpcserve.compiler.constants import evaluated, hollow
from mpcserve.compiler.graph import attributes_of
from mpcserve.compiler.ml.rewrite import ML, Writer
from mpcserve.compiler.rearrange import positions_of
from mpcserve.plan.client import TEXT, Step
from mpcserve.plan.table import listed

Array = NDArray[Any]

Disclosure = Literal["text-categories", "number-categories", "imputed-values"]
"""What of a model may stand in its plan, so that the client can compute with it."""

MOVES = frozenset(
    {"Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze"}
    | {"ArrayFeatureExtractor", "Tile", "Transpose", "Unsqueeze"}
)
"""Operators that only move elements: all operands of Concat, the first of the others."""


@dataclass(frozen=True, slots=True)
class Moved:
    """What the client does in a node's place.

    `results`: name → an empty array of its shape and type. `wanted`: it saves something, or text
    leaves no choice; else it moves for the sake of a node behind it. `disclosing`: what must be
    disclosed for it, `told`: how much. `rest`: nodes that stay behind, with what remains secret.
    """

    steps: tuple[Step, ...]
    results: Mapping[str, Array]
    wanted: bool
    disclosing: Disclosure | None = None
    told: str = ""
    rest: Writer | None = None


def moved(
    node: onnx.NodeProto,
    given: Mapping[str, Array],
    constants: Mapping[str, Array],
    opsets: Mapping[str, int],
) -> Moved | None:
    """None where the client cannot compute it. `given`: operands that it has, as empty arrays."""
    maker = MAKERS.get((node.op_type, node.domain))
    if node.op_type in MOVES and node.domain in ("", ML):
        return _rearranged(node, given, constants, opsets)
    if maker is None or list(node.input) != list(given) or len(node.output) != 1:
        return None
    return maker(_Node(node, opsets), given[node.input[0]], attributes_of(node))


def is_text(x: Array) -> bool:
    """Whether the elements are text."""
    return bool(x.dtype.kind in "UO")


@dataclass(frozen=True, slots=True)
class _Node:
    proto: onnx.NodeProto
    opsets: Mapping[str, int]

    @property
    def label(self) -> str:
        return _label(self.proto)

    def step(self, op: str, x: str, output: str, **attrs: Any) -> Step:
        return Step(op, (x,), output, attrs, self.label)

    def one(self, op: str, result: Array, *, wanted: bool = False, **attrs: Any) -> Moved:
        """A single step."""
        x, y = self.proto.input[0], self.proto.output[0]
        return Moved((self.step(op, x, y, **attrs),), {y: result}, wanted)


def _label(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {node.name!r}"


def _rearranged(
    node: onnx.NodeProto,
    given: Mapping[str, Array],
    constants: Mapping[str, Array],
    opsets: Mapping[str, int],
) -> Moved | None:
    names = list(dict.fromkeys(node.input if node.op_type == "Concat" else node.input[:1]))
    others = [i for i in node.input if i and i not in names]
    if any(i not in given for i in names) or any(i not in constants for i in others):
        return None
    feed, start = {i: constants[i] for i in others}, 0
    for name in names:
        feed[name] = positions_of(given[name].shape) + start
        start += prod(given[name].shape)
    steps, results = [], {}
    for output, places in evaluated(node, feed, opsets).items():
        order = np.ravel(places)
        in_order = order.size == start and bool(np.all(np.diff(order, prepend=-1) == 1))
        attrs = {"indices": [] if in_order else listed(order), "shape": list(places.shape)}
        steps.append(Step("arrange", tuple(names), output, attrs, _label(node)))
        results[output] = hollow(places.shape, given[names[0]].dtype)
    return Moved(tuple(steps), results, wanted=is_text(given[names[0]]))


def _cast(node: _Node, x: Array, attrs: Mapping[str, Any]) -> Moved | None:
    """Text that spells numbers becomes numbers, whole numbers text."""
    to = attrs["to"]
    if to == onnx.TensorProto.STRING:
        if x.dtype.kind not in "iuU":
            return None  # reals have no one spelling
        return node.one("cast", hollow(x.shape, np.dtype("U1")), wanted=is_text(x), dtype=TEXT)
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(to))
    if dtype.kind not in "fiub":
        return None
    return node.one("cast", hollow(x.shape, dtype), wanted=is_text(x), dtype=str(dtype))


def _normalizer(node: _Node, x: Array, attrs: Mapping[str, Any]) -> Moved | None:
    """Rows of numbers divided by their norm; always, as it needs no parameter."""
    norm = attrs.get("norm", "MAX")
    if is_text(x) or x.ndim != 2 or norm not in ("MAX", "L1", "L2"):
        return None
    return node.one("normalize", hollow(x.shape, np.dtype(np.float32)), wanted=True, norm=norm)


def _imputer(node: _Node, x: Array, attrs: Mapping[str, Any]) -> Moved | None:
    """Disclosed values in place of missing numbers: `imputed-values`."""
    floats = x.dtype.kind == "f"
    values = attrs.get("imputed_value_floats" if floats else "imputed_value_int64s", ())
    replaced = attrs.get("replaced_value_float" if floats else "replaced_value_int64", 0)
    if is_text(x) or not values:
        return None
    if floats and np.isnan(replaced):
        replaced = None
    values = list(map(float if floats else int, values))
    done = node.one("impute", hollow(x.shape, x.dtype), replaced=replaced, values=values)
    return replace(done, disclosing="imputed-values", told=f"{len(values)} imputed values")


def _one_hot_encoder(node: _Node, x: Array, attrs: Mapping[str, Any]) -> Moved | None:
    """A column for each disclosed category: `text-categories`, `number-categories`."""
    strings, numbers = attrs.get("cats_strings", ()), attrs.get("cats_int64s", ())
    categories: list[Any] = list(strings if is_text(x) else map(int, numbers))
    if not categories:
        return None
    return _encoded(node, x, categories, node.proto.output[0], bool(attrs.get("zeros", 1)))


def _encoded(
    node: _Node, x: Array, categories: Sequence[Any], output: str, zeros: bool = True
) -> Moved:
    """One more axis, a column for each category."""
    source, before = node.proto.input[0], []
    if not is_text(x) and isinstance(categories[0], int) and x.dtype.kind == "f":
        source = f"{output}/whole"
        before = [node.step("cast", node.proto.input[0], source, dtype="int64")]
    last = node.step("one_hot", source, output, categories=list(categories), zeros=int(zeros))
    shape = (*x.shape, len(categories))
    done = Moved((*before, last), {output: hollow(shape, np.dtype(np.float32))}, wanted=False)
    kind: Disclosure = "text-categories" if is_text(x) else "number-categories"
    return replace(done, disclosing=kind, told=f"{len(categories)} categories")


def _label_encoder(node: _Node, x: Array, attrs: Mapping[str, Any]) -> Moved | None:
    """The disclosed category of an element, as OneHotEncoder; what it stands for stays secret,
    unless that is text or a whole number in equal steps."""
    table = _table(attrs, is_text(x))
    if table is None:
        return None
    keys, values, default, dtype = table
    if dtype != TEXT and not _is_an_order(values, default):
        return _with_secret_values(node, x, table)
    if dtype != TEXT and np.isnan(default):
        default = None
    result = hollow(x.shape, np.dtype("U1") if dtype == TEXT else np.dtype(dtype))
    done = node.one("lookup", result, keys=keys, values=values, default=default, dtype=dtype)
    text = is_text(x) or dtype == TEXT
    kind: Disclosure = "text-categories" if text else "number-categories"
    return replace(done, disclosing=kind, told=f"{len(keys)} categories")


_Encoding = tuple[list[Any], list[Any], Any, str]
"""Keys, values, default and element type of a LabelEncoder."""


def _table(attrs: Mapping[str, Any], text: bool) -> _Encoding | None:
    """None where the keys are not of the operand's type, or a number is none."""
    names = list(attrs.get("classes_strings", ()))
    keys = names or _first(attrs, "keys")
    values = list(range(len(names))) if names else _first(attrs, "values")
    if not keys or len(keys) != len(values) or isinstance(keys[0], str) != text:
        return None
    if not all(np.isfinite(v) for v in (*keys, *values) if isinstance(v, float)):
        return None
    if isinstance(values[0], str):
        return keys, values, attrs.get("default_string", "_Unused"), TEXT
    whole = bool(names) or "values_int64s" in attrs
    if "values_tensor" in attrs:
        whole = attrs["values_tensor"].dtype.kind in "iu"
    default: Any = attrs.get("default_int64", -1) if whole else attrs.get("default_float", -0.0)
    if "default_tensor" in attrs:
        default = np.ravel(attrs["default_tensor"])[0].item()
    return keys, values, default, "int64" if whole else "float32"


def _first(attrs: Mapping[str, Any], prefix: str) -> list[Any]:
    for kind in ("strings", "int64s", "floats", "tensor"):
        if (given := attrs.get(f"{prefix}_{kind}")) is not None and len(given):
            plain = np.ravel(given).tolist() if kind == "tensor" else list(given)
            return [v.decode() if isinstance(v, bytes) else v for v in plain]
    return []


def _is_an_order(values: Sequence[float], default: float) -> bool:
    """Whole numbers in equal steps tell no more than an order, which is public with the keys."""
    steps = set(np.diff(values).tolist())
    plain = [default] if np.isfinite(default) else []
    return len(steps) < 2 and all(float(v).is_integer() for v in (*values, *plain))


def _with_secret_values(node: _Node, x: Array, table: _Encoding) -> Moved:
    """The client says which key it is, the servers multiply with the secret values.

    Where the default is no number, the client refuses what is no key.
    """
    keys, values, default, dtype = table
    output = node.proto.output[0]
    chosen = f"{output}/categories"
    w = Writer(node.proto.name, node.opsets.get("", 1), {}, {}, ())
    zeros = bool(np.isfinite(default))
    other = float(default) if zeros else 0.0
    column = np.array(values, np.float64)[:, None] - other
    found = w.op("MatMul", chosen, w.constant(column))
    flat = w.reshape(w.op("Add", found, w.constant(other)), x.shape)
    last = flat if dtype == "float32" else w.cast(flat, np.int64)
    w.nodes.append(helper.make_node("Identity", [last], [output], name=f"{node.proto.name}/value"))
    return replace(_encoded(node, x, keys, chosen, zeros), rest=w)


MAKERS = {
    ("Cast", ""): _cast,
    ("Imputer", ML): _imputer,
    ("LabelEncoder", ML): _label_encoder,
    ("Normalizer", ML): _normalizer,
    ("OneHotEncoder", ML): _one_hot_encoder,
}
"""Every other operator that the client may compute."""
