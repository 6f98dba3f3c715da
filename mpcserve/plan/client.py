"""What the data owner's client computes by itself, in the clear, before anything is shared.

A short program on the owner's own arrays, one batch of them at a time. It holds nothing of the
model but what the model owner chose to disclose: categories of text, say. Whoever runs it needs
NumPy and nothing else.

    arrange    elements of all operands in another order or shape
    cast       another element type; a number that is no number does not become a whole one
    impute     values in place of missing ones
    lookup     values of keys; keys, values and the default are public
    normalize  rows divided by their norm; rows of zeros stay
    one_hot    one more axis: 1 where an element is the category; categories are public
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpcserve.errors import InputError
from mpcserve.plan.table import read, written

Array = NDArray[Any]
Attrs = Mapping[str, Any]
Reach = tuple[float, float] | None
"""The range of a value; None for text, and where none is known."""

TEXT = "str"
"""The element type of text."""


@dataclass(frozen=True, slots=True)
class RawInput:
    """What the data owner hands in: an array of `dtype`, which is "str" for text."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """`output` = op(`inputs`). `node`: operator and name of the ONNX node it came from."""

    op: str
    inputs: tuple[str, ...]
    output: str
    attrs: Mapping[str, Any]
    node: str = ""

    @property
    def public(self) -> str:
        """What of the model stands in the step, for people; empty where nothing does."""
        if self.op == "impute":
            return f"{len(self.attrs['values'])} imputed values are public"
        if self.op == "one_hot":
            return f"{len(self.attrs['categories'])} categories are public"
        if self.op == "lookup":
            return f"{len(self.attrs['keys'])} categories and what they stand for are public"
        return ""


@dataclass(frozen=True, slots=True)
class ClientProgram:
    """Steps from raw inputs to those that are shared, in order; empty where these are the same."""

    inputs: tuple[RawInput, ...] = ()
    steps: tuple[Step, ...] = ()

    def run(self, arrays: Mapping[str, Array], first_row: int = 0) -> dict[str, Array]:
        """Every value by name, of one batch of raw arrays. Raises: InputError naming the row."""
        values = dict(arrays)
        for step in self.steps:
            try:
                with np.errstate(all="ignore"):
                    operands = [values[name] for name in step.inputs]
                    values[step.output] = OPS[step.op].apply(operands, step.attrs)
            except _Unfit as e:
                raise InputError(self._blame(step, e, first_row), e.hint) from None
            except (ValueError, IndexError, TypeError, OverflowError, MemoryError) as e:
                raise InputError(
                    f"{step.node or step.op} on the client: {e}",
                    "see the plan's inputs with `mpcserve models`",
                ) from None
        return values

    def applied(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """As `run`, for as many rows as there are: a batch at a time, the last one filled up."""
        if all(arrays[i.name].shape == i.shape for i in self.inputs):
            return self.run(arrays)
        count, batch = len(arrays[self.inputs[0].name]), self.inputs[0].shape[0]
        parts = []
        for begin in range(0, count, batch):
            rows = np.minimum(np.arange(begin, begin + batch), count - 1)
            parts.append(self.run({i.name: arrays[i.name][rows] for i in self.inputs}, begin))
        return {k: np.concatenate([p[k] for p in parts])[:count] for k in parts[0]}

    def reaches(self, raw: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        """The range of every value that has one, from the ranges of raw inputs."""
        found: dict[str, Reach] = dict(raw)
        for step in self.steps:
            operands = [found.get(name) for name in step.inputs]
            found[step.output] = OPS[step.op].reach(operands, step.attrs)
        return {name: reach for name, reach in found.items() if reach is not None}

    def sources(self, name: str) -> tuple[str, ...]:
        """The raw inputs that a value is made of."""
        made = {step.output: step for step in self.steps}
        if name not in made:
            return (name,)
        found = (s for i in made[name].inputs for s in self.sources(i))
        return tuple(dict.fromkeys(found))

    def nodes(self) -> dict[str, str]:
        """Every node that runs on the client → what of it is public, or nothing."""
        told: dict[str, list[str]] = {}
        for step in self.steps:
            told.setdefault(step.node, []).extend([step.public] if step.public else [])
        return {node: ", ".join(public) for node, public in told.items()}

    def problems(self, shared: Sequence[str]) -> Iterator[str]:
        """What breaks the law: unknown ops, missing attributes, names that nothing defines."""
        known = {i.name for i in self.inputs}
        for step in self.steps:
            if step.op not in OPS:
                yield f"client step {step.output!r}: unknown op {step.op!r}"
                return
            if missing := [a for a in OPS[step.op].attrs if a not in step.attrs]:
                yield f"client step {step.output!r}: missing attributes {', '.join(missing)}"
            if undefined := [i for i in step.inputs if i not in known]:
                yield f"client step {step.output!r}: reads {undefined[0]!r} before it is made"
            if step.output in known:
                yield f"client step {step.output!r}: made twice"
            known.add(step.output)
        if self.inputs and (lost := [name for name in shared if name not in known]):
            yield f"input {lost[0]!r} is not made on the client"

    def to_json(self) -> list[Any]:
        """Plain data."""
        return [
            [[i.name, i.dtype, list(i.shape)] for i in self.inputs],
            [
                [
                    s.op,
                    list(s.inputs),
                    s.output,
                    {k: written(v) for k, v in s.attrs.items()},
                    s.node,
                ]
                for s in self.steps
            ],
        ]

    def _blame(self, step: Step, error: _Unfit, first_row: int) -> str:
        where = ", ".join(map(repr, self.sources(step.inputs[0])))
        row, *columns = error.index or (0,)
        at = f"row {first_row + row}" + (f", column {columns[0]}" if columns else "")
        return f"input {where}: {at}: {error.reason}"


def program_from_json(data: Sequence[Any]) -> ClientProgram:
    """Inverse of `to_json`. Raises: TypeError, ValueError on malformed data."""
    inputs, steps = data
    return ClientProgram(
        tuple(RawInput(str(n), str(t), tuple(map(int, s))) for n, t, s in inputs),
        tuple(
            Step(
                str(op),
                tuple(map(str, names)),
                str(output),
                MappingProxyType({k: read(v) for k, v in attrs.items()}),
                str(node),
            )
            for op, names, output, attrs, node in steps
        ),
    )


@dataclass(frozen=True, slots=True)
class Op:
    """What a step does, the attributes it must have, and the range of its result."""

    apply: Callable[[Sequence[Array], Attrs], Array]
    reach: Callable[[Sequence[Reach], Attrs], Reach]
    attrs: tuple[str, ...]


class _Unfit(Exception):
    """An element that a step cannot take; only the data owner reads it, so it may be named."""

    def __init__(self, index: tuple[int, ...], reason: str, hint: str) -> None:
        super().__init__(reason)
        self.index, self.reason, self.hint = index, reason, hint


def _arrange(xs: Sequence[Array], attrs: Attrs) -> Array:
    flat = xs[0].reshape(-1) if len(xs) == 1 else np.concatenate([x.reshape(-1) for x in xs])
    order = np.asarray(attrs["indices"], np.int64)
    return (flat[order] if order.size else flat).reshape(attrs["shape"])


def _cast(xs: Sequence[Array], attrs: Attrs) -> Array:
    x, dtype = xs[0], np.dtype(attrs["dtype"])
    if x.dtype.kind == "U" and dtype.kind != "U":
        x = _parsed(x)
    if dtype.kind in "iu" and x.dtype.kind == "f":
        _refuse(~np.isfinite(x), x, "is not a number", "fill in what is missing")
    return x.astype(dtype)


def _parsed(x: Array) -> Array:
    numbers = np.empty(x.shape, np.float64)
    for index in np.ndindex(x.shape):
        try:
            numbers[index] = float(x[index])
        except ValueError:
            raise _Unfit(index, f"{str(x[index])!r} is not a number", "write a number") from None
    return numbers


def _impute(xs: Sequence[Array], attrs: Attrs) -> Array:
    x, replaced = xs[0], attrs["replaced"]
    missing = np.isnan(x) if replaced is None else x == replaced
    return np.where(missing, np.asarray(attrs["values"], x.dtype), x)


def _lookup(xs: Sequence[Array], attrs: Attrs) -> Array:
    place, known = _places(xs[0], attrs["keys"])
    values = np.asarray(attrs["values"], attrs["dtype"])
    other = np.nan if attrs["default"] is None else attrs["default"]
    return np.asarray(np.where(known, values[place], np.asarray(other).astype(attrs["dtype"])))


def _normalize(xs: Sequence[Array], attrs: Attrs) -> Array:
    x = xs[0].astype(np.float32)
    if attrs["norm"] == "MAX":
        norm = x.max(axis=1, keepdims=True)
    elif attrs["norm"] == "L1":
        norm = np.abs(x).sum(axis=1, keepdims=True)
    else:
        norm = np.sqrt((x * x).sum(axis=1, keepdims=True))
    return x / np.where(norm == 0, np.float32(1), norm)


def _one_hot(xs: Sequence[Array], attrs: Attrs) -> Array:
    (x,), categories = xs, attrs["categories"]
    place, known = _places(x, categories)
    if not attrs["zeros"]:
        told = f"is none of the {len(categories)} categories that the model knows"
        _refuse(~known, x, told, "see them with `mpcserve inspect` on the plan")
    found = np.zeros((*x.shape, len(categories)), np.float32)
    np.put_along_axis(found, place[..., None], known[..., None].astype(np.float32), -1)
    return found


def _places(x: Array, keys: Sequence[Any]) -> tuple[Array, Array]:
    """(the place of each element among the keys, whether it is there)."""
    table = np.asarray(keys)
    if (table.dtype.kind == "U") != (x.dtype.kind == "U"):
        raise ValueError(f"categories of {table.dtype} for elements of {x.dtype}")
    order = np.argsort(table, kind="stable")
    place = order[np.searchsorted(table[order], x).clip(max=len(table) - 1)]
    return place, np.asarray(table[place] == x)


def _refuse(bad: Array, x: Array, reason: str, hint: str) -> None:
    if bad.any():
        index = tuple(map(int, np.argwhere(bad)[0]))
        raise _Unfit(index, f"{x[index].item()!r} {reason}", hint)


def _same(xs: Sequence[Reach], attrs: Attrs) -> Reach:
    return _union(xs)


def _reach_of_cast(xs: Sequence[Reach], attrs: Attrs) -> Reach:
    return (0.0, 1.0) if attrs["dtype"] == "bool" else _same(xs, attrs)


def _reach_of_values(xs: Sequence[Reach], attrs: Attrs) -> Reach:
    """Of a lookup: its table. Of an imputation: what the values add to the operand's range."""
    given = [v for v in (*attrs["values"], attrs.get("default")) if v is not None]
    if isinstance(given[0], str):
        return None
    return _union([*xs, (float(min(given)), float(max(given)))])


def _reach_of_norm(xs: Sequence[Reach], attrs: Attrs) -> Reach:
    if xs[0] is not None and xs[0][0] >= 0:
        return 0.0, 1.0
    return None if attrs["norm"] == "MAX" else (-1.0, 1.0)


def _union(xs: Sequence[Reach]) -> Reach:
    known = [x for x in xs if x is not None]
    if len(known) < len(xs):
        return None
    return min(low for low, _ in known), max(high for _, high in known)


OPS: Mapping[str, Op] = {
    "arrange": Op(_arrange, _same, ("indices", "shape")),
    "cast": Op(_cast, _reach_of_cast, ("dtype",)),
    "impute": Op(_impute, _reach_of_values, ("replaced", "values")),
    "lookup": Op(
        _lookup,
        lambda xs, attrs: _reach_of_values([], attrs),
        ("keys", "values", "default", "dtype"),
    ),
    "normalize": Op(_normalize, _reach_of_norm, ("norm",)),
    "one_hot": Op(_one_hot, lambda xs, attrs: (0.0, 1.0), ("categories", "zeros")),
}
"""Every op of a client program."""
